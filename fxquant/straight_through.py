"""Rounding that gradients pass: what a model in training does where its quantized form will round.

The straight-through estimator (Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons")
takes the rounding's derivative as 1; clipped, as in Jacob et al. 2018, as 0 for what lies beyond the range. Forward
gives the bits of dequantize(quantize(x)) in `numerics`, so that the quantized model rounds to the same integers.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fxquant.formats import Format
from fxquant.numerics import quantize_tokens, quantize_tokens_int16, spread
from fxquant.spec import TensorSpec


def fake_quantize_value(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmax: int) -> torch.Tensor:
    """Return dequantize_value(quantize_value(x)) in x's dtype; the gradient passes where x is in the range.

    x: float, of any shape; scale: () float32; zero_point: () int32. NaN stays NaN.
    """
    if torch.compiler.is_compiling():
        return _traced_value(x, scale, zero_point, qmax)
    if x.is_cpu:
        return fake_quantize_numbers(x, scale.item(), (1.0 / scale).item(), int(zero_point), qmax)
    y: torch.Tensor = _OnDevice.apply(x, scale, zero_point, qmax)  # type: ignore[no-untyped-call]
    return y


def fake_quantize_numbers(
    x: torch.Tensor, scale: float, inverse: float, zero_point: int, qmax: int, rectifies: bool = False
) -> torch.Tensor:
    """Return `fake_quantize_value` of a CPU tensor, whose kernels take numbers four times faster than tensors.

    rectifies: whether relu(x) is meant, which the clamp does too if zero_point is 0: so a pass is saved each way.
    """
    if rectifies and zero_point != 0:
        x, rectifies = x.relu(), False
    low = 0.0 if rectifies else (-0.5 - zero_point) * scale
    bounds = (low, (qmax + 0.5 - zero_point) * scale)
    y: torch.Tensor = _Value.apply(x, scale, inverse, zero_point, qmax, bounds)  # type: ignore[no-untyped-call]
    return y


def fake_quantize_tokens(x: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return x, each token rounded as it will be at each call, in x's dtype. Nothing is clipped: all gradients pass.

    x: (..., K) float; spec: of a dynamic activation of integers.
    """
    return with_gradient(_rounded_tokens(x.detach(), spec), x)


def fake_quantize_weight(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: TensorSpec, clips: bool = True
) -> torch.Tensor:
    """Return the numbers that a weight's integers under these qparams stand for; the gradient passes in the range.

    weight: (N, ...) float32; scale, zero_point: as `choose_qparams` gives them. clips: whether values may lie beyond
    the range.
    """
    size, real = spec.group_size or 0, weight.detach().to(torch.float32)
    wide = spread(scale.to(torch.float32), real.shape, size)
    q = real * (1.0 / wide)
    if not spec.symmetric:
        q = q.add_(spread(zero_point, real.shape, size))
    q = q.round_()
    passing = None
    if clips:
        passing = (q >= spec.qmin) & (q <= spec.qmax)
        q = q.clamp_(spec.qmin, spec.qmax)
    if not spec.symmetric:
        q = q.sub_(spread(zero_point, real.shape, size))
    return with_gradient(q.mul_(wide).to(weight.dtype), weight, passing)


def fake_store(weight: torch.Tensor, weight_format: Format) -> torch.Tensor:
    """Return the numbers of a weight in a format of floats, float16; all gradients pass."""
    largest, real = torch.finfo(weight_format.storage).max, weight.detach()
    return with_gradient(real.clamp(-largest, largest).to(weight_format.storage).to(weight.dtype), weight)


def with_gradient(rounded: torch.Tensor, x: torch.Tensor, passing: torch.Tensor | None = None) -> torch.Tensor:
    """Return rounded values whose gradient is that of x. passing: where; None: everywhere."""
    if torch.compiler.is_compiling():
        zero = x - x.detach()  # exactly: the result has the rounded values' bits
        return rounded + (zero if passing is None else torch.where(passing, zero, 0.0))
    y: torch.Tensor = _Passing.apply(rounded, x, passing)  # type: ignore[no-untyped-call]
    return y


def _rounded_tokens(x: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(torch.float32)
    per_token = spec.axis == "token"
    if spec.symmetric:
        q, scale = quantize_tokens_int16(rows, per_token)
    else:
        q, scale, zero_point = quantize_tokens(rows, spec.qmax, per_token)
        q = q - zero_point
    return (q * scale).to(x.dtype).view(x.shape)


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rounded: torch.Tensor, _: torch.Tensor, passing: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(passing)
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (passing,) = ctx.saved_tensors
        return None, grad if passing is None else torch.where(passing, grad, 0.0), None


class _Value(torch.autograd.Function):
    """One pass, and no mask: backward compares with the bounds."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: float, inverse: float, zero: int, qmax: int, bounds: tuple[float, float]
    ) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[0] else None)
        ctx.bounds = bounds
        return (x.to(torch.float32) * inverse).round_().clamp_(-zero, qmax - zero).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, x, *ctx.bounds), None, None, None, None, None


class _OnDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmax: int) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[0] else None, scale, zero_point)
        ctx.qmax = qmax
        q = (x.to(torch.float32) * (1.0 / scale)).round_().clamp_(-zero_point, qmax - zero_point)
        return q.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        low, high = _reach(scale, zero_point, ctx.qmax)
        return torch.where((x > low) & (x < high), grad, 0.0), None, None, None


def _reach(scale: torch.Tensor, zero_point: torch.Tensor, qmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what rounds to an integer below 0, and to one above qmax."""
    return (-0.5 - zero_point) * scale, (qmax + 0.5 - zero_point) * scale


def _traced_value(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmax: int) -> torch.Tensor:
    """Return the same from plain operators, which torch.compile makes one loop of."""
    real, (low, high) = x.detach().to(torch.float32), _reach(scale, zero_point, qmax)
    rounded = (real * (1.0 / scale)).round().clamp(-zero_point, qmax - zero_point) * scale
    return with_gradient(rounded.to(x.dtype), x, (real > low) & (real < high))


def learned_value(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmax: int) -> torch.Tensor:
    """Return `fake_quantize_value`, whose scale has a gradient too, that of Esser et al. 2020.

    scale: () float32. Its gradient is divided by √(N qmax) for the N numbers that x has for each of its first index.
    What lies beyond the range is told by its integer, half a step farther out than in the paper: the largest weight is
    qmax steps to begin with, and float rounding would decide whether it learns.
    """
    share = 1 / math.sqrt(max(1, x[0].numel() if x.dim() else 1) * qmax)
    y: torch.Tensor = _Learned.apply(x, scale, zero_point, (0, qmax), share, x.dim() * (1,))  # type: ignore[no-untyped-call]
    return y


def learned_weight(weight: torch.Tensor, scale: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return `fake_quantize_weight` of a symmetric spec, whose scale has a gradient too.

    scale: (N,), or (N, groups) that the format stores in fewer bits, or (1,): its gradient is divided by √(K qmax) for
    the K weights that share one.
    """
    stored, size = scale.to(spec.format.scale).to(torch.float32), spec.group_size or 0
    if size:
        stored = (stored - scale).detach() + scale  # rounding the scale passes its gradient
        spreadable = spread(stored, weight.shape, size)
    else:
        spreadable = stored.expand(len(weight)).view(-1, *[1] * (weight.dim() - 1))
    share = 1 / math.sqrt(max(1, weight.numel() // scale.numel()) * max(spec.qmax, 1))
    zero, bounds = torch.zeros((), dtype=torch.int32, device=weight.device), (spec.qmin, spec.qmax)
    y: torch.Tensor = _Learned.apply(weight, spreadable, zero, bounds, share, spreadable.shape)  # type: ignore[no-untyped-call]
    return y


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        bounds: tuple[int, int],
        share: float,
        shape: tuple[int, ...],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.bounds, ctx.share, ctx.shape = bounds, share, shape
        low, high = bounds
        q = (x.to(torch.float32) * (1.0 / scale)).round_().clamp_(low - zero_point, high - zero_point)
        return q.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        low, high = (bound - zero_point for bound in ctx.bounds)
        real = x.to(torch.float32) * (1.0 / scale)
        q = real.round()
        passing = (q >= low) & (q <= high)
        change = q.clamp_(low, high) - torch.where(passing, real, 0.0)
        to_scale = (grad.to(torch.float32) * change).sum_to_size(ctx.shape).reshape(scale.shape) * ctx.share
        return torch.where(passing, grad, 0.0), to_scale, None, None, None, None
