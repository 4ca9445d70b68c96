"""Calls of ATen operators on values without weights: the functions of torch that the table of values knows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant.graph.norms import restore_norm

_ATEN: Any = torch.ops.aten

_SAME: dict[Callable[..., Any], tuple[str, ...]] = {
    torch.add: ("add.Tensor", "add.Scalar"),
    torch.sub: ("sub.Tensor", "sub.Scalar"),
    torch.mul: ("mul.Tensor", "mul.Scalar"),
    torch.div: ("div.Tensor", "div.Scalar"),
    torch.relu_: ("relu_.default",),
    torch.sigmoid: ("sigmoid.default",),
    torch.tanh: ("tanh.default",),
    torch.clamp: ("clamp.default",),
    torch.clamp_min: ("clamp_min.default",),
    torch.clamp_max: ("clamp_max.default",),
    torch.maximum: ("maximum.default",),
    torch.minimum: ("minimum.default",),
    torch.erf: ("erf.default",),
    torch.pow: ("pow.Tensor_Scalar",),
    torch.exp: ("exp.default",),
    torch.abs: ("abs.default",),
    torch.neg: ("neg.default",),
    torch.sqrt: ("sqrt.default",),
    torch.square: ("square.default",),
    F.relu6: ("relu6.default",),
    F.hardtanh: ("hardtanh.default",),
    F.hardswish: ("hardswish.default",),
    F.hardsigmoid: ("hardsigmoid.default",),
    F.silu: ("silu.default",),
    F.gelu: ("gelu.default",),
    F.mish: ("mish.default",),
    F.leaky_relu: ("leaky_relu.default",),
    F.softplus: ("softplus.default",),
    torch.flatten: ("flatten.using_ints",),
    torch.reshape: ("view.default", "reshape.default", "_unsafe_view.default"),
    torch.squeeze: ("squeeze.default", "squeeze.dim", "squeeze.dims"),
    torch.unsqueeze: ("unsqueeze.default",),
    torch.clone: ("clone.default",),
    torch.cat: ("cat.default",),
    torch.stack: ("stack.default",),
    torch.chunk: ("chunk.default",),
    torch.split: ("split.Tensor", "split_with_sizes.default"),
    torch.unbind: ("unbind.int",),
    torch.select: ("select.int",),
    torch.narrow: ("narrow.default",),
    torch.flip: ("flip.default",),
    torch.roll: ("roll.default",),
    torch.channel_shuffle: ("channel_shuffle.default",),
    F.pixel_shuffle: ("pixel_shuffle.default",),
    F.pixel_unshuffle: ("pixel_unshuffle.default",),
    F.dropout: ("dropout.default",),
    F.pad: ("pad.default",),
    torch.mean: ("mean.default", "mean.dim"),
    F.adaptive_avg_pool1d: ("adaptive_avg_pool1d.default",),
    F.adaptive_avg_pool2d: ("adaptive_avg_pool2d.default",),
    F.adaptive_avg_pool3d: ("adaptive_avg_pool3d.default",),
    F.avg_pool1d: ("avg_pool1d.default",),
    F.avg_pool2d: ("avg_pool2d.default",),
    F.avg_pool3d: ("avg_pool3d.default",),
    F.max_pool1d: ("max_pool1d.default",),
    F.max_pool2d: ("max_pool2d.default",),
    F.max_pool3d: ("max_pool3d.default",),
}
"""Functions that take an operator's operands as they are, and those operators."""

_IN_PLACE: dict[Callable[..., Any], str] = {
    F.hardtanh: "hardtanh_",
    F.hardswish: "hardswish_",
    F.hardsigmoid: "hardsigmoid_",
    F.silu: "silu_",
    F.mish: "mish_",
    F.leaky_relu: "leaky_relu_",
    F.relu6: "relu6_",
    F.dropout: "dropout_",
}
"""Functions whose keyword says that they write into their operand."""

_METHODS = (
    "add_.Tensor",
    "sub_.Tensor",
    "mul_.Tensor",
    "div_.Tensor",
    "clamp_.default",
    "sigmoid_.default",
    "tanh_.default",
)
_METHODS_TOO = ("contiguous.default", "expand.default", "repeat.default")


def _overload(name: str) -> Any:
    """Return an overload of ATen's by its name, None where this torch has no such one."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(_ATEN, packet, None), overload or "default", None)


_FUNCTIONS = {_overload(name): function for function, names in _SAME.items() for name in names}
_WRITING = {_overload(name): function for function, name in _IN_PLACE.items()}
_NAMED = {_overload(name): name.partition(".")[0] for name in (*_METHODS, *_METHODS_TOO)}
_RESIZES = {
    _overload(f"upsample_{mode}{rank}d.vec"): mode.replace("_exact", "-exact").lstrip("_")
    for mode, ranks in {"nearest": (1, 2, 3), "linear": (1,), "bilinear": (2,), "trilinear": (3,)}.items()
    for rank in ranks
}


def lift_value(root: nn.Module, node: fx.Node, operands: dict[str, Any]) -> None:
    """Replace a call of an ATen operator on values by torch's, if it has one. operands: by the schema's names."""
    target = node.target
    if target in _FUNCTIONS:
        node.target = _FUNCTIONS[target]
    elif target in _WRITING:
        node.target, node.kwargs = _WRITING[target], {**node.kwargs, "inplace": True}
    elif target in _NAMED:
        node.op, node.target = "call_method", _NAMED[target]
    elif target in _RESIZES:
        size, factors = operands["output_size"], operands["scale_factors"]
        corners = {"align_corners": operands["align_corners"]} if "align_corners" in operands else {}
        node.kwargs = {"size": size, "scale_factor": factors, "mode": _RESIZES[target], **corners}
        node.target, node.args = F.interpolate, (operands["input"],)
    elif target is _ATEN.elu.default and operands["scale"] == operands["input_scale"] == 1:
        node.target, node.args, node.kwargs = F.elu, (operands["self"], operands["alpha"]), {}
    elif target is _ATEN.constant_pad_nd.default:
        node.target, node.kwargs = F.pad, {"mode": "constant", "value": operands["value"]}
        node.args = (operands["self"], operands["pad"])
    elif target is _ATEN.rsub.Scalar and operands["alpha"] == 1:
        node.target, node.args, node.kwargs = operator.sub, (operands["other"], operands["self"]), {}
    elif target is _ATEN.slice.Tensor:
        _as_index(node, operands)
    elif target is _ATEN.batch_norm.default:
        _as_norm(root, node, operands)
    elif target is _ATEN._native_batch_norm_legit_no_training.default:
        _as_norm_of_three(root, node, operands)


def _as_index(node: fx.Node, operands: dict[str, Any]) -> None:
    if isinstance(operands["dim"], int) and operands["dim"] >= 0:
        part = slice(operands["start"], operands["end"], operands["step"])
        node.target, node.kwargs = operator.getitem, {}
        node.args = (operands["self"], (slice(None),) * operands["dim"] + (part,))


def _as_norm(root: nn.Module, node: fx.Node, operands: dict[str, Any]) -> None:
    """Replace an operator by the module of torch whose tensors it reads, else by F.batch_norm."""
    names = ("running_mean", "running_var", "weight", "bias")
    settings = {"training": False, "momentum": operands["momentum"], "eps": operands["eps"]}
    if all(operands[name] is not None for name in names[:2]):
        node.target, node.args = F.batch_norm, (operands["input"], *(operands[name] for name in names))
        node.kwargs = settings
        shape = getattr(operands["input"].meta.get("val"), "shape", ())
        restore_norm(root, node.graph, node, len(shape))


def _as_norm_of_three(root: nn.Module, node: fx.Node, operands: dict[str, Any]) -> None:
    """Replace a decomposed normalization, of whose three results only the first is read."""
    parts = list(node.users)
    if all(part.target is operator.getitem and (part.args[1] == 0 or not part.users) for part in parts):
        _as_norm(root, node, operands)
        for part in parts:
            part.replace_all_uses_with(node)
            node.graph.erase_node(part)
