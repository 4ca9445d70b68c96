"""Rounding with GPTQ: each weight makes up for the rounding errors of those before it.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323. What a weight W does to its inputs x is kept, not W itself: with H = Σ x xᵀ over some data, the
integers are chosen so that the error of the products, tr (W - Ŵ) H (W - Ŵ)ᵀ, is small. docs/numerics.md, "GPTQ error".
"""

from __future__ import annotations

import torch

from fxquant.numerics import (
    FLOAT32_TINY,
    RANGE_SHARES,
    QuantizedTensor,
    choose_qparams,
    dequantize,
    quantize_with,
    weight_range,
)
from fxquant.spec import TensorSpec

DAMPING = 0.01
"""The part of H's mean that is added to its diagonal, as in the paper: to invert H, and to trust little data less."""

SWEEPS = 2
"""How often scales and integers are chosen again, each given all the others."""

_ROWS_AT_ONCE = 4096


def round_with_gptq(weight: torch.Tensor, hessian: torch.Tensor, spec: TensorSpec) -> QuantizedTensor:
    """Return a weight in integers whose products with inputs of this Hessian are close to the float ones.

    weight: (N, ...) floating point; hessian: H = Σ x xᵀ, (K, K), of the inputs x that it is multiplied with, K numbers
    each; spec: symmetric, one scale a group or an output channel. In each output channel, the error (w - ŵ) H (w - ŵ)ᵀ
    is never more than that of rounding to nearest, and far less where inputs are correlated. Channels are independent
    of one another; a column whose input was always 0 is rounded to nearest.
    """
    size = spec.group_size or weight[0].numel()
    factor = _inverse_factor(hessian).to(weight.device)
    rows = torch.split(weight.detach().flatten(1), _ROWS_AT_ONCE)
    parts = [_round_rows(part.float().contiguous(), hessian, factor, spec, size) for part in rows]
    values, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    if spec.group_size is None:
        values, scale = values.view(weight.shape), scale.squeeze(1)
    return QuantizedTensor(spec.format, values, scale, None, weight.shape[-1], spec.group_size or 0)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor U of the inverse of the damped H, (K, K) float32: H⁻¹ = Uᵀ U.

    Row i of U, divided by U_ii, says how the columns after i compensate an error in column i; 1 / U_ii² is the weight
    of that error once it is compensated.
    """
    h = hessian.detach().to(torch.float64)
    scale = h.diagonal().mean()
    h = h / scale if scale > 0 else h  # in units of the mean: tiny or huge inputs neither vanish nor overflow
    one, damping, failed = torch.eye(len(h), dtype=h.dtype, device=h.device), DAMPING / 10, True
    while failed:  # H is positive semidefinite up to float rounding, so once is mostly enough
        damping *= 10
        lower, failed = torch.linalg.cholesky_ex(h + damping * one)
    upper: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper.to(torch.float32)


def _round_rows(
    weight: torch.Tensor, hessian: torch.Tensor, factor: torch.Tensor, spec: TensorSpec, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed values and scales of some output channels, each rounded by GPTQ or, where better, to nearest."""
    plain_scale, zeros = choose_qparams(*weight_range(weight, spec), spec)
    plain = quantize_with(weight, plain_scale, zeros, spec)
    plain_scale = plain_scale.view(len(weight), -1)
    adjusted, scale = _feed(weight, factor, spec, size)
    # The columns as they were at their turn: they round to the integers that were chosen then.
    values = quantize_with(adjusted, _shaped(scale, spec), zeros, spec)
    values, scale = _refine(weight, values, scale, hessian, spec, size)
    better = _error(weight, values, scale, hessian, spec) < _error(weight, plain, plain_scale, hessian, spec)
    return torch.where(better, values, plain), torch.where(better, scale, plain_scale)


def _feed(weight: torch.Tensor, factor: torch.Tensor, spec: TensorSpec, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each column with the errors of those before it compensated, as it is to be rounded, and the scales."""
    w = weight.t().clone(memory_format=torch.contiguous_format)  # a column is a run of memory; written to
    scales = []
    for start in range(0, len(w), size):
        group, later = slice(start, start + size), slice(start + size, None)
        block, upper = w[group], factor[group, group]
        scale = _search_scale(block, upper.diagonal(), spec)
        real, inverse = scale.to(torch.float32), 1.0 / scale.to(torch.float32)
        errors = torch.empty_like(block)
        for i, column in enumerate(block):
            rounded = (column * inverse).round_().clamp_(spec.qmin, spec.qmax).mul_(real)
            torch.sub(column, rounded, out=errors[i]).div_(upper[i, i])
            block[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
        w[later].addmm_(factor[group, later].t(), errors, alpha=-1)
        scales.append(scale)
    return w.t(), torch.stack(scales, 1)


def _refine(
    weight: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, spec: TensorSpec, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed values and scales whose error by the damped H is less, by coordinate descent.

    With everything else fixed, the error is a parabola in one scale or weight; each is set to its minimum in turn.
    Behdin et al. 2023, "QuantEase", arXiv:2309.01885.
    """
    mean = hessian.diagonal().mean()
    h = hessian.to(torch.float32) / torch.where(mean > 0, mean, 1.0)
    h.diagonal().add_(DAMPING)
    q = spec.format.unpack(values, weight.shape[1]).to(torch.float32).t().contiguous()
    scales = scale.to(torch.float32).t().contiguous()
    off = weight.t() - q * scales.repeat_interleave(size, 0)[: len(q)]
    for group, part in SWEEPS * list(enumerate(torch.split(q, size))):
        first = group * size
        at = slice(first, first + len(part))
        product = h[:, at] @ part
        step = (product * off).sum(0) / (product[at] * part).sum(0)
        fitted = (scales[group] + step).to(scale.dtype).to(torch.float32)
        fitted = torch.where(fitted.abs() >= FLOAT32_TINY, fitted, scales[group])  # not where all integers are 0
        off[at] -= part * (fitted - scales[group])
        scales[group] = fitted
        for k, integer in enumerate(part, first):
            better = (integer + h[k] @ off / (h[k, k] * fitted)).round_().clamp_(spec.qmin, spec.qmax)
            off[k] -= (better - integer) * fitted
            integer.copy_(better)
    return spec.format.pack(q.t()).to(spec.format.storage), scales.t().to(spec.format.scale)


def _shaped(scale: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return scales, (N, groups), as weights of the spec have them."""
    return scale if spec.group_size is not None else scale.squeeze(1)


def _search_scale(block: torch.Tensor, diagonal: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return each channel's scale for a group, (N,): among shares of its range, the one with the least error.

    block: the group's columns, (G, N); diagonal: their U_ii. An error counts 1 / U_ii², as it does once compensated.
    """
    low, high = block.amin(0).clamp(max=0), block.amax(0).clamp(min=0)
    weight = diagonal.square().reciprocal().unsqueeze(1)
    scales = torch.stack([choose_qparams(low * share, high * share, spec)[0] for share in RANGE_SHARES])
    errors = torch.empty(scales.shape, device=block.device)
    for scale, error in zip(scales.to(torch.float32), errors, strict=True):
        off = (block * (1.0 / scale)).round_().clamp_(spec.qmin, spec.qmax).mul_(scale).sub_(block)
        torch.sum(off.square_().mul_(weight), 0, out=error)
    best: torch.Tensor = scales.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)
    return best


def _error(
    weight: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, spec: TensorSpec
) -> torch.Tensor:
    """Return each output channel's (w - ŵ) H (w - ŵ)ᵀ, (N, 1)."""
    size, shaped = spec.group_size or 0, _shaped(scale, spec)
    off = weight - dequantize(QuantizedTensor(spec.format, values, shaped, None, weight.shape[1], size))
    return (off @ hessian.to(off.dtype)).mul_(off).sum(1, keepdim=True)
