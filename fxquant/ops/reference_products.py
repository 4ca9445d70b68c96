"""Products of two activations and attention in plain torch, for any device: the specification.

Its kernels: csrc/kernels/generic/products-inl.h.

torch's own products order their sums by the batch and by where a tensor lies in memory. Here each sum goes through the
depth in order, of single operations on one element each, so an element depends on its row and its column alone. The
kernels go through it in the same order by fused multiply-adds, and agree to float rounding. docs/numerics.md,
"ordered sum".
"""

from __future__ import annotations

import math

import torch

from fxquant.ops.schema import broadcast, lay_out

_LANES = 16
_LEAST = -87.0  # below it exp is 0 here: above it the result is a normal float32
_SERIES = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b with torch.matmul's shapes, in a's dtype.

    The arithmetic is float64 for operands of that, else float32.
    """
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    rows, columns = (a.unsqueeze(0) if a.dim() == 1 else a).to(dtype), (b.unsqueeze(1) if b.dim() == 1 else b).to(dtype)
    outer = broadcast("product", rows.shape[:-2], columns.shape[:-2])
    sums = rows.new_zeros(*outer, rows.shape[-2], columns.shape[-1])
    for k in range(rows.shape[-1]):
        sums += rows[..., k : k + 1] * columns[..., k : k + 1, :]
    sums = sums.squeeze(-1) if b.dim() == 1 else sums
    return (sums.squeeze(-1 if b.dim() == 1 else -2) if a.dim() == 1 else sums).to(a.dtype)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Return softmax(scale query keyᵀ + mask) value, as torch's scaled_dot_product_attention does.

    query: (..., L, E); key: (..., S, E); value: (..., S, O) float; mask: what expands to (..., L, S), True where a key
    is seen, or what is added to its score; is_causal: query i sees keys 0 to i; scale: 1/√E unless given
    -> (..., L, O) in query's dtype. A query that sees no key gets zeros. The arithmetic is float32.
    """
    (q, k, v, added), outer = spread_heads(query, key, value, mask)
    assert q is not None
    assert k is not None
    assert v is not None
    scores = matmul(q, k.transpose(-2, -1)) * scale_of(query, scale)
    if added is not None:
        scores = scores + added
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    weights, sums = _exponentials(scores)
    out = matmul(weights, v) * torch.where(sums == 0, 0.0, 1.0 / sums)
    return lay_out(query, key, value, mask, out.view(*outer, query.shape[-2], value.shape[-1]))


def scale_of(query: torch.Tensor, scale: float | None) -> float:
    """Return what attention's scores are multiplied with."""
    return 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)


def spread_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[list[torch.Tensor | None], tuple[int, ...]]:
    """Return query, key, value (B, H, L, E) and mask, which expands to (B, H, L, S) and is added, as float32.

    And the dimensions before the last two, of which B and H are made.
    """
    outer = broadcast("attention", *(x.shape[:-2] for x in (query, key, value)))
    heads = (math.prod(outer[:-1]), outer[-1] if outer else 1)
    parts: list[torch.Tensor | None] = [
        x.expand(*outer, *x.shape[-2:]).reshape(*heads, *x.shape[-2:]).to(torch.float32) for x in (query, key, value)
    ]
    if mask is not None:
        added = mask
        if mask.dtype == torch.bool:
            added = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
        if mask.dim() > 2 and len(outer) != 2:
            added = added.expand(*outer, *mask.shape[-2:]).reshape(*heads, *mask.shape[-2:])
        return [*parts, added.to(torch.float32)], outer
    return [*parts, None], outer


def _exponentials(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return exp(scores - their greatest) and their sums over the last dimension, with that dimension kept.

    Sixteen sums side by side, of the keys k, k + 16, k + 32, …, then lanes two apart of each four, and so on: zeros at
    the end, as of keys that a mask keeps out, change nothing.
    """
    keys = scores.shape[-1]
    if keys == 0:
        return scores, scores.new_zeros(*scores.shape[:-1], 1)
    known = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    most = known.amax(-1, keepdim=True)
    values = _exp_of_negative(scores - torch.where(most == -torch.inf, 0.0, most))
    padded = torch.nn.functional.pad(values, (0, -keys % _LANES))
    padded = padded.view(*scores.shape[:-1], -(-keys // _LANES), _LANES)
    lanes = torch.zeros_like(padded[..., 0, :])
    for k in range(padded.shape[-2]):
        lanes += padded[..., k, :]
    fours = _sum_four(lanes.view(*lanes.shape[:-1], 4, 4))
    return values, _sum_four(fours).unsqueeze(-1)


def _sum_four(x: torch.Tensor) -> torch.Tensor:
    """Return the sums of the last dimension, of four, in the order of csrc/kernels/generic/floats-inl.h."""
    return (x[..., 0] + x[..., 2]) + (x[..., 1] + x[..., 3])


def _exp_of_negative(x: torch.Tensor) -> torch.Tensor:
    """Return exp(x) for x ≤ 0, and 0 below -87, by the reduction and the series of `reference.expm1_`."""
    clamped = x.clamp(min=_LEAST)
    n = (clamped * 1.4426950408889634).round_()
    r = clamped.sub_(n * 0.693359375).sub_(n * -2.1219444e-4)
    p = r * _SERIES[0]
    for coefficient in _SERIES[1:]:
        p.add_(coefficient)
        if coefficient != _SERIES[-1]:
            p.mul_(r)
    p.mul_(r * r).add_(r)
    power = n.nan_to_num_(nan=0.0).to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)
    return torch.where(x < _LEAST, 0.0, p.mul_(power).add_(power))
