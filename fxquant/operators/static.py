"""The static products: Linear and convolutions whose inputs are integers found by calibration."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.nn import ConvReLU1d, ConvReLU2d, LinearReLU
from fxquant.nn.base import Quantize
from fxquant.nn.fused import ConvReLU3d, linear_relu
from fxquant.nn.static import StaticQuantizedConv, StaticQuantizedLinear
from fxquant.nn.trained_product import train_product
from fxquant.operators.base import INT8_STATIC, Operator, refuse_parameters, refuse_weight
from fxquant.operators.linear import refuse_linear
from fxquant.operators.linear_forms import LINEAR_FORMS, refuse_bias
from fxquant.qconfig import QConfig


def _refuse(module: Any) -> str | None:
    if "weight" not in module._parameters:
        return "its weight is recomputed at each call (weight_norm or the like); remove that first"
    return refuse_weight(module.weight.flatten(1)) or refuse_parameters(module)


def _convert_linear(module: nn.Linear, qconfig: QConfig, quantize: Quantize) -> nn.Module:
    return StaticQuantizedLinear.from_float(module, qconfig, quantize)


def _convert_convolution(module: Any, qconfig: QConfig, quantize: Quantize) -> nn.Module:
    return StaticQuantizedConv.from_float(module, qconfig, quantize)


def _linear_of(function: Any, operands: dict[str, Any]) -> nn.Module:
    """Return the Linear that a call is. operands: the weight as (O, I)."""
    weight, bias = operands["weight"], operands.get("bias")
    outputs, inputs = weight.shape
    kind = LinearReLU if function is linear_relu else nn.Linear
    return _with_constants(kind(inputs, outputs, bias is not None, device="meta"), weight, bias)


_RANKS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _convolution_of(function: Any, operands: dict[str, Any]) -> nn.Module:
    """Return the convolution that a call is."""
    weight, bias = operands["weight"], operands.get("bias")
    rank, groups = _RANKS[function], operands.get("groups", 1)
    options = {name: _each(operands.get(name, default), rank) for name, default in _WINDOWS.items()}
    sizes = weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:])
    kind: Any = _CONVOLUTIONS[rank]
    made = kind(*sizes, **options, groups=groups, bias=bias is not None, device="meta")
    return _with_constants(made, weight, bias)


_WINDOWS = {"stride": 1, "padding": 0, "dilation": 1}


def _each(size: Any, rank: int) -> Any:
    if isinstance(size, (list, tuple)):
        return tuple(size) * (rank if len(size) == 1 else 1)
    return size


def _with_constants(module: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    module.weight = nn.Parameter(weight.detach(), False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), False)
    evaluated: nn.Module = module.eval()
    return evaluated


def _refuse_convolution(operands: dict[str, Any]) -> str | None:
    options = (operands.get("groups", 1), *(operands.get(name) for name in _WINDOWS))
    if any(hasattr(part, "shape") for part in options):
        return "its stride, padding, dilation or groups are computed"
    if len(operands["input"].shape) != len(operands["weight"].shape):
        return "its input has no dimension for the batch"
    return refuse_bias(operands.get("bias"), operands["weight"].shape[0])


STATIC_LINEAR = Operator(
    name="static linear",
    summary="x @ weight.T + bias of calibrated values, with what follows: an addition, a ReLU or another clamp",
    modules=(nn.Linear, LinearReLU),
    functions=(F.linear, linear_relu),
    operands=("input", "weight", "bias"),
    calls=LINEAR_FORMS,
    weights=("weight",),
    schemes=(INT8_STATIC,),
    is_static=True,
    convert_module=_convert_linear,
    stand_in=_linear_of,
    refuse_call=refuse_linear,
    train_module=train_product,
    refuse_module=_refuse,
)

STATIC_CONVOLUTION = Operator(
    name="static convolution",
    summary="convolutions and transposed ones of calibrated values, with what follows, as static linear",
    modules=(
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, ConvReLU1d, ConvReLU2d, ConvReLU3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    ),
    functions=(F.conv1d, F.conv2d, F.conv3d),
    operands=("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    weights=("weight",),
    has_rows=False,
    schemes=(INT8_STATIC,),
    is_static=True,
    stand_in=_convolution_of,
    refuse_call=_refuse_convolution,
    convert_module=_convert_convolution,
    train_module=train_product,
    refuse_module=_refuse,
)
