"""The gradient of the linear operator: straight through its dequantized weight, to its input and its bias.

y = Q(x) Wᵀ + b, with Q the rounding of x and W what the integers stand for: dy/dx is taken as W, as if Q were not there
(Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons"); where a ReLU is fused, 0 where y
is. The integers and their scales have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from fxquant.errors import ModelStateError
from fxquant.numerics import QuantizedTensor, dequantize_weight
from fxquant.ops.schema import LIBRARY


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep what the gradient needs: the integers, which the model holds anyway, and a fused ReLU's output."""
    x, weight, scale, bias, relu, _, _, group_size, _ = inputs
    ctx.save_for_backward(weight, scale, output if relu else None)
    ctx.columns, ctx.group_size, ctx.bias_dtype = x.shape[-1], group_size, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, (..., I), and of the bias, (O,), in their dtypes."""
    weight, scale, output = ctx.saved_tensors
    needs_x, *needs_weight, needs_bias = (*ctx.needs_input_grad, *[False] * 4)[:4]  # defaults are left out
    if any(needs_weight):
        raise ModelStateError(
            "a gradient came back to the weight of a quantized linear: integers and their scales do not train. Train "
            "adapters beside it, to which gradients pass, or train the float model and quantize it afterwards"
        )
    if output is not None:
        grad = torch.where(output > 0, grad, 0.0)
    to_x = to_bias = None
    if needs_x:
        real = dequantize_weight(QuantizedTensor(weight, scale, None), 8, ctx.columns, ctx.group_size or None)
        wide = torch.promote_types(grad.dtype, torch.float32)
        to_x = (grad.to(wide) @ real.to(wide)).to(grad.dtype)
    if needs_bias:
        to_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        to_bias = to_bias.to(ctx.bias_dtype)
    return to_x, None, None, to_bias, None, None, None, None, None


def register() -> None:
    """Register the gradient, once the operator is defined."""
    torch.library.register_autograd("fxquant::linear", _backward, setup_context=_setup, lib=LIBRARY)
