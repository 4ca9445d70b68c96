"""What torch.ao's state_dicts hold, by the float model's names: the integers, the float tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from fxquant.errors import TorchAoError, nearest
from fxquant.formats import FLOAT16
from fxquant.numerics import QuantizedTensor, to_floats
from fxquant.qconfig import (
    QConfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    per_channel_dynamic_qconfig,
    per_tensor_dynamic_qconfig,
)
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.torch_ao.packed import state_of, unreadable
from fxquant.torch_ao.static import SPEC, STATIC_LATER, Scales

_QCONFIGS = {
    ("qint8", "torch.per_tensor_affine"): per_tensor_dynamic_qconfig,
    ("qint8", "torch.per_channel_affine"): per_channel_dynamic_qconfig,
    ("quint8", "torch.per_channel_affine_float_qparams"): float_qparams_weight_only_qconfig,
    ("quint4x2", "torch.per_channel_affine_float_qparams"): float_qparams_weight_only_qconfig_4bit,
}
"""The preset whose weight half describes a quantized tensor of torch.ao's, by its dtype and scheme."""

STATIC = QConfig(activation=SPEC, weight=per_channel_dynamic_qconfig.weight)
"""Of static sites; the weight half is that of its integers."""


class Weight(NamedTuple):
    """A weight as torch.ao had it: its integers, its float shape, and the qconfig of its site.

    is_turned: whether the integers are (O, I, ...) of a float weight (I, O, ...).
    """

    quantized: QuantizedTensor
    shape: torch.Size
    qconfig: QConfig
    is_turned: bool = False


@dataclass
class Contents:
    """torch.ao's state_dict in the float model's names. calls: weight and bias of F.linear calls, by scope, number."""

    floats: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    calls: dict[tuple[str, int], tuple[Weight, torch.Tensor | None]] = field(default_factory=dict)
    mapping: QConfigMapping = field(default_factory=QConfigMapping)


# torch.ao's state_dict in the float model's names

_PACKED = re.compile(
    r"(?:(?P<path>.+)\.)?(?:_packed_params\.(?P<whole>_packed_params|_packed_weight)|"
    r"_packed_weight_(?P<side>ih|hh)|_all_weight_values\.(?P<cell>\d+)\.param)"
)
_CALL = re.compile(r"(?P<scope>.*?)\.?_packed_weight_(?P<number>\d+)")
_NUMBERED = re.compile(r"_(scale|zero_point)_\d+$")


def unpack(state: Mapping[str, Any], architecture: nn.Module, qconfig: QConfig, scales: Scales) -> Contents:
    """Return what a state_dict of torch.ao's holds. qconfig: of what is not static; scales: what is known of values."""
    contents, modules = Contents(), dict(architecture.named_modules())
    float_keys = architecture.state_dict().keys()
    for key, held in state.items():
        if key in scales.used:
            continue
        match, call, value = _PACKED.fullmatch(key), _CALL.fullmatch(key), state_of(held, key)
        if match:
            path = match["path"] or ""
            if path not in modules:
                raise TorchAoError(f"{key!r}: the model has no module {path!r}{nearest(path, modules)}")
            for name, parts in _named(match, value, modules[path], key):
                _put(contents, path, name, parts, STATIC if path in scales.products else qconfig)
        elif call and key in modules:
            _put(contents, key, "{}", value, STATIC if key in scales.products else qconfig)
        elif call:
            weight, bias = value
            number = (call["scope"].replace(".", "_"), int(call["number"]))
            contents.calls[number] = (_weight(weight, qconfig, key), bias)
        elif isinstance(value, torch.Tensor) and not value.is_quantized:
            _refuse_numbered(key, float_keys)
            fused = re.sub(r"\.0\.(weight|bias)$", r".\1", key)  # of a float Conv → ReLU that torch.ao fused
            contents.floats[fused if key not in float_keys and fused in float_keys else key] = value
        elif isinstance(value, torch.Tensor) and key.removesuffix(".weight") in scales.products:
            path = key.removesuffix(".weight")
            is_turned = getattr(modules[path], "transposed", False)
            _put(contents, path, "{}", (value, None), STATIC, is_turned)
        elif not isinstance(value, torch.dtype):
            raise TorchAoError(f"{key!r} holds {getattr(value, 'dtype', type(value).__name__)}. {STATIC_LATER}")
    if not contents.weights and not contents.calls and not scales.of:
        raise TorchAoError("torch.ao quantized nothing in this: a float model goes to fxquant.prepare_fx")
    for path in contents.mapping.module_name_qconfigs:
        _drop_output_scale(contents, path)
    return contents


def _refuse_numbered(key: str, known: Collection[str]) -> None:
    """Raise TorchAoError for a scale that torch.ao's graph names by a number: only the graph tells whose it is."""
    if key not in known and _NUMBERED.search(key):
        raise TorchAoError(
            f"{key!r} is a scale of a static graph, which alone tells what has it. Load the state_dict into torch.ao's "
            "converted model, converted.load_state_dict(state_dict), and give that: from_torch_ao(converted)"
        )


def _named(match: re.Match[str], value: Any, module: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (name with a gap for "weight" or "bias", (weight, bias)) for each weight that an entry holds."""
    if match["whole"]:
        yield "{}", value if match["whole"] == "_packed_params" else (value, None)
    elif match["side"]:
        yield "{}_" + match["side"], value
    else:
        if not isinstance(module, nn.RNNBase):
            raise TorchAoError(f"{key!r} is a recurrent layer's, but the model has {type(module).__name__} there")
        layer, is_reverse = divmod(int(match["cell"]), 2) if module.bidirectional else (int(match["cell"]), 0)
        for side, packed in zip(("ih", "hh"), value[-1], strict=True):
            yield f"{{}}_{side}_l{layer}{'_reverse' * is_reverse}", state_of(packed, key)


def _put(contents: Contents, path: str, name: str, parts: Any, qconfig: QConfig, is_turned: bool = False) -> None:
    """Add a module's weight and bias, and the mapping entry for it."""
    weight, bias = parts
    prefix = f"{path}." if path else ""
    unpacked = _weight(weight, qconfig, prefix + name.format("weight"), is_turned)
    contents.weights[prefix + name.format("weight")] = unpacked
    if bias is not None:
        contents.floats[prefix + name.format("bias")] = bias
    contents.mapping.set_module_name(path, unpacked.qconfig)


def _drop_output_scale(contents: Contents, path: str) -> None:
    """Drop the scale and zero point that torch.ao's Linear saves, which matter only in a static one."""
    prefix = f"{path}." if path else ""
    scale, zero_point = (contents.floats.pop(prefix + name, None) for name in ("scale", "zero_point"))
    if scale is not None and zero_point is not None and (float(scale), int(zero_point)) != (1.0, 0):
        raise TorchAoError(f"{path!r} quantizes its output by the fixed scale {float(scale):.4g}. {STATIC_LATER}")


def _weight(weight: torch.Tensor, qconfig: QConfig, key: str, is_turned: bool = False) -> Weight:
    """Return one of torch.ao's weights, a quantized tensor or one in half precision, as ours."""
    if not weight.is_quantized:
        return Weight(to_floats(weight, FLOAT16), weight.shape, float16_dynamic_qconfig)
    try:
        scheme_key = str(weight.dtype).removeprefix("torch."), str(weight.qscheme())
        rows = weight.shape[int(is_turned)]
        if scheme_key not in _QCONFIGS:
            raise TorchAoError(f"{key!r} is torch.{' '.join(scheme_key)}. {STATIC_LATER}")
        scheme = _QCONFIGS[scheme_key]
        values = weight.int_repr()
        if scheme.weight.axis == "tensor":
            scale, zero_point = torch.tensor(weight.q_scale()), torch.tensor(weight.q_zero_point())
        else:
            scale, zero_point = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    except (AttributeError, RuntimeError) as error:
        raise unreadable(key, error) from error
    # Copied: those of torch.ao's tables point into the packed object, which dies with its model.
    scale, zero_point = (part.to(torch.float32).expand(rows).clone() for part in (scale, zero_point))
    weight_format, is_symmetric = scheme.weight.format, scheme.weight.symmetric
    # Theirs are packed from end to end, where ours packs each row.
    values = weight_format.pack(weight_format.unpack(values.flatten(), weight.numel()).view(weight.shape))
    if is_symmetric and zero_point.any():
        raise TorchAoError(f"{key!r} has zero points other than 0; {STATIC_LATER}")
    site = QConfig(qconfig.activation if scheme.activation is not None else None, scheme.weight)
    zero_points = None if is_symmetric else zero_point
    values = values.transpose(0, 1) if is_turned else values
    quantized = QuantizedTensor(weight_format, values, scale, zero_points, weight.shape[-1])
    return Weight(quantized, weight.shape, site, is_turned)
