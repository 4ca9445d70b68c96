"""The static products: Linear and convolutions whose inputs are integers found by calibration."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxquant.nn import ConvReLU1d, ConvReLU2d, LinearReLU
from fxquant.nn.base import Quantize
from fxquant.nn.fused import ConvReLU3d
from fxquant.nn.static import StaticQuantizedConv, StaticQuantizedLinear
from fxquant.operators.base import INT8_STATIC, Operator, refuse_parameters, refuse_weight
from fxquant.qconfig import QConfig


def _refuse(module: Any) -> str | None:
    if "weight" not in module._parameters:
        return "its weight is recomputed at each call (weight_norm or the like); remove that first"
    if getattr(module, "transposed", False) and module.groups > 1:
        return "a transposed convolution in groups has no static form"
    return refuse_weight(module.weight.flatten(1)) or refuse_parameters(module)


def _convert_linear(module: nn.Linear, qconfig: QConfig, quantize: Quantize) -> nn.Module:
    return StaticQuantizedLinear.from_float(module, qconfig, quantize)


def _convert_convolution(module: Any, qconfig: QConfig, quantize: Quantize) -> nn.Module:
    return StaticQuantizedConv.from_float(module, qconfig, quantize)


STATIC_LINEAR = Operator(
    name="static linear",
    summary="x @ weight.T + bias of calibrated values, with what follows: an addition, a ReLU or another clamp",
    modules=(nn.Linear, LinearReLU),
    schemes=(INT8_STATIC,),
    is_static=True,
    convert_module=_convert_linear,
    refuse_module=_refuse,
)

STATIC_CONVOLUTION = Operator(
    name="static convolution",
    summary="convolutions and transposed ones of calibrated values, with what follows, as static linear",
    modules=(
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, ConvReLU1d, ConvReLU2d, ConvReLU3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    ),
    has_rows=False,
    schemes=(INT8_STATIC,),
    is_static=True,
    convert_module=_convert_convolution,
    refuse_module=_refuse,
)
