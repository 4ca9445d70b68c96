"""Triton's quantization of activations, token by token: what the products of `triton_linear` multiply.

A token is measured and written by one program: its integers, in the form that the product takes, its scale and what
is added to its integers. docs/numerics.md, "Activations"; the references are in `numerics`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fxquant.ops.triton_common import EXACT, LARGEST, TINY, clamped, power_of_two, rounded

SHIFTED, CENTRED, SPLIT, WIDE = range(4)
"""Forms of integers: q - 128 as int8, and after the tokens a row of ones; q - zero_point as float16; these with the
even columns before the odd ones, which begin at half of the stride; int16.
"""

_DTYPES = (torch.int8, torch.float16, torch.float16, torch.int16)
_MOST_AT_ONCE = 8192  # of a token's values: more are read twice
_ALIGNED = 16  # rows of integers begin at multiples of so many


class Tokens(NamedTuple):
    """Quantized activations: integers, (M or M + 1, stride); scale and offset: 2 M float32, one after the other."""

    integers: torch.Tensor
    qparams: torch.Tensor
    stride: int


@triton.jit
def affine_qparams(low, high, half_steps, qmax):
    """Return (scale, 1 / scale, zero point) of what spans [low, high], 0 included: scalars, no NaN."""
    low = tl.minimum(tl.maximum(low, -LARGEST), 0.0)
    high = tl.maximum(tl.minimum(high, LARGEST), 0.0)
    scale = tl.div_rn(high * 0.5 - low * 0.5, half_steps)
    scale = tl.where(scale < TINY, 1.0, scale)
    inverse = tl.div_rn(1.0, scale)
    return scale, inverse, clamped(rounded(low * -inverse), 0.0, qmax)


@triton.jit
def wide_qparams(low, high, qmax):
    """Return (scale, 1 / scale) of int16 activations that span [low, high]: scalars, no NaN."""
    scale = tl.div_rn(tl.minimum(tl.maximum(-low, high), LARGEST), qmax)
    scale = tl.where(scale < TINY, 1.0, scale)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def to_integers(x, inverse, zero_point, least, most):
    """Return x as integers under qparams, in float32; NaN gives 0."""
    real = x * inverse
    q = tl.minimum(tl.maximum(rounded(real) + zero_point, least), most)
    return tl.where(real == real, q, 0.0)


@triton.jit
def _stored(q, zero_point, FORM: tl.constexpr):
    if FORM == 0:
        stored = (q - 128.0).to(tl.int8)
    elif FORM < 3:
        stored = (q - zero_point).to(tl.float16)
    else:
        stored = q.to(tl.int32).to(tl.int16)
    return stored


@triton.jit
def token_range(x, columns, BLOCK: tl.constexpr):
    """Return the least and the greatest value of a token, NaN left out, and whether it has a NaN."""
    at = tl.arange(0, BLOCK)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    first = tl.load(x)  # a value of the token, in place of those beyond its end
    for start in range(0, columns, BLOCK):
        value = tl.load(x + start + at, mask=start + at < columns, other=first).to(tl.float32)
        bad |= (value != value).to(tl.int32)
        low = tl.minimum(low, tl.where(value == value, value, low))
        high = tl.maximum(high, tl.where(value == value, value, high))
    return tl.min(low, 0), tl.max(high, 0), tl.max(bad, 0)


@triton.jit
def tokens_kernel(
    x, x_stride, low, high, q, qparams, rows, columns, stride, half_steps, qmax,
    FORM: tl.constexpr, MEASURED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a token. MEASURED: low and high, of all tokens, are given. Of FORM 0, program `rows` writes the ones."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    q += row.to(tl.int64) * stride
    if row == rows:
        for start in range(0, columns, BLOCK):
            tl.store(q + start + at, tl.full((BLOCK,), 1, tl.int8), mask=start + at < columns)
    else:
        x += row.to(tl.int64) * x_stride
        if MEASURED:
            least, most = tl.load(low), tl.load(high)
            bad = (least != least).to(tl.int32)
        else:
            least, most, bad = token_range(x, columns, BLOCK)
        least, most = tl.where(bad == 0, least, 0.0), tl.where(bad == 0, most, 0.0)
        if FORM == 3:
            scale, inverse = wide_qparams(least, most, qmax)
            zero_point, bottom = 0.0, -qmax
        else:
            scale, inverse, zero_point = affine_qparams(least, most, half_steps, qmax)
            bottom = 0.0
        inverse = tl.where(bad == 0, inverse, float("nan"))
        tl.store(qparams + row, tl.where(bad == 0, scale, float("nan")))
        tl.store(qparams + rows + row, 128.0 - zero_point)
        for start in range(0, columns, BLOCK):
            value = tl.load(x + start + at, mask=start + at < columns, other=0.0).to(tl.float32)
            integers = to_integers(value, inverse, zero_point, bottom, qmax)
            place = (start + at) // 2 + (at % 2) * (stride // 2) if FORM == 2 else start + at
            tl.store(q + place, _stored(integers, zero_point, FORM), mask=start + at < columns)


def quantize(rows: torch.Tensor, form: int, qmax: int, per_token: bool) -> Tokens:
    """Return the tokens of (M, K) floats whose columns are dense; M, K > 0. qmax: 32767 for WIDE."""
    count, columns = rows.shape
    stride = -(-columns // _ALIGNED) * _ALIGNED
    programs = count + (form == SHIFTED)
    integers = torch.empty((programs, stride), dtype=_DTYPES[form], device=rows.device)
    qparams = torch.empty(2 * count, dtype=torch.float32, device=rows.device)
    low, high = (rows, rows) if per_token else torch.aminmax(rows.to(torch.float32))
    block = min(power_of_two(columns), _MOST_AT_ONCE)
    args = (low, high, integers, qparams, count, columns, stride, qmax * 0.5, float(qmax))
    meta: dict[str, Any] = {"FORM": form, "MEASURED": not per_token, "BLOCK": block}
    tokens_kernel[(programs,)](rows, rows.stride(0), *args, **meta, num_warps=4 if block <= 4096 else 8, **EXACT)
    return Tokens(integers, qparams, stride)
