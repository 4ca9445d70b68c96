"""Triton's kernels of single integer values: quantize, dequantize, lookup, add_values and mul_values.

Operands are read as they lie in memory, so each result lies as its operand does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from fxquant.ops.gpu import is_dense
from fxquant.ops.triton_common import EXACT, blocks, clamped, from_value, to_value

_BLOCK = 1024


@triton.jit
def _places(BLOCK: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def quantize_kernel(x, scale, zero_point, out, qmax, count, BLOCK: tl.constexpr):
    """Write a float tensor as uint8."""
    at = _places(BLOCK)
    real = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    q = to_value(real, tl.load(scale), tl.load(zero_point).to(tl.float32), qmax)
    tl.store(out + at, q, mask=at < count)


@triton.jit
def dequantize_kernel(q, scale, zero_point, out, count, BLOCK: tl.constexpr):
    """Write what uint8 values stand for."""
    at = _places(BLOCK)
    values = tl.load(q + at, mask=at < count, other=0)
    tl.store(out + at, from_value(values, tl.load(scale), tl.load(zero_point).to(tl.float32)), mask=at < count)


@triton.jit
def lookup_kernel(q, table, out, count, BLOCK: tl.constexpr):
    """Write table[q]."""
    at = _places(BLOCK)
    values = tl.load(q + at, mask=at < count, other=0).to(tl.int32)
    tl.store(out + at, tl.load(table + values), mask=at < count)


@triton.jit
def pair_kernel(
    a, a_scale, a_zero_point, b, b_scale, b_zero_point, scale, zero_point, out, qmax, low, high, count,
    OPERATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sum (OPERATION 0), difference (1) or product (2) of two uint8 values as one."""
    at = _places(BLOCK)
    x = from_value(tl.load(a + at, mask=at < count, other=0), tl.load(a_scale), tl.load(a_zero_point).to(tl.float32))
    y = from_value(tl.load(b + at, mask=at < count, other=0), tl.load(b_scale), tl.load(b_zero_point).to(tl.float32))
    real = x + y if OPERATION == 0 else x - y if OPERATION == 1 else x * y
    q = to_value(clamped(real, low, high), tl.load(scale), tl.load(zero_point).to(tl.float32), qmax)
    tl.store(out + at, q, mask=at < count)


def quantize(a: Any) -> torch.Tensor:
    """Return x as uint8, in its memory format."""
    out, x = torch.empty_like(a.x, dtype=torch.uint8), _dense(a.x)
    _run(quantize_kernel, out, x, a.scale, a.zero_point, out, float(a.qmax))
    return out


def dequantize(a: Any) -> torch.Tensor:
    """Return what q stands for, in its memory format."""
    out, q = torch.empty_like(a.q, dtype=torch.float32), _dense(a.q)
    _run(dequantize_kernel, out, q, a.scale, a.zero_point, out)
    return out


def lookup(a: Any) -> torch.Tensor:
    """Return table[q], in q's memory format."""
    out, q = torch.empty_like(a.q), _dense(a.q)
    _run(lookup_kernel, out, q, a.table.contiguous(), out)
    return out


def add(a: Any) -> torch.Tensor:
    """Return a + alpha b as a value."""
    return _pair(a, 0 if a.alpha >= 0 else 1)


def mul(a: Any) -> torch.Tensor:
    """Return a b as a value."""
    return _pair(a, 2)


def probe(device: torch.device) -> None:
    """Compile and run a kernel on a device; RuntimeError if its result is wrong."""
    x = torch.tensor([-1.0, 0.26, 0.0, 9.0], device=device)
    out = torch.empty(4, dtype=torch.uint8, device=device)
    _run(quantize_kernel, out, x, x.new_full((), 0.5), x.new_full((), 3, dtype=torch.int32), out, 15.0)
    if out.tolist() != [1, 4, 3, 15]:
        raise RuntimeError("a kernel gave a wrong result")


def _pair(a: Any, operation: int) -> torch.Tensor:
    out = torch.empty_like(a.a)
    qparams = (a.a, a.a_scale, a.a_zero_point, a.b, a.b_scale, a.b_zero_point, a.scale, a.zero_point)
    low, high = -math.inf if a.low is None else a.low, math.inf if a.high is None else a.high
    _run(pair_kernel, out, *qparams, out, float(a.qmax), low, high, OPERATION=operation)
    return out


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if is_dense(x) else torch.empty_like(x).copy_(x)


def _run(kernel: Any, out: torch.Tensor, *args: Any, **options: Any) -> None:
    count = out.numel()
    if count:
        kernel[(blocks(count, _BLOCK),)](*args, count, BLOCK=_BLOCK, **options, **EXACT)
