"""Triton's kernels of a single token by a weight: one launch, in which each program measures the token itself.

A weight is read once, and that takes all the time. So there are no tensor cores here: int8 and int4 are multiplied as
int32, each thread in columns of its own, and the columns are added up in the end (int4: at the end of each group).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fxquant.ops.triton_common import blocks, power_of_two
from fxquant.ops.triton_tokens import affine_qparams, to_integers, token_range

_READ = tl.constexpr(1024)  # a token's values that are measured at a time
_COLUMNS = 1024  # of int4 that a program multiplies at a time: 32 lanes by 16 bytes


@triton.jit
def _measured(x, columns, half_steps, qmax):
    """Return (scale, 1 / scale, zero point, 1 / scale or NaN) of the token."""
    low, high, bad = token_range(x, columns, _READ)
    low, high = tl.where(bad == 0, low, 0.0), tl.where(bad == 0, high, 0.0)
    scale, inverse, zero_point = affine_qparams(low, high, half_steps, qmax)
    is_number = bad == 0
    return tl.where(is_number, scale, float("nan")), tl.where(is_number, inverse, float("nan")), zero_point


@triton.jit
def _centred(x, column, columns, inverse, zero_point, qmax):
    """Return q - zero_point of the token's columns as int32, 0 beyond their end."""
    value = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
    return (to_integers(value, inverse, zero_point, 0.0, qmax) - zero_point).to(tl.int32)


@triton.jit
def _finish(y, result, outs, outputs, RELU: tl.constexpr):
    if RELU:
        result = tl.where(result < 0, 0.0, result)  # NaN and -0 stay, as with torch.relu_
    tl.store(y + outs, result, mask=outs < outputs)


@triton.jit
def int8_token_kernel(
    x, weight, scale, bias, y, outputs, columns, half_steps, qmax,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write BN outputs."""
    outs, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    right = weight + (outs % outputs).to(tl.int64)[:, None] * columns + k[None, :]
    block = tl.load(right, mask=(k < columns)[None, :], other=0)  # on its way while the token is measured
    token_scale, inverse, zero_point = _measured(x, columns, half_steps, qmax)
    sums = tl.zeros((BN, BK), tl.int32)
    for start in range(0, columns, BK):
        right += BK
        following = tl.load(right, mask=(start + BK + k < columns)[None, :], other=0)
        sums += block.to(tl.int32) * _centred(x, start + k, columns, inverse, zero_point, qmax)[None, :]
        block = following
    factor = token_scale * tl.load(scale + outs, mask=outs < outputs, other=0.0)
    result = tl.sum(sums, 1).to(tl.float32) * factor
    if HAS_BIAS:
        result += tl.load(bias + outs, mask=outs < outputs, other=0.0).to(tl.float32)
    _finish(y, result, outs, outputs, RELU)


@triton.jit
def int4_token_kernel(
    x, weight, scale, bias, y, outputs, columns, half_steps, qmax, stored, groups,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, GROUP: tl.constexpr, SOME: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write BN outputs, of SOME groups of columns at a time."""
    outs, some, pair = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, SOME), tl.arange(0, GROUP // 2)
    byte = some[:, None] * (GROUP // 2) + pair[None, :]
    places = weight + (outs % outputs).to(tl.int64)[:, None, None] * stored + byte[None, :, :]
    packed = tl.load(places, mask=(byte < stored)[None, :, :], other=0)  # on its way while the token is measured
    token_scale, inverse, zero_point = _measured(x, columns, half_steps, qmax)
    if HAS_BIAS:
        result = tl.load(bias + outs, mask=outs < outputs, other=0.0).to(tl.float32)
    else:
        result = tl.full((BN,), -0.0, tl.float32)  # to which any y is added as y itself
    for first in range(0, groups, SOME):
        places += SOME * (GROUP // 2)
        column = first * GROUP + 2 * byte
        following = tl.load(places, mask=((first + SOME) * (GROUP // 2) + byte < stored)[None, :, :], other=0)
        even = _centred(x, column, columns, inverse, zero_point, qmax)
        odd = _centred(x, column + 1, columns, inverse, zero_point, qmax)
        wide = packed.to(tl.int32)
        sums = tl.sum((wide & 15) * even[None, :, :] + (wide >> 4) * odd[None, :, :], 2)
        sums -= 8 * tl.sum(even + odd, 1)[None, :]
        at = outs[:, None] * groups + first + some[None, :]
        inside = (outs < outputs)[:, None] & (first + some < groups)[None, :]
        factor = token_scale * tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
        product = tl.where(inside, sums.to(tl.float32) * factor, -0.0)
        for i in tl.static_range(SOME):  # in the order of the groups; one number is a sum of its bits and zeros
            bits = tl.where((some == i)[None, :], product.to(tl.int32, bitcast=True), 0)
            result += tl.sum(bits, 1).to(tl.float32, bitcast=True)
        packed = following
    _finish(y, result, outs, outputs, RELU)


def launch_int8(operands: tuple[Any, ...], sizes: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Run the product of a token. operands: x, weight, scale, bias, y; sizes: outputs, columns, half_steps, qmax."""
    int8_token_kernel[(blocks(sizes[0], options["BN"]),)](*operands, *sizes, **options)


def launch_int4(operands: tuple[Any, ...], sizes: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Run the product of a token; sizes: as of `launch_int8`, then stored columns and groups."""
    some = min(power_of_two(sizes[-1]), _COLUMNS // options["GROUP"])
    int4_token_kernel[(blocks(sizes[0], options["BN"]),)](*operands, *sizes, SOME=some, **options)
