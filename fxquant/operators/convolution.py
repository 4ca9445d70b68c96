"""Pointwise Conv1d and Conv2d: a Linear over the channels. Other convolutions stay float.

As integers, a wider kernel is a product with the unfolded input, of which some shapes gain and many lose;
docs/performance.md has what was measured of both.
"""

from __future__ import annotations

from torch import nn
from torch.utils import _pytree as pytree

from fxquant.nn import (
    ConvReLU1d,
    ConvReLU2d,
    DynamicQuantizedPointwiseConv,
    DynamicQuantizedPointwiseConvReLU,
)
from fxquant.nn.base import Quantize
from fxquant.operators.base import INT8_DYNAMIC, Operator, refuse_parameters, refuse_weight
from fxquant.qconfig import QConfig

LEAST_WEIGHTS = 512 * 512
"""The weights from which a pointwise convolution gained in each measurement; below, transposing takes what it gains."""

_OTHERWISE = {"stride": 1, "padding": 0, "groups": 1}
"""What a pointwise convolution has beside its kernel; a dilation of kernel 1 does nothing."""


def _refuse(module: nn.Conv1d | nn.Conv2d) -> str | None:
    if "weight" not in module._parameters:
        return "its weight is recomputed at each call (weight_norm or the like); remove that first"
    if _is_pointwise(module) and module.weight.numel() >= LEAST_WEIGHTS:
        return refuse_weight(module.weight.flatten(1)) or refuse_parameters(module)
    kernel = "×".join(map(str, module.kernel_size))
    return (
        f"convolutions stay float under a dynamic qconfig unless they are pointwise, of {LEAST_WEIGHTS:,} weights or "
        f"more: this is {module.in_channels} → {module.out_channels} channels, kernel {kernel}"
        + "".join(f", {name} {getattr(module, name)}" for name in _OTHERWISE if not _is_plain(module, name))
    )


def _is_pointwise(module: nn.Conv1d | nn.Conv2d) -> bool:
    """Return whether each output position is a product of one input position alone."""
    return all(size == 1 for size in module.kernel_size) and all(_is_plain(module, name) for name in _OTHERWISE)


def _is_plain(module: nn.Conv1d | nn.Conv2d, name: str) -> bool:
    """Return whether a convolution has an option as a pointwise one has it; kernel 1 is not padded to the "same"."""
    given = getattr(module, name)
    return given in ("valid", "same") or all(part == _OTHERWISE[name] for part in pytree.tree_leaves(given))


def _convert(module: nn.Module, qconfig: QConfig, quantize: Quantize) -> nn.Module:
    is_fused = isinstance(module, (ConvReLU1d, ConvReLU2d))
    kind = DynamicQuantizedPointwiseConvReLU if is_fused else DynamicQuantizedPointwiseConv
    return kind.from_float(module, qconfig, quantize)


CONVOLUTION = Operator(
    name="convolution",
    summary=(
        f"pointwise nn.Conv1d and nn.Conv2d (kernel 1) of {LEAST_WEIGHTS:,} weights and more, and the same followed by "
        "a ReLU: a position is a row; smaller ones, wider kernels, strides and groups stay float, where they are faster"
    ),
    modules=(nn.Conv1d, nn.Conv2d, ConvReLU1d, ConvReLU2d),
    has_rows=False,
    schemes=(INT8_DYNAMIC,),
    convert_module=_convert,
    refuse_module=_refuse,
)
