"""Linear, LinearReLU, F.linear and its other spellings: weights of any format, activations quantized at each call."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from fxquant import ops
from fxquant.nn import DynamicQuantizedLinear, DynamicQuantizedLinearReLU, LinearReLU, linear_relu
from fxquant.nn.base import Quantize
from fxquant.nn.trained_product import train_product
from fxquant.operators.base import (
    PRODUCTS,
    Call,
    NewCall,
    Operator,
    refuse_parameters,
)
from fxquant.operators.linear_forms import LINEAR_FORMS, refuse_bias
from fxquant.qconfig import QConfig


def _refuse(module: nn.Linear) -> str | None:
    if "weight" not in module._parameters:
        return "its weight is recomputed at each call (weight_norm or the like); remove that first"
    return refuse_parameters(module)


def _convert_module(module: nn.Linear, qconfig: QConfig, quantize: Quantize) -> nn.Module:
    quantized_type = DynamicQuantizedLinearReLU if isinstance(module, LinearReLU) else DynamicQuantizedLinear
    return quantized_type.from_float(module, qconfig, quantize)


def refuse_linear(operands: dict[str, Any]) -> str | None:
    """Return why a call of F.linear must stay float, or None."""
    if len(operands["weight"].shape) != 2:
        return f"its weight is {len(operands['weight'].shape)}-D, not 2-D"
    return refuse_bias(operands.get("bias"), operands["weight"].shape[0])


def _convert_function(call: Call) -> NewCall:
    name, group_size, in_features = call.qconfig.layout(call.weights["weight"].shape[1])
    operands: dict[str, Any] = {
        "x": call.operands["input"],
        "weight": call.operands["weight"],
        "scale": call.operands["weight_scale"],
        "bias": call.operands.get("bias"),
        "relu": call.function is linear_relu,
        "per_token": call.qconfig.per_token,
        "qmax": call.qconfig.qmax,
        "format": name,
        "group_size": group_size,
        "in_features": in_features,
    }
    return NewCall(ops.linear, operands)


LINEAR = Operator(
    name="linear",
    summary="x @ weight.T + bias, and the same followed by a ReLU",
    modules=(nn.Linear, LinearReLU),
    functions=(F.linear, linear_relu),
    operands=("input", "weight", "bias"),
    calls=LINEAR_FORMS,
    weights=("weight",),
    schemes=PRODUCTS,
    convert_module=_convert_module,
    convert_function=_convert_function,
    train_module=train_product,
    refuse_module=_refuse,
    refuse_call=refuse_linear,
)
