"""Triton's kernels of linear: integer products, exact in any order, and their ending in single float32 operations.

Two launches: `triton_tokens` writes the integers of x, a product multiplies them; a single token takes one
(`triton_gemv`). What a format's product is:

    int8          q - 128 by the weight on int8 tensor cores. The last of a tile's rows is a row of ones, so that the
                  product itself gives the sums of the weight's rows; (128 - zero_point) times these is added
    int4, int3    q - zero_point by the weight on float16 tensor cores, group by group: sums of products of whole
                  numbers are exact there below 2**24
    int16         four such products, of the upper and lower halves of both factors, in steps of 128 columns or less

The results of a group are added up in the order of the groups, as in the reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from fxquant.formats import INT16_MAX
from fxquant.ops import triton_gemv, triton_tokens
from fxquant.ops.triton_common import EXACT, blocks, halves
from fxquant.ops.triton_tokens import CENTRED, SHIFTED, SPLIT, WIDE
from fxquant.ops.triton_tuning import Shape, tuned

_SIDE_BY_SIDE = tl.constexpr(
    8
)  # tiles of tokens that are computed side by side, so that they find weights in the L2 cache


@triton.jit
def tile_of(rows, outputs, TOKENS: tl.constexpr, BN: tl.constexpr):
    """Return which tile of tokens and which of outputs a program computes."""
    pid = tl.program_id(0)
    tall, wide = tl.cdiv(rows, TOKENS), tl.cdiv(outputs, BN)
    first = pid // (_SIDE_BY_SIDE * wide) * _SIDE_BY_SIDE
    height = tl.minimum(tall - first, _SIDE_BY_SIDE)
    inner = pid % (_SIDE_BY_SIDE * wide)
    return first + inner % height, inner // height


@triton.jit
def _store(y, sums, at, n, rows, outputs, keep, RELU: tl.constexpr):
    """Write results, rows `at` by outputs `n`; keep: which rows are tokens of this tile."""
    if RELU:
        sums = tl.where(sums < 0, 0.0, sums)  # NaN and -0 stay, as with torch.relu_
    places = at.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(y + places, sums, mask=(keep & (at < rows))[:, None] & (n < outputs)[None, :])


@triton.jit
def _started(bias, n, outputs, BM: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Return what is there before the first group: the bias, or -0, to which any y is added as y itself."""
    if HAS_BIAS:
        start = tl.broadcast_to(tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :], (BM, BN))
    else:
        start = tl.full((BM, BN), -0.0, tl.float32)
    return start


@triton.jit
def int8_kernel(
    q, qparams, weight, scale, bias, y, rows, outputs, columns, stride,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write a tile of BM - 1 tokens by BN outputs. EVEN: whether BK divides the columns."""
    m, n = tile_of(rows, outputs, BM - 1, BN)
    r, k = tl.arange(0, BM), tl.arange(0, BK)
    at, outs = m * (BM - 1) + r, n * BN + tl.arange(0, BN)
    source = tl.where(r == BM - 1, rows, tl.minimum(at, rows - 1)).to(tl.int64)
    left = q + source[:, None] * stride + k[None, :]
    right = weight + (outs % outputs).to(tl.int64)[None, :] * columns + k[:, None]
    sums = tl.zeros((BM, BN), tl.int32)
    for start in range(0, columns, BK):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            a = tl.load(left, mask=(start + k < columns)[None, :], other=0)
            b = tl.load(right, mask=(start + k < columns)[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        left += BK
        right += BK
    ones = tl.sum(tl.where((r == BM - 1)[:, None], sums, 0), 0)
    token = tl.minimum(at, rows - 1)
    offset = tl.load(qparams + rows + token).to(tl.int32)
    factor = tl.load(qparams + token)[:, None] * tl.load(scale + outs, mask=outs < outputs, other=0.0)[None, :]
    result = (sums + offset[:, None] * ones[None, :]).to(tl.float32) * factor
    if HAS_BIAS:
        result += tl.load(bias + outs, mask=outs < outputs, other=0.0).to(tl.float32)[None, :]
    _store(y, result, at, outs, rows, outputs, r < BM - 1, RELU)


@triton.jit
def _nibbles(weight, outs, byte, outputs, stored, EVEN: tl.constexpr):
    """Return a tile of int4, (bytes, outputs): the even columns and the odd ones, as float16."""
    places = weight + (outs % outputs).to(tl.int64)[None, :] * stored + byte[:, None]
    packed = (tl.load(places) if EVEN else tl.load(places, mask=(byte < stored)[:, None], other=0)).to(tl.int32)
    return ((packed & 15) - 8).to(tl.float16), ((packed >> 4) - 8).to(tl.float16)


@triton.jit
def _triples(weight, outs, block, outputs, stored, EVEN: tl.constexpr):
    """Return a tile of int3, (outputs, 8 columns a block of 3 bytes), as float16."""
    places = weight + (outs % outputs).to(tl.int64)[:, None] * stored + block[None, :] * 3
    inside = (block * 3 < stored)[None, :]
    first = (tl.load(places) if EVEN else tl.load(places, mask=inside, other=0)).to(tl.int32)
    second = (tl.load(places + 1) if EVEN else tl.load(places + 1, mask=inside, other=0)).to(tl.int32)
    third = (tl.load(places + 2) if EVEN else tl.load(places + 2, mask=inside, other=0)).to(tl.int32)
    gathered = (first & 3) | ((second & 3) << 2) | ((third & 3) << 4)
    pairs = tl.interleave(tl.interleave(gathered, second >> 2), tl.interleave(first >> 2, third >> 2))
    return (tl.interleave(pairs & 7, pairs >> 3) - 4).to(tl.float16)


@triton.jit
def int4_kernel(
    q, qparams, weight, scale, bias, y, rows, outputs, columns, stride, stored, groups,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write a tile of BM tokens by BN outputs. EVEN: whether GROUP divides the columns."""
    m, n = tile_of(rows, outputs, BM, BN)
    at, outs, pair = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN), tl.arange(0, GROUP // 2)
    token = tl.minimum(at, rows - 1)
    result = _started(bias, outs, outputs, BM, BN, HAS_BIAS)
    factor = tl.load(qparams + token)
    for group in range(groups):
        byte = group * (GROUP // 2) + pair
        left = q + token.to(tl.int64)[:, None] * stride + byte[None, :]
        right = left + stride // 2
        even = tl.load(left) if EVEN else tl.load(left, mask=(2 * byte < columns)[None, :], other=0.0)
        odd = tl.load(right) if EVEN else tl.load(right, mask=(2 * byte + 1 < columns)[None, :], other=0.0)
        low, high = _nibbles(weight, outs, byte, outputs, stored, EVEN)
        sums = tl.dot(odd, high, tl.dot(even, low))
        scales = tl.load(scale + outs * groups + group, mask=outs < outputs, other=0.0).to(tl.float32)
        result += (sums + 0.0) * (factor[:, None] * scales[None, :])  # + 0: a sum of nothing is no -0
    _store(y, result, at, outs, rows, outputs, at < rows, RELU)


@triton.jit
def int3_kernel(
    q, qparams, weight, scale, bias, y, rows, outputs, columns, stride, stored, groups,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write a tile of BM tokens by BN outputs. EVEN: whether GROUP divides the columns."""
    m, n = tile_of(rows, outputs, BM, BN)
    at, outs, k = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN), tl.arange(0, GROUP)
    token = tl.minimum(at, rows - 1)
    result = _started(bias, outs, outputs, BM, BN, HAS_BIAS)
    factor = tl.load(qparams + token)
    for group in range(groups):
        column = group * GROUP + k
        left = q + token.to(tl.int64)[:, None] * stride + column[None, :]
        a = tl.load(left) if EVEN else tl.load(left, mask=(column < columns)[None, :], other=0.0)
        b = _triples(weight, outs, group * (GROUP // 8) + tl.arange(0, GROUP // 8), outputs, stored, EVEN)
        sums = tl.dot(a, tl.trans(b))
        scales = tl.load(scale + outs * groups + group, mask=outs < outputs, other=0.0).to(tl.float32)
        result += (sums + 0.0) * (factor[:, None] * scales[None, :])  # + 0: a sum of nothing is no -0
    _store(y, result, at, outs, rows, outputs, at < rows, RELU)


@triton.jit
def int16_kernel(
    q, qparams, weight, scale, bias, y, rows, outputs, columns, stride,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write a tile of BM tokens by BN outputs. EVEN: whether BK divides the columns."""
    m, n = tile_of(rows, outputs, BM, BN)
    at, outs, k = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN), tl.arange(0, BK)
    token = tl.minimum(at, rows - 1)
    left = q + token.to(tl.int64)[:, None] * stride + k[None, :]
    right = weight + (outs % outputs).to(tl.int64)[None, :] * columns + k[:, None]
    upper, middle, lower = tl.zeros((BM, BN), tl.int32), tl.zeros((BM, BN), tl.int64), tl.zeros((BM, BN), tl.int32)
    for start in range(0, columns, BK):
        inside = start + k < columns
        a, c = halves(tl.load(left) if EVEN else tl.load(left, mask=inside[None, :], other=0))
        b, d = halves(tl.load(right) if EVEN else tl.load(right, mask=inside[:, None], other=0))
        upper += tl.dot(a, b).to(tl.int32)
        middle += tl.dot(c, b, tl.dot(a, d)).to(tl.int32)
        lower += tl.dot(c, d).to(tl.int32)
        left += BK
        right += BK
    sums = upper.to(tl.int64) * 65536 + middle * 256 + lower
    factor = tl.load(qparams + token)[:, None] * tl.load(scale + outs, mask=outs < outputs, other=0.0)[None, :]
    result = sums.to(tl.float32) * factor
    if HAS_BIAS:
        result += tl.load(bias + outs, mask=outs < outputs, other=0.0).to(tl.float32)[None, :]
    _store(y, result, at, outs, rows, outputs, at < rows, RELU)


_PRODUCTS: dict[str, tuple[Any, int]] = {
    "int8": (int8_kernel, SHIFTED),
    "int4": (int4_kernel, SPLIT),
    "int3": (int3_kernel, CENTRED),
    "int16": (int16_kernel, WIDE),
}
"""By the name of a format its kernel, and the form of integers that it multiplies."""

_OF_A_TOKEN = {"int8": triton_gemv.launch_int8, "int4": triton_gemv.launch_int4}


def linear(a: Any) -> torch.Tensor:
    """Return x @ dequantize(weight).T + bias; the arguments as of fxquant.ops.linear, none of them empty."""
    columns = a.x.shape[-1]
    rows = a.x.reshape(math.prod(a.x.shape[:-1]), columns)
    rows = rows if rows.stride(-1) == 1 or columns == 1 else rows.contiguous()
    y = torch.empty((*a.x.shape[:-1], a.weight.shape[0]), dtype=a.x.dtype, device=a.x.device)
    multiply(rows, a, y)
    return y


def multiply(rows: torch.Tensor, a: Any, y: torch.Tensor) -> None:
    """Write the product of (M, K) rows to y, (M, N) of any dtype."""
    count, outputs, columns, bias = len(rows), a.weight.shape[0], rows.shape[1], a.bias
    kernel, form = _PRODUCTS[a.format]
    qmax = INT16_MAX if form == WIDE else a.qmax
    scale = a.scale.contiguous()
    right = (a.weight.contiguous(), scale, scale if bias is None else bias.contiguous(), y)
    meta: dict[str, Any] = {"HAS_BIAS": bias is not None, "RELU": a.relu, **EXACT}
    packed: tuple[int, ...] = ()
    if a.group_size:
        meta["GROUP"] = a.group_size
        packed = (a.weight.shape[1], scale.shape[1])

    def launch(tile: Shape) -> None:
        options = meta | tile.options
        if tile.tokens == 1:
            _OF_A_TOKEN[a.format]((rows, *right), (outputs, columns, qmax * 0.5, float(qmax), *packed), options)
            return
        tokens = triton_tokens.quantize(rows, form, qmax, a.per_token)
        programs = blocks(count, tile.tokens - (form == SHIFTED)) * blocks(outputs, tile.outputs)
        even = columns % (a.group_size or tile.columns) == 0
        sizes = (count, outputs, columns, tokens.stride, *packed)
        kernel[(programs,)](*tokens[:2], *right, *sizes, EVEN=even, **options, BM=tile.tokens)

    tuned((a.format, a.group_size, outputs, columns, y.dtype), count, rows.device, launch)
