"""Conv1d and Conv2d without groups, large enough: a Linear of windows. Other convolutions stay float.

A window is quantized anew at each of its positions, and the output laid out as a convolution's: what that takes is won
back where the product is large. docs/performance.md has what was measured.
"""

from __future__ import annotations

from torch import nn

from fxquant.nn import ConvReLU1d, ConvReLU2d, DynamicQuantizedConv, DynamicQuantizedConvReLU
from fxquant.nn.base import Quantize
from fxquant.operators.base import INT8_DYNAMIC, Operator, refuse_parameters, refuse_weight
from fxquant.qconfig import QConfig

LEAST_WEIGHTS = 256 * 256
LEAST_OUTPUTS = 64
"""The weights and output channels from which convolutions gained, or came out level, in each measurement."""

_TAKEN = f"they have {LEAST_OUTPUTS} or more output channels, {LEAST_WEIGHTS:,} or more weights and no groups"


def _refuse(module: nn.Conv1d | nn.Conv2d) -> str | None:
    if "weight" not in module._parameters:
        return "its weight is recomputed at each call (weight_norm or the like); remove that first"
    if module.groups == 1 and module.out_channels >= LEAST_OUTPUTS and module.weight.numel() >= LEAST_WEIGHTS:
        return refuse_weight(module.weight.flatten(1)) or refuse_parameters(module)
    kernel = "×".join(map(str, module.kernel_size))
    return (
        f"convolutions stay float under a dynamic qconfig unless {_TAKEN}: this is {module.in_channels} → "
        f"{module.out_channels} channels, kernel {kernel}" + (f", {module.groups} groups" * (module.groups > 1))
    )


def _convert(module: nn.Module, qconfig: QConfig, quantize: Quantize) -> nn.Module:
    is_fused = isinstance(module, (ConvReLU1d, ConvReLU2d))
    kind = DynamicQuantizedConvReLU if is_fused else DynamicQuantizedConv
    return kind.from_float(module, qconfig, quantize)


CONVOLUTION = Operator(
    name="convolution",
    summary=(
        "nn.Conv1d and nn.Conv2d of any kernel, stride, padding and dilation, and the same followed by a ReLU, where "
        f"{_TAKEN}; others are faster in float"
    ),
    modules=(nn.Conv1d, nn.Conv2d, ConvReLU1d, ConvReLU2d),
    has_rows=False,
    schemes=(INT8_DYNAMIC,),
    convert_module=_convert,
    refuse_module=_refuse,
)
