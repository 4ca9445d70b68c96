"""The operator attention: softmax(scale query keyᵀ + mask) value, in a fixed order of sums: see `products`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fxquant.errors import DTypeError, ShapeError
from fxquant.ops.elementwise import exp_of_negative
from fxquant.ops.library import bare
from fxquant.ops.products import broadcast, gradients, matmul
from fxquant.ops.register import Gradient, Kernel

_LANES = 16


class AttentionArguments(NamedTuple):
    """Return softmax(scale query keyᵀ + mask) value, as torch's scaled_dot_product_attention does.

    query: (..., L, E); key: (..., S, E); value: (..., S, O) float; mask: expands to (..., L, S), True where a key is
    seen, or a float that is added to its score; is_causal: query i sees keys 0 to i; scale: 1/√E unless given -> (...,
    L, O) in query's dtype. A query that sees no key gets zeros. The arithmetic is float32.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    is_causal: bool = False
    scale: float | None = None


def _reference(a: AttentionArguments) -> torch.Tensor:
    heads = _spread_heads(a)
    scores = matmul(heads.query, heads.key.transpose(-2, -1)) * scale_of(a.query, a.scale)
    if heads.mask is not None:
        scores = scores + heads.mask
    if a.is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    weights, sums = _exponentials(scores)
    out = matmul(weights, heads.value) * torch.where(sums == 0, 0.0, 1.0 / sums)
    return lay_out(*a[:4], out.view(_shape(a)))


def scale_of(query: torch.Tensor, scale: float | None) -> float:
    """Return the factor of attention's scores."""
    return 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)


def _spread_heads(a: AttentionArguments) -> AttentionArguments:
    """Return query, key, value as (B, H, L, E) float32, and a mask that expands to (B, H, L, S) and is added."""
    outer = broadcast("attention", *(x.shape[:-2] for x in a[:3]))
    heads = (math.prod(outer[:-1]), outer[-1] if outer else 1)
    query, key, value = (
        x.expand(*outer, *x.shape[-2:]).reshape(*heads, *x.shape[-2:]).to(torch.float32) for x in a[:3]
    )
    added = a.mask
    if added is not None:
        if added.dtype == torch.bool:
            added = torch.zeros_like(added, dtype=torch.float32).masked_fill(~added, -torch.inf)
        if added.dim() > 2 and len(outer) != 2:
            added = added.expand(*outer, *added.shape[-2:]).reshape(*heads, *added.shape[-2:])
        added = added.to(torch.float32)
    return a._replace(query=query, key=key, value=value, mask=added)


def _exponentials(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return exp(scores - their greatest) and their sums over the last dimension, with that dimension kept.

    Sixteen sums side by side, of the keys k, k + 16, k + 32, …, then lanes two apart of each four, and so on: zeros at
    the end, as masked keys give, change nothing.
    """
    keys = scores.shape[-1]
    if keys == 0:
        return scores, scores.new_zeros(*scores.shape[:-1], 1)
    known = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    most = known.amax(-1, keepdim=True)
    values = exp_of_negative(scores - torch.where(most == -torch.inf, 0.0, most))
    padded = F.pad(values, (0, -keys % _LANES))
    padded = padded.view(*scores.shape[:-1], -(-keys // _LANES), _LANES)
    lanes = torch.zeros_like(padded[..., 0, :])
    for k in range(padded.shape[-2]):
        lanes += padded[..., k, :]
    fours = _sum_four(lanes.view(*lanes.shape[:-1], 4, 4))
    return values, _sum_four(fours).unsqueeze(-1)


def _sum_four(x: torch.Tensor) -> torch.Tensor:
    """Return the sums of the last dimension, of four, in the order of csrc/kernels/generic/floats-inl.h."""
    return (x[..., 0] + x[..., 2]) + (x[..., 1] + x[..., 3])


def _shape(a: AttentionArguments) -> tuple[int, ...]:
    """Return the shape of attention's output, or raise ShapeError or DTypeError."""
    operands, mask = a[:3], a.mask
    if not a.query.is_floating_point() or len({x.dtype for x in operands}) > 1:
        raise DTypeError(f"attention takes floats of one dtype, got {', '.join(str(x.dtype) for x in operands)}")
    query, key, value = shapes = [tuple(x.shape) for x in operands]
    if min(map(len, shapes)) < 2 or query[-1] != key[-1] or key[-2] != value[-2]:
        raise ShapeError(
            "attention takes query (..., L, E), key (..., S, E) and value (..., S, O), "
            f"got {', '.join(map(str, shapes))}"
        )
    outer = broadcast("attention", *(shape[:-2] for shape in shapes))
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise DTypeError(f"an attention mask is bool or floating point, got {mask.dtype}; call mask.bool()")
        scores = (*outer, query[-2], key[-2])
        if broadcast("attention and its mask", scores, mask.shape) != scores:
            raise ShapeError(f"attention's mask must expand to {scores}, got {tuple(mask.shape)}")
    return (*outer, query[-2], value[-1])


def _is_laid_out_as_query(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> bool:
    """Return whether torch's attention on the CPU gives its result the query's strides: where its fused kernel runs.

    Elsewhere it writes the products out and the result is contiguous. The conditions are those of torch's
    aten/src/ATen/native/transformers/sdp_utils_cpp.cpp.
    """
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    q, k, v = query.shape, key.shape, value.shape
    return (
        q[0] == k[0] == v[0]
        and q[1] == k[1] == v[1]
        and q[3] == v[3]
        and q[2] > 0
        and k[2] > 0
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and (mask is None or (mask.dim() in (2, 4) and not mask.requires_grad))
    )


def lay_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, attended: torch.Tensor
) -> torch.Tensor:
    """Return attended, (..., L, O), in query's dtype and with torch's strides, which a later view() depends on. A copy,
    unless it has both already.
    """
    if not _is_laid_out_as_query(query, key, value, mask):
        return attended.to(query.dtype).reshape(-1).view(attended.shape)  # sizes of 1 get torch's strides too
    if attended.dtype == query.dtype and attended.stride() == query.stride():
        return attended
    return torch.empty_like(query).copy_(attended)


def _fake(a: AttentionArguments) -> torch.Tensor:
    shape = _shape(a)
    return torch.empty_like(a.query) if _is_laid_out_as_query(*a[:4]) else a.query.new_empty(shape)


def _prepare(a: AttentionArguments) -> AttentionArguments:
    heads = _spread_heads(a)
    query, key, value = (bare(x) for x in heads[:3])
    mask = None if heads.mask is None else bare(heads.mask)
    return AttentionArguments(query, key, value, mask, a.is_causal, scale_of(a.query, a.scale))


def _finish(out: torch.Tensor, a: AttentionArguments) -> torch.Tensor:
    return lay_out(*a[:4], out.transpose(1, 2).view(_shape(a)))


def _run_at_once(native: Callable[..., Any], args: tuple[Any, ...]) -> torch.Tensor | None:
    """Return the native kernel's result for operands as they lie, (B, H, …), or None."""
    query, key, value, mask, is_causal, scale = args
    if query.dim() != 4:
        return None
    out: torch.Tensor | None = native(True, query, key, value, mask, is_causal, scale_of(query, scale))
    return None if out is None else lay_out(query, key, value, mask, out.transpose(1, 2))


def _keep(ctx: Any, a: AttentionArguments, _: torch.Tensor) -> None:
    ctx.save_for_backward(*a[:4])
    ctx.is_causal, ctx.scale = a.is_causal, a.scale


def _give(ctx: Any, gradient: torch.Tensor, needs: dict[str, bool]) -> dict[str, torch.Tensor | None]:
    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if is_again:  # torch's fused kernel has no gradient of its gradient
            math_alone = torch.ops.aten._scaled_dot_product_attention_math
            out: torch.Tensor = math_alone(query, key, value, mask, 0.0, ctx.is_causal, None, scale=ctx.scale)[0]
            return out
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=ctx.is_causal, scale=ctx.scale)

    is_again = torch.is_grad_enabled()
    return gradients(ctx, gradient, needs, attend)


_ATTENTION = Kernel(
    name="attention",
    schema="(Tensor query, Tensor key, Tensor value, Tensor? mask=None, bool is_causal=False,"
    " float? scale=None) -> Tensor",
    arguments=AttentionArguments,
    reference=_reference,
    check=_shape,
    fake=_fake,
    prepare=_prepare,
    finish=_finish,
    gradient=Gradient(_keep, _give),
    at_once=_run_at_once,
)
_ATTENTION.register()
