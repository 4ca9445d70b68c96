"""Triton's products of hidden states, quantized anew at each step, and a quantized weight: what `triton_walk` steps by.

A program writes the integers of its tokens to memory of its own, which stays in the caches, and multiplies these by its
part of the weight; so both factors of a product are loaded ahead. The products of a format:

    int8          q - 128 by the weight on int8 tensor cores; a second product, of ones, gives the sums of the weight's
                  rows, by which 128 - zero_point is multiplied
    int4, int3    q - zero_point by the weight on float16 tensor cores, group by group: sums of whole numbers that stay
                  below 2**24 are exact there
    int16         four such products, of the upper and lower halves of both factors

What is read of states passes by the L1 cache (".cg"): another multiprocessor may have written it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxquant.ops.triton_common import WHOLE, halves
from fxquant.ops.triton_tokens import affine_qparams, wide_qparams

FORMATS = {"int8": 0, "int4": 1, "int3": 2, "int16": 3}
"""The formats by what the kernels call them, as FORMAT."""

INTEGERS = {"int8": torch.int8, "int4": torch.float16, "int3": torch.float16, "int16": torch.int16}
"""The dtype in which a format's product takes the integers of activations."""


@triton.jit
def places_of(is_first, first, second, ALIGNED: tl.constexpr):
    """Return where each row of states is, in one of two places. ALIGNED: whether all begin at multiples of 16 bytes."""
    places = tl.where(is_first, first, second)
    return tl.multiple_of(places, 16) if ALIGNED else places


@triton.jit
def states(places, k, width):
    """Return columns of hidden states, (rows, columns); places: where each row is."""
    return tl.load(places[:, None] + k[None, :], mask=(k < width)[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def _span(x):
    """Return the least and the greatest value of each token, 0 included, and whether there is a NaN, which is left out.

    A NaN's bits without its sign are above those of infinity.
    """
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    return tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0), (bits > 0x7F800000).to(tl.int32)


@triton.jit
def _qparams(low, high, bad, qmax, FORMAT: tl.constexpr):
    """Return (scale, 1 / scale, zero point) of tokens; the first two are NaN where a token has a NaN."""
    low, high = tl.where(bad == 0, low, 0.0), tl.where(bad == 0, high, 0.0)
    if FORMAT == 3:
        scale, inverse = wide_qparams(low, high, 32767.0)
        zero_point = tl.zeros_like(scale)
    else:
        scale, inverse, zero_point = affine_qparams(low, high, qmax * 0.5, qmax)
    nan = float("nan")
    return tl.where(bad == 0, scale, nan), tl.where(bad == 0, inverse, nan), zero_point


@triton.jit
def _store_integers(x, inverse, zero_point, q, r, k, width, stride, qmax, FORMAT: tl.constexpr):
    """Write tokens as the product takes them; of int4 the even columns first, the odd ones from half the stride on.

    A number added to 1.5 * 2**23 is rounded half to even, and the lower bits of the sum are those of the integer. Only
    infinities are too large for that, and they are clamped. A token with a NaN has a scale of NaN, whatever is written.
    """
    inverse, zero_point, inside = inverse[:, None], zero_point[:, None], (k < width)[None, :]
    shifted, at = x * inverse + WHOLE, k
    if FORMAT == 3:
        shifted = tl.minimum(tl.maximum(shifted, WHOLE - 32767.0), WHOLE + 32767.0)
        values = shifted.to(tl.int32, bitcast=True).to(tl.int16)
    else:
        shifted = tl.minimum(tl.maximum(shifted, WHOLE - zero_point), WHOLE + (qmax - zero_point))
        if FORMAT == 0:
            values = (shifted + (zero_point - 128.0)).to(tl.int32, bitcast=True).to(tl.int8)
        else:
            values = (shifted - WHOLE).to(tl.float16)
        if FORMAT == 1:
            at = k // 2 + (k % 2) * (stride // 2)
    tl.store(q + r[:, None] * stride + at[None, :], values, mask=inside)


@triton.jit
def quantize_states(
    places, q, qparams, width, stride, qmax,
    FORMAT: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Write BR tokens to q, and their scales and 128 - zero points to qparams, (2, BM). ONCE: BK columns are all."""
    r, k = tl.arange(0, BR), tl.arange(0, BK)
    if ONCE:
        x = states(places, k, width)
        low, high, bad = _span(x)
        scale, inverse, zero_point = _qparams(low, high, bad, qmax, FORMAT)
        _store_integers(x, inverse, zero_point, q, r, k, width, stride, qmax, FORMAT)
    else:
        low, high, bad = tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.int32)
        for start in range(0, width, BK):
            least, most, nan = _span(states(places, start + k, width))
            low, high, bad = tl.minimum(low, least), tl.maximum(high, most), tl.maximum(bad, nan)
        scale, inverse, zero_point = _qparams(low, high, bad, qmax, FORMAT)
        for start in range(0, width, BK):
            x = states(places, start + k, width)
            _store_integers(x, inverse, zero_point, q, r, start + k, width, stride, qmax, FORMAT)
    tl.store(qparams + r, scale)
    tl.store(qparams + BM + r, 128.0 - zero_point)
    tl.debug_barrier()


@triton.jit
def _int3(w, block, stored):
    """Return a tile of int3, (N, 8 columns a block of 3 bytes), as float16; w: where each row begins."""
    places, inside = w[:, None] + block[None, :] * 3, (block * 3 < stored)[None, :]
    first = tl.load(places, mask=inside, other=0).to(tl.int32)
    second = tl.load(places + 1, mask=inside, other=0).to(tl.int32)
    third = tl.load(places + 2, mask=inside, other=0).to(tl.int32)
    gathered = (first & 3) | ((second & 3) << 2) | ((third & 3) << 4)
    pairs = tl.interleave(tl.interleave(gathered, second >> 2), tl.interleave(first >> 2, third >> 2))
    return (tl.interleave(pairs & 7, pairs >> 3) - 4).to(tl.float16)


@triton.jit
def _int8_sums(q, offset, w, width, BM: tl.constexpr, BK: tl.constexpr, N: tl.constexpr):
    sums, ones = tl.zeros((BM, N), tl.int32), tl.zeros((BM, N), tl.int32)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(q[:, None] + k[None, :], mask=(k < width)[None, :], other=0)
        b = tl.load(w[None, :] + k[:, None], mask=(k < width)[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        ones = tl.dot(tl.full((BM, BK), 1, tl.int8), b, ones, out_dtype=tl.int32)
    return sums + offset.to(tl.int32)[:, None] * ones


@triton.jit
def _int16_sums(q, w, width, BM: tl.constexpr, BK: tl.constexpr, N: tl.constexpr):
    upper, middle, lower = tl.zeros((BM, N), tl.int64), tl.zeros((BM, N), tl.int64), tl.zeros((BM, N), tl.int64)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        a, c = halves(tl.load(q[:, None] + k[None, :], mask=(k < width)[None, :], other=0))
        b, d = halves(tl.load(w[None, :] + k[:, None], mask=(k < width)[:, None], other=0))
        upper += tl.dot(a, b).to(tl.int32)
        middle += tl.dot(c, b, tl.dot(a, d)).to(tl.int32)
        lower += tl.dot(c, d).to(tl.int32)
    return upper * 65536 + middle * 256 + lower


@triton.jit
def _whole_sums(
    q, offset, w, width,
    FORMAT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    if FORMAT == 0:
        return _int8_sums(q, offset, w, width, BM, BK, N)
    else:
        return _int16_sums(q, w, width, BM, BK, N)


@triton.jit
def _group_sums(q, stride, width, w, stored, group, FORMAT: tl.constexpr, GROUP: tl.constexpr):
    if FORMAT == 1:
        byte = group * (GROUP // 2) + tl.arange(0, GROUP // 2)
        places, inside = w[None, :] + byte[:, None], (byte < stored)[:, None]
        packed = tl.load(places, mask=inside, other=0).to(tl.int32)
        even = tl.load(q[:, None] + byte[None, :], mask=(2 * byte < width)[None, :], other=0.0)
        odd = tl.load(q[:, None] + (stride // 2 + byte)[None, :], mask=(2 * byte + 1 < width)[None, :], other=0.0)
        return tl.dot(odd, ((packed >> 4) - 8).to(tl.float16), tl.dot(even, ((packed & 15) - 8).to(tl.float16)))
    else:
        k = group * GROUP + tl.arange(0, GROUP)
        a = tl.load(q[:, None] + k[None, :], mask=(k < width)[None, :], other=0.0)
        return tl.dot(a, tl.trans(_int3(w, group * (GROUP // 8) + tl.arange(0, GROUP // 8), stored)))


@triton.jit
def add_product(
    y, q, qparams, r, stride, width, w, w_scale, channel, stored,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Return y + tokens @ weight[channel].T, (BM, N), as `linear.multiply` computes it.

    r: which of the tokens in q, (BM,); channel: which rows of the weight, (N,).
    """
    scale, offset = tl.load(qparams + r), tl.load(qparams + BM + r)
    q, w = q + r * stride, w + channel * stored
    if FORMAT == 0 or FORMAT == 3:
        factor = scale[:, None] * tl.load(w_scale + channel)[None, :]
        y = _whole_sums(q, offset, w, width, FORMAT, BM, BK, N).to(tl.float32) * factor + y
    else:
        groups = tl.cdiv(width, GROUP)
        for group in range(groups):
            scales = tl.load(w_scale + channel * groups + group).to(tl.float32)
            sums = _group_sums(q, stride, width, w, stored, group, FORMAT, GROUP)
            y = (sums + 0.0) * (scale[:, None] * scales[None, :]) + y  # + 0: a sum of nothing is no -0
    return y
