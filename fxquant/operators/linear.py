"""Linear, LinearReLU and F.linear: weights of any format, activations quantized at each call."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from fxquant import ops
from fxquant.nn import DynamicQuantizedLinear, DynamicQuantizedLinearReLU, LinearReLU, linear_relu
from fxquant.nn.base import Quantize
from fxquant.operators.base import (
    PRODUCTS,
    Call,
    NewCall,
    Operator,
    refuse_parameters,
)
from fxquant.qconfig import QConfig


def _refuse(module: nn.Linear) -> str | None:
    if "weight" not in module._parameters:
        return "its weight is recomputed at each call (weight_norm or the like); remove that first"
    return refuse_parameters(module)


def _convert_module(module: nn.Linear, qconfig: QConfig, quantize: Quantize) -> nn.Module:
    quantized_type = DynamicQuantizedLinearReLU if isinstance(module, LinearReLU) else DynamicQuantizedLinear
    return quantized_type.from_float(module, qconfig, quantize)


def refuse_bias(bias: Any, outputs: int) -> str | None:
    """Return why a call's bias, by its example's shape, cannot be added in the kernel, or None."""
    shape = tuple(getattr(bias, "shape", ()))  # a number, in torch's older addmm(beta, input, mat1, mat2=…), has none
    if bias is None or shape == (outputs,):
        return None
    return f"what it adds has shape {shape}, not a bias's ({outputs},)"


def _refuse_call(operands: dict[str, Any]) -> str | None:
    if len(operands["weight"].shape) != 2:
        return f"its weight is {len(operands['weight'].shape)}-D, not 2-D"
    return refuse_bias(operands.get("bias"), operands["weight"].shape[0])


def convert_linear(call: Call, x: str = "input", bias: str = "bias") -> NewCall:
    """Return the quantized x @ weight.T + bias for a call whose input and bias have these names."""
    (weight,) = call.weights
    name, group_size, in_features = call.qconfig.layout(call.weights[weight].shape[1])
    operands: dict[str, Any] = {
        "x": call.operands[x],
        "weight": call.operands[weight],
        "scale": call.operands[f"{weight}_scale"],
        "bias": call.operands.get(bias),
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
    weights=("weight",),
    schemes=PRODUCTS,
    convert_module=_convert_module,
    convert_function=convert_linear,
    refuse_module=_refuse,
    refuse_call=_refuse_call,
)
