"""What Triton's kernels share: the single float32 operations that the references are made of.

Kernels are launched with `EXACT`: without it the compiler would fuse multiplications and additions, and round once
where the reference rounds twice. Triton's `/` is an approximation; `tl.div_rn` is IEEE's division.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""The options of every launch."""

LARGEST = tl.constexpr(3.4028234663852886e38)
TINY = tl.constexpr(1.1754943508222875e-38)
WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float32 near it is whole
_FAR = tl.constexpr(2097152.0)  # beyond any integer of a quantized tensor


@triton.jit
def rounded(x):
    """Return x rounded half to even; what is beyond ±2²¹ counts as that, NaN as one of the two."""
    return (tl.minimum(tl.maximum(x, -_FAR), _FAR) + WHOLE) - WHOLE


@triton.jit
def clamped(x, low, high):
    """Return x within [low, high]; NaN stays NaN."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, low), high), x)


@triton.jit
def to_value(y, scale, zero_point, qmax):
    """Return y as uint8: numerics.quantize_value. scale, zero_point: scalars, float32 both."""
    q = y * tl.div_rn(1.0, scale)
    q = rounded(tl.where(q == q, q, 0.0)) + zero_point
    return tl.minimum(tl.maximum(q, 0.0), qmax).to(tl.int32).to(tl.uint8)


@triton.jit
def from_value(q, scale, zero_point):
    """Return what uint8 values stand for: numerics.dequantize_value."""
    return (q.to(tl.float32) - zero_point) * scale


def blocks(count: int, size: int) -> int:
    """Return how many blocks of a size hold so many; triton.cdiv takes microseconds."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """Return the least power of two that is not less."""
    return 1 << (count - 1).bit_length()


@triton.jit
def halves(values):
    """Return the upper and the lower half of int16 values, -128 to 128 and -128 to 127, as float16."""
    wide = values.to(tl.int32)
    low = ((wide + 128) & 255) - 128
    return ((wide - low) >> 8).to(tl.float16), low.to(tl.float16)
