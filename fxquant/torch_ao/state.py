"""What torch.ao's models hold, by the float model's names: the architecture, the integers, the float tensors.

Nothing of torch.ao is imported: its modules are recognized by name, its packed objects by the plain state that they
pickle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxquant.errors import TorchAoError, nearest
from fxquant.formats import FLOAT16
from fxquant.graph import edit
from fxquant.nn.fused import LinearReLU
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

_QCONFIGS = {
    ("qint8", "torch.per_tensor_affine"): per_tensor_dynamic_qconfig,
    ("qint8", "torch.per_channel_affine"): per_channel_dynamic_qconfig,
    ("quint8", "torch.per_channel_affine_float_qparams"): float_qparams_weight_only_qconfig,
    ("quint4x2", "torch.per_channel_affine_float_qparams"): float_qparams_weight_only_qconfig_4bit,
}
"""The preset whose weight half describes a quantized tensor of torch.ao's, by its dtype and scheme."""

_STATIC = (
    "fxquant takes over what torch.ao quantized dynamically or weight-only; quantize the float model anew instead: "
    "prepare_fx(model, default_static_qconfig_mapping(), example_inputs), then convert_fx(prepared, data=batches)"
)


class Packed:
    """Stands for torch.ao's packed objects while a file is read: keeps the plain state, and packs nothing."""

    state: Any

    def __setstate__(self, pickled: tuple[Any, str]) -> None:
        self.state = pickled[0]


class Weight(NamedTuple):
    """A weight as torch.ao had it: its integers, its float shape, and the qconfig of its site."""

    quantized: QuantizedTensor
    shape: torch.Size
    qconfig: QConfig


@dataclass
class Contents:
    """torch.ao's state_dict in the float model's names. calls: weight and bias of F.linear calls, by scope, number."""

    floats: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    calls: dict[tuple[str, int], tuple[Weight, torch.Tensor | None]] = field(default_factory=dict)
    mapping: QConfigMapping = field(default_factory=QConfigMapping)


# The float architecture of a model of torch.ao's


def _linear(layer_type: type[nn.Linear]) -> Callable[[Any], nn.Module]:
    return lambda old: layer_type(old.in_features, old.out_features, old.bias() is not None, device="meta")


def _with(layer_type: Callable[..., nn.Module], *options: str) -> Callable[[Any], nn.Module]:
    return lambda old: layer_type(**{name: getattr(old, name) for name in options}, device="meta")


_SIZES = ("input_size", "hidden_size", "bias")
_LAYERS = (*_SIZES, "num_layers", "batch_first", "bidirectional")  # dropout is for training
_TABLE = ("num_embeddings", "embedding_dim")
_FLOAT_FORMS: dict[str, Callable[[Any], nn.Module]] = {
    "nn.quantized.dynamic.modules.linear.Linear": _linear(nn.Linear),
    "nn.intrinsic.quantized.dynamic.modules.linear_relu.LinearReLU": _linear(LinearReLU),
    "nn.quantized.dynamic.modules.rnn.LSTM": _with(nn.LSTM, *_LAYERS),
    "nn.quantized.dynamic.modules.rnn.GRU": _with(nn.GRU, *_LAYERS),
    "nn.quantized.dynamic.modules.rnn.LSTMCell": _with(nn.LSTMCell, *_SIZES),
    "nn.quantized.dynamic.modules.rnn.GRUCell": _with(nn.GRUCell, *_SIZES),
    "nn.quantized.dynamic.modules.rnn.RNNCell": _with(nn.RNNCell, *_SIZES, "nonlinearity"),
    "nn.quantized.modules.embedding_ops.Embedding": _with(nn.Embedding, *_TABLE),
    "nn.quantized.modules.embedding_ops.EmbeddingBag": _with(nn.EmbeddingBag, *_TABLE, "mode", "include_last_offset"),
    "quantization.stubs.QuantStub": nn.Identity,
    "quantization.stubs.DeQuantStub": nn.Identity,
}
"""How the float module is made from each module of torch.ao, by its class's name below torch.ao."""

_CALLS = {
    "quantized.linear_dynamic": nn.Linear,
    "quantized.linear_relu_dynamic": LinearReLU,
    "quantized.linear_dynamic_fp16": nn.Linear,
    "quantized.linear_relu_dynamic_fp16": LinearReLU,
}
"""The float module that replaces the packed weight of each of torch.ao's operators in a graph."""


def architecture_of(quantized: nn.Module) -> nn.Module:
    """Return the float architecture of a torch.ao model: its weights have shapes, and no data."""
    return _float_form(edit.mirror(quantized), "", {}).eval()


def _float_form(module: nn.Module, path: str, done: dict[int, tuple[nn.Module, nn.Module]]) -> nn.Module:
    """Return the float form of a module of a mirror, whose children are replaced in place."""
    if id(module) in done:
        return done[id(module)][1]
    name = f"{type(module).__module__}.{type(module).__name__}"
    result = module
    if name.startswith("torch.ao.") and name.removeprefix("torch.ao.") in _FLOAT_FORMS:
        result = _FLOAT_FORMS[name.removeprefix("torch.ao.")](module)
        edit.carry_hooks(module, result)
    elif name.startswith("torch.ao.nn.intrinsic.modules.fused."):  # a float chain that torch.ao fused and left
        result = nn.Sequential(*module.children())
        edit.carry_hooks(module, result)
    elif name.startswith(("torch.ao.nn.", "torch.ao.quantization.")):
        raise TorchAoError(f"{path!r} is {name}. {_STATIC}")
    else:
        for child, inner in module._modules.items():
            if inner is not None:
                module._modules[child] = _float_form(inner, f"{path}.{child}" if path else child, done)
        result = _lift_calls(module, path) if isinstance(module, fx.GraphModule) else module
    done[id(module)] = (module, result)  # the old one too, so that its id is not reused
    return result


def _lift_calls(module: fx.GraphModule, path: str) -> nn.Module:
    """Return a graph whose calls of torch.ao's operators are calls of float modules, at the packed weights' names."""
    graph = module.graph
    for node in list(graph.nodes):
        target = str(node.target)
        if node.op != "call_function" or not target.startswith("quantized."):
            continue
        if target not in _CALLS:
            raise TorchAoError(f"{node.name!r} in {path or 'the graph'} calls torch.ops.{target}. {_STATIC}")
        x, packed = node.args[:2]
        weight, bias = _state_of(getattr(module, packed.target), packed.target)
        outputs, inputs = weight.shape
        delattr(module, packed.target)
        module.add_submodule(packed.target, _CALLS[target](inputs, outputs, bias is not None, device="meta"))
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(packed.target, (x,)))
        graph.erase_node(node)
        graph.erase_node(packed)
    return fx.GraphModule(module, graph, type(module).__name__)  # without torch.ao's hooks


# torch.ao's state_dict in the float model's names

_PACKED = re.compile(
    r"(?:(?P<path>.+)\.)?(?:_packed_params\.(?P<whole>_packed_params|_packed_weight)|"
    r"_packed_weight_(?P<side>ih|hh)|_all_weight_values\.(?P<cell>\d+)\.param)"
)
_CALL = re.compile(r"(?P<scope>.*?)\.?_packed_weight_(?P<number>\d+)")


def unpack(state: Mapping[str, Any], architecture: nn.Module, qconfig: QConfig) -> Contents:
    """Return what a state_dict of torch.ao's holds."""
    contents, modules = Contents(), dict(architecture.named_modules())
    float_keys = architecture.state_dict().keys()
    for key, held in state.items():
        match, call, value = _PACKED.fullmatch(key), _CALL.fullmatch(key), _state_of(held, key)
        if match:
            path = match["path"] or ""
            if path not in modules:
                raise TorchAoError(f"{key!r}: the model has no module {path!r}{nearest(path, modules)}")
            for name, parts in _named(match, value, modules[path], key):
                _put(contents, path, name, parts, qconfig)
        elif call and key in modules:
            _put(contents, key, "{}", value, qconfig)
        elif call:
            weight, bias = value
            number = (call["scope"].replace(".", "_"), int(call["number"]))
            contents.calls[number] = (_weight(weight, qconfig, key), bias)
        elif isinstance(value, torch.Tensor) and not value.is_quantized:
            fused = re.sub(r"\.0\.(weight|bias)$", r".\1", key)  # of a float Conv → ReLU that torch.ao fused
            contents.floats[fused if key not in float_keys and fused in float_keys else key] = value
        elif not isinstance(value, torch.dtype):
            raise TorchAoError(f"{key!r} holds {getattr(value, 'dtype', type(value).__name__)}. {_STATIC}")
    if not contents.weights and not contents.calls:
        raise TorchAoError("torch.ao quantized nothing in this: a float model goes to fxquant.prepare_fx")
    for path in contents.mapping.module_name_qconfigs:
        _drop_output_scale(contents, path)
    return contents


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
            yield f"{{}}_{side}_l{layer}{'_reverse' * is_reverse}", _state_of(packed, key)


def _put(contents: Contents, path: str, name: str, parts: Any, qconfig: QConfig) -> None:
    """Add a module's weight and bias, and the mapping entry for it."""
    weight, bias = parts
    prefix = f"{path}." if path else ""
    unpacked = _weight(weight, qconfig, prefix + name.format("weight"))
    contents.weights[prefix + name.format("weight")] = unpacked
    if bias is not None:
        contents.floats[prefix + name.format("bias")] = bias
    contents.mapping.set_module_name(path, unpacked.qconfig)


def _drop_output_scale(contents: Contents, path: str) -> None:
    """Drop the scale and zero point that torch.ao's Linear saves, which matter only in a static one."""
    prefix = f"{path}." if path else ""
    scale, zero_point = (contents.floats.pop(prefix + name, None) for name in ("scale", "zero_point"))
    if scale is not None and zero_point is not None and (float(scale), int(zero_point)) != (1.0, 0):
        raise TorchAoError(f"{path!r} quantizes its output by the fixed scale {float(scale):.4g}. {_STATIC}")


def _state_of(held: Any, key: str) -> Any:
    """Return the plain state of a packed object, anything else as it is."""
    if isinstance(held, Packed):
        return held.state
    if not isinstance(held, torch.ScriptObject):
        return held
    try:
        return held.__getstate__()[0]  # type: ignore[attr-defined]
    except Exception as error:
        raise _unreadable(key, error) from error


def _weight(weight: torch.Tensor, qconfig: QConfig, key: str) -> Weight:
    """Return one of torch.ao's weights, a quantized tensor or one in half precision, as ours."""
    if not weight.is_quantized:
        return Weight(to_floats(weight, FLOAT16), weight.shape, float16_dynamic_qconfig)
    try:
        scheme_key, rows = (str(weight.dtype).removeprefix("torch."), str(weight.qscheme())), weight.shape[0]
        if scheme_key not in _QCONFIGS:
            raise TorchAoError(f"{key!r} is torch.{' '.join(scheme_key)}. {_STATIC}")
        scheme = _QCONFIGS[scheme_key]
        values = weight.int_repr()
        if scheme.weight.axis == "tensor":
            scale, zero_point = torch.tensor(weight.q_scale()), torch.tensor(weight.q_zero_point())
        else:
            scale, zero_point = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    except (AttributeError, RuntimeError) as error:
        raise _unreadable(key, error) from error
    # Copied: those of torch.ao's tables point into the packed object, which dies with its model.
    scale, zero_point = (part.to(torch.float32).expand(rows).clone() for part in (scale, zero_point))
    weight_format, is_symmetric = scheme.weight.format, scheme.weight.symmetric
    # Theirs are packed from end to end, where ours packs each row.
    values = weight_format.pack(weight_format.unpack(values.flatten(), weight.numel()).view(weight.shape))
    if is_symmetric and zero_point.any():
        raise TorchAoError(f"{key!r} has zero points other than 0; {_STATIC}")
    site = QConfig(qconfig.activation if scheme.activation is not None else None, scheme.weight)
    zero_points = None if is_symmetric else zero_point
    return Weight(QuantizedTensor(weight_format, values, scale, zero_points, weight.shape[-1]), weight.shape, site)


def _unreadable(key: str, error: Exception) -> TorchAoError:
    return TorchAoError(
        f"torch {torch.__version__} can no longer unpack {key!r} ({type(error).__name__}: {error}); "
        "do it once under an older torch, and write the result with fxquant.save"
    )
