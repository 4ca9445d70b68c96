"""Conv1d and Conv2d without groups, large enough: a Linear of windows. Other convolutions stay float.

A window is quantized anew at each of its positions, and the output is laid out as a convolution's. That pays only where
the product is large: docs/performance.md has the measurements.
"""

from __future__ import annotations

from torch import nn

from fxquant.nn import ConvReLU1d, ConvReLU2d, DynamicQuantizedConv, DynamicQuantizedConvReLU
from fxquant.nn.base import Quantize
from fxquant.nn.trained_product import train_product
from fxquant.operators.base import INT8_DYNAMIC, Operator, refuse_parameters, refuse_weight
from fxquant.qconfig import QConfig

LEAST_OUTPUTS = 64
LEAST_WEIGHTS, LEAST_OF_OTHERS = 256 * 256, 512 * 512
LEAST_POINTWISE = 256
"""The output channels and weights from which convolutions were faster than float, or as fast, in each measurement. The
other limits are for kernels of 1, where float is best and many channels are needed on both sides, and for dilation
along the width, where windows must be copied.
"""

_TAKEN = (
    f"they have {LEAST_OUTPUTS} or more output channels, no groups, and {LEAST_WEIGHTS:,} or more weights, or "
    f"{LEAST_OF_OTHERS:,} where they are dilated or pointwise, these with {LEAST_POINTWISE} or more channels in and out"
)


def _which_stay(module: nn.Conv1d | nn.Conv2d) -> str | None:
    """Return which convolutions stay float if this is one of them, else None."""
    which, least = "convolutions", LEAST_WEIGHTS
    if module.groups > 1:
        return f"{which} in groups"
    if module.kernel_size.count(1) == len(module.kernel_size):
        which, least = "pointwise convolutions", LEAST_OF_OTHERS
        if min(module.in_channels, module.out_channels) < LEAST_POINTWISE:
            return f"{which} of fewer than {LEAST_POINTWISE} channels in or out"
    elif module.dilation[-1] > 1:
        which, least = "dilated convolutions", LEAST_OF_OTHERS
    if module.out_channels < LEAST_OUTPUTS:
        return f"{which} of fewer than {LEAST_OUTPUTS} output channels"
    return f"{which} of fewer than {least:,} weights" if module.weight.numel() < least else None


def _refuse(module: nn.Conv1d | nn.Conv2d) -> str | None:
    if "weight" not in module._parameters:
        return "its weight is recomputed at each call (weight_norm or the like); remove that first"
    which = _which_stay(module)
    if which is None:
        return refuse_weight(module.weight.flatten(1)) or refuse_parameters(module)
    kernel = "×".join(map(str, module.kernel_size))
    shape = f"{module.in_channels} → {module.out_channels} channels, kernel {kernel}"
    return f"{which} stay float, where they are faster: this is {shape}"


def _convert(module: nn.Module, qconfig: QConfig, quantize: Quantize) -> nn.Module:
    is_fused = isinstance(module, (ConvReLU1d, ConvReLU2d))
    quantized_type = DynamicQuantizedConvReLU if is_fused else DynamicQuantizedConv
    return quantized_type.from_float(module, qconfig, quantize)


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
    train_module=train_product,
)
