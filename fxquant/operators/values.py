"""What stands between products: functions of values without weights, and how each goes on with integers.

KEEPS: integers pass untouched, under the scale of the operand, which all operands share, as in PADS, POOLS and RESIZES,
which give no value outside their operand's range. LOOKS_UP: a function of single
values becomes a table of 256. Others have an operator of ours, and a scale of their own.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

Kind = Callable[..., Any] | str


Arguments = dict[str, Any]


class Form(enum.Enum):
    """How a function of values goes on with integers."""

    PRODUCT = "a site of the operator table"
    KEEPS = "integers pass as they are"
    PADS = "padded with the zero point"
    POOLS = "fxquant.ops.max_pool_value"
    RESIZES = "repeated, or fxquant.ops.resize_value"
    LOOKS_UP = "a table of 256"
    ADDS = "fxquant.ops.add_values"
    MULTIPLIES = "fxquant.ops.mul_values"
    AVERAGES = "fxquant.ops.mean_value"


MOVING = (Form.KEEPS, Form.PADS, Form.POOLS, Form.RESIZES)
"""Those whose result has its operand's scale, and is not observed."""


@dataclass(frozen=True, kw_only=True)
class ValueOperator:
    """One family of functions of values.

    modules, functions: as in an Operator; methods by name. form: how they run. takes: whether one has an integer form
    by its arguments beside the value. channels: how many tables it needs, one each; 0: one for all of the value.
    is_pair: whether it takes two values, and has a form only where both come from one.
    """

    name: str
    form: Form
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Kind, ...] = ()
    takes: Callable[[Arguments], bool] = lambda _: True
    channels: Callable[[Arguments], int] = lambda _: 0
    is_pair: bool = False


PASSES: tuple[Kind, ...] = (nn.Identity, "detach")
"""Those that give their operand as it is, memory format and all."""


def takes_pad(given: Arguments) -> bool:
    """Return whether padding adds zeros, or values that are there."""
    return given.get("mode", "constant") != "constant" or given.get("value") in (None, 0, 0.0)


def takes_pool(given: Arguments) -> bool:
    """Return whether a max pooling gives values alone."""
    return not given.get("return_indices", False)


NEAREST = ("nearest", "nearest-exact")


def takes_resize(given: Arguments) -> bool:
    """Return whether an interpolation repeats values, or gives linear means of neighbours: none outside their range."""
    if given.get("mode", "nearest") in NEAREST:
        return True
    factors = given.get("scale_factor")
    is_known = factors is None or all(isinstance(part, (int, float)) for part in pytree.tree_leaves(factors))
    is_plain = not given.get("antialias") and not given.get("recompute_scale_factor")
    return given["mode"] in ("linear", "bilinear", "trilinear") and is_known and is_plain


MOVES = ValueOperator(
    name="moves",
    form=Form.KEEPS,
    modules=(
        *(nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *(nn.AlphaDropout, nn.FeatureAlphaDropout, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    ),
    functions=(
        *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.movedim),
        *(torch.swapaxes, torch.chunk, torch.split, torch.unbind, torch.cat, torch.concat, torch.stack, torch.roll),
        *(torch.flip, torch.narrow, torch.select, torch.tile, operator.getitem, torch.t, torch.broadcast_to),
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.pixel_shuffle, F.pixel_unshuffle, torch.channel_shuffle),
        *(torch.unflatten, torch.clone, torch.index_select),
        *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "movedim", "swapaxes", "chunk"),
        *("split", "unbind", "contiguous", "expand", "repeat", "roll", "flip", "narrow", "select", "t", "clone"),
        *("index_select", "unflatten", "detach", "view_as", "reshape_as", "expand_as"),
    ),
)
PADS = ValueOperator(
    name="pad",
    form=Form.PADS,
    modules=(
        *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
        *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d),
        *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    ),
    functions=(F.pad,),
    takes=takes_pad,
)
MAX_POOLS = ValueOperator(
    name="max pool",
    form=Form.POOLS,
    modules=(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    functions=(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    takes=takes_pool,
)
ENLARGES = ValueOperator(
    name="interpolation",
    form=Form.RESIZES,
    modules=(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    functions=(F.interpolate, F.upsample),
    takes=takes_resize,
)
CURVES = ValueOperator(
    name="curve",
    form=Form.LOOKS_UP,
    modules=(
        *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.ELU, nn.SELU, nn.CELU),
        *(
            nn.Mish,
            nn.LeakyReLU,
            nn.Sigmoid,
            nn.Tanh,
            nn.Softplus,
            nn.Softsign,
            nn.Hardshrink,
            nn.LogSigmoid,
            nn.Tanhshrink,
        ),
    ),
    functions=(
        *(F.relu, torch.relu, torch.relu_, F.relu6, F.hardtanh, F.hardtanh_, F.hardswish, F.hardsigmoid, F.silu),
        *(F.gelu, F.elu, F.elu_, F.selu, F.selu_, F.celu, F.celu_, F.mish, F.leaky_relu, F.leaky_relu_, F.softplus),
        *(torch.selu, torch.celu, F.sigmoid, F.tanh, torch.sigmoid, torch.sigmoid_, torch.tanh, torch.tanh_),
        *(F.softsign, F.logsigmoid, torch.clamp, torch.clamp_, torch.clip, torch.clamp_min, torch.clamp_max),
        *(torch.exp, torch.abs, torch.neg, operator.neg, torch.square, torch.sqrt, torch.log1p, torch.erf, torch.pow),
        *(operator.pow, "relu", "relu_", "clamp", "clamp_", "clip", "clamp_min", "clamp_min_", "clamp_max"),
        *("clamp_max_", "sigmoid", "sigmoid_", "tanh", "tanh_", "abs", "neg", "square", "sqrt", "exp", "erf", "pow"),
    ),
    takes=lambda given: isinstance(given.get("exponent", 1), (int, float)),
)
EXTREMES = ValueOperator(
    name="extreme",
    form=Form.LOOKS_UP,
    functions=(torch.maximum, torch.minimum, torch.max, torch.min, torch.fmax, torch.fmin, "maximum", "minimum"),
    is_pair=True,
)
PRELU = ValueOperator(
    name="PReLU",
    form=Form.LOOKS_UP,
    modules=(nn.PReLU,),
    channels=lambda given: 0 if given["num_parameters"] == 1 else int(given["num_parameters"]),
)
NORMS = ValueOperator(
    name="BatchNorm",
    form=Form.LOOKS_UP,
    modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    takes=lambda given: given["track_running_stats"] and not given["training"],
    channels=lambda given: int(given["num_features"]),
)
ADDS = ValueOperator(
    name="add",
    form=Form.ADDS,
    functions=(operator.add, operator.iadd, operator.sub, torch.add, torch.sub, "add", "add_", "sub", "sub_"),
)
MULTIPLIES = ValueOperator(
    name="mul",
    form=Form.MULTIPLIES,
    functions=(
        *(operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.mul, torch.multiply, torch.div),
        *(torch.true_divide, "mul", "mul_", "multiply", "div", "div_", "true_divide"),
    ),
)
AVERAGES = ValueOperator(
    name="average",
    form=Form.AVERAGES,
    modules=(
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveAvgPool3d,
        nn.AvgPool1d,
        nn.AvgPool2d,
        nn.AvgPool3d,
    ),
    functions=(
        *(torch.mean, "mean", F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
        *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    ),
)

VALUE_OPERATORS = (MOVES, PADS, MAX_POOLS, ENLARGES, CURVES, EXTREMES, PRELU, NORMS, ADDS, MULTIPLIES, AVERAGES)
"""The table."""


def find_value_operator(kind: Any) -> ValueOperator | None:
    """Return the operator of a module type, function or method's name, None where it has no integer form."""
    return next((row for row in VALUE_OPERATORS if kind in row.modules or kind in row.functions), None)


_NAMES: dict[Any, tuple[str, ...]] = {
    F.pad: ("pad", "mode", "value"),
    F.interpolate: (*("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),),
    F.upsample: ("size", "scale_factor", "mode", "align_corners"),
    **dict.fromkeys((torch.pow, operator.pow, "pow"), ("exponent",)),
    **dict.fromkeys((torch.mean, "mean"), ("dim", "keepdim", "dtype")),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), ("output_size",)),
    **dict.fromkeys(
        (F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
        ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    ),
    **dict.fromkeys(
        (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
}
_OF_MODULES = (
    *("padding", "value", "mode", "size", "output_size", "kernel_size", "stride", "dilation", "ceil_mode"),
    *("return_indices", "count_include_pad", "divisor_override", "num_parameters"),
    *("num_features", "track_running_stats", "training", "scale_factor", "align_corners", "recompute_scale_factor"),
)


def arguments_of(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module | None) -> Arguments:
    """Return the arguments of a function of values, or the attributes of its module, beside the value, by name."""
    if module is not None:
        return {name: getattr(module, name) for name in _OF_MODULES if hasattr(module, name)}
    return {**dict(zip(_NAMES.get(kind, ()), args[1:], strict=False)), **kwargs}
