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
LEAST_POINTWISE = 256
"""The output channels and weights from which convolutions gained, or came out level, in each measurement. The others:
those of kernel 1, at which float is best, and which need many channels on both sides; and those dilated along the
width, whose windows must be copied.
"""

_TAKEN = (
    f"they have {LEAST_OUTPUTS} or more output channels, no groups, and {LEAST_WEIGHTS:,} or more weights, or "
    f"{LEAST_OF_OTHERS:,} where they are dilated or pointwise, these with {LEAST_POINTWISE} or more channels in and out"
)


def _which_stay(module: nn.Conv1d | nn.Conv2d) -> str | None:
    """Return which convolutions stay float, this one among them; None where it gains."""
    kind, least = "convolutions", LEAST_WEIGHTS
    if module.groups > 1:
        return f"{kind} in groups"
    if module.kernel_size.count(1) == len(module.kernel_size):
        kind, least = "pointwise convolutions", LEAST_OF_OTHERS
        if min(module.in_channels, module.out_channels) < LEAST_POINTWISE:
            return f"{kind} of fewer than {LEAST_POINTWISE} channels in or out"
    elif module.dilation[-1] > 1:
        kind, least = "dilated convolutions", LEAST_OF_OTHERS
    if module.out_channels < LEAST_OUTPUTS:
        return f"{kind} of fewer than {LEAST_OUTPUTS} output channels"
    return f"{kind} of fewer than {least:,} weights" if module.weight.numel() < least else None


def _refuse(module: nn.Conv1d | nn.Conv2d) -> str | None:
    if "weight" not in module._parameters:
        return "its weight is recomputed at each call (weight_norm or the like); remove that first"
    which = _which_stay(module)
    if which is None:
        return refuse_weight(module.weight.flatten(1)) or refuse_parameters(module)
    kernel = "×".join(map(str, module.kernel_size))
    told = f"{module.in_channels} → {module.out_channels} channels, kernel {kernel}"
    return f"{which} stay float, where they are faster: this is {told}"


def _convert(module: nn.Module, qconfig: QConfig, quantize: Quantize) -> nn.Module:
    is_fused = isinstance(module, (ConvReLU1d, ConvReLU2d))
    kind = DynamicQuantizedConvReLU if is_fused else DynamicQuantizedConv
    return kind.from_float(module, qconfig, quantize)


CONVOLUTION = Operator(
    name="convolution",
    summary=(
        "nn.Conv1d and nn.Conv2d of any kernel, stride, padding and dilation, and the same followed by a ReLU, where "
        f"{_TAKEN}; others stay float, where they are faster"
    ),
    modules=(nn.Conv1d, nn.Conv2d, ConvReLU1d, ConvReLU2d),
    has_rows=False,
    schemes=(INT8_DYNAMIC,),
    convert_module=_convert,
    refuse_module=_refuse,
)
