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

LEAST_OUTPUTS = 64
LEAST_WEIGHTS, LEAST_OF_OTHERS = 256 * 256, 512 * 512
"""The output channels and weights from which convolutions gained, or came out level, in each measurement. The others:
those of kernel 1, at which float is best, and those dilated along the width, whose windows must be copied.
"""

_TAKEN = (
    f"they have {LEAST_OUTPUTS} or more output channels, no groups, and {LEAST_WEIGHTS:,} or more weights, or "
    f"{LEAST_OF_OTHERS:,} where they are pointwise or dilated"
)


def _refuse(module: nn.Conv1d | nn.Conv2d) -> str | None:
    if "weight" not in module._parameters:
        return "its weight is recomputed at each call (weight_norm or the like); remove that first"
    is_pointwise, is_dilated = module.kernel_size.count(1) == len(module.kernel_size), module.dilation[-1] > 1
    least = LEAST_OF_OTHERS if is_pointwise or is_dilated else LEAST_WEIGHTS
    if module.groups == 1 and module.out_channels >= LEAST_OUTPUTS and module.weight.numel() >= least:
        return refuse_weight(module.weight.flatten(1)) or refuse_parameters(module)
    told = f"{module.in_channels} → {module.out_channels} channels, kernel {'×'.join(map(str, module.kernel_size))}"
    told += f", dilation {module.dilation[-1]}" if is_dilated else ""
    told += f", {module.groups} groups" if module.groups > 1 else ""
    return f"convolutions stay float under a dynamic qconfig unless {_TAKEN}: this is {told}"


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
