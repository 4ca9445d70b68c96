"""Triton's kernels of tables: rows of a quantized table, and their sums, means and maxima over bags.

An index beyond the table, or offsets that are not sound, stop the device with an assertion, as with torch's own
embeddings there: to raise IndexRangeError each call would have to wait for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fxquant.ops.triton_common import EXACT, blocks, power_of_two

_MOST_AT_ONCE = 1024  # of a row's columns
_MODES = {"sum": 0, "mean": 1, "max": 2}
_CHECKED: dict[str, Any] = {**EXACT, "debug": True, "sanitize_overflow": False}  # debug: with its assertions


@triton.jit
def _row(
    weight, scale, zero_point, index, column, columns, stored,
    PACKED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_ZERO_POINT: tl.constexpr,
):  # fmt: skip
    """Return columns of a row as float32. PACKED: two values a byte."""
    at = weight + index * stored + (column // 2 if PACKED else column)
    values = tl.load(at, mask=column < columns, other=0)
    if PACKED:
        values = (values.to(tl.int32) >> (column % 2 * 4)) & 15
    real = values.to(tl.float32)
    if HAS_ZERO_POINT:
        real -= tl.load(zero_point + index).to(tl.float32)
    if HAS_SCALE:
        real *= tl.load(scale + index)
    return real


@triton.jit
def _checked(index, rows):
    """Return an index of the table; an assertion fails for one that is not."""
    tl.device_assert((index >= 0) & (index < rows), "an index lies outside of a quantized table")
    return tl.minimum(tl.maximum(index, 0), rows - 1).to(tl.int64)


@triton.jit
def embedding_kernel(
    indices, weight, scale, zero_point, out, rows, columns, stored,
    PACKED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write BLOCK columns of a row of the result."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = _checked(tl.load(indices + place), rows)
    real = _row(weight, scale, zero_point, index, column, columns, stored, PACKED, HAS_SCALE, HAS_ZERO_POINT)
    tl.store(out + place * columns + column, real, mask=column < columns)


@triton.jit
def bag_kernel(
    indices, weight, scale, zero_point, out, offsets, samples, rows, columns, stored, count, width, ends, padding,
    PACKED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    HAS_SAMPLES: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write BLOCK columns of a bag, its rows taken in their order. ends: how many of the offsets end a bag."""
    bag = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if HAS_OFFSETS:
        first = tl.load(offsets + bag).to(tl.int64)
        last = tl.load(offsets + bag + 1, mask=bag < ends, other=count).to(tl.int64)
        tl.device_assert((first >= 0) & (first <= last) & (last <= count), "the offsets of bags are not in order")
        tl.device_assert((bag > 0) | (first == 0), "the first offset of bags is not 0")
    else:
        first = bag.to(tl.int64) * width
        last = first + width
    total = tl.zeros((BLOCK,), tl.float32)
    taken = (first * 0).to(tl.int32)
    for i in range(first, last):
        index = _checked(tl.load(indices + i), rows)
        real = _row(weight, scale, zero_point, index, column, columns, stored, PACKED, HAS_SCALE, HAS_ZERO_POINT)
        if HAS_SAMPLES:
            real *= tl.load(samples + i).to(tl.float32)
        more = tl.where((real > total) | (taken == 0), real, total) if MODE == 2 else total + real
        total = tl.where(index == padding, total, more)
        taken += (index != padding).to(tl.int32)
    if MODE == 1:
        total = tl.div_rn(total, tl.maximum(taken, 1).to(tl.float32))
    tl.store(out + bag.to(tl.int64) * columns + column, total, mask=column < columns)


def _table(a: Any) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """Return the table's tensors, what kernels must know of them, and in how many blocks they take the columns."""
    weight = a.weight.contiguous()
    block = min(power_of_two(max(a.embedding_dim, 1)), _MOST_AT_ONCE)
    parts = tuple(weight if part is None else part.contiguous() for part in (a.scale, a.zero_point))
    meta = {
        "PACKED": a.format == "uint4",
        "HAS_SCALE": a.scale is not None,
        "HAS_ZERO_POINT": a.zero_point is not None,
        "BLOCK": block,
    }
    return (weight, *parts), meta | _CHECKED, blocks(a.embedding_dim, block)


def embedding(a: Any) -> torch.Tensor:
    """Return the rows of a table at the indices."""
    table, meta, blocks = _table(a)
    out = torch.empty((*a.indices.shape, a.embedding_dim), dtype=a.dtype, device=a.weight.device)
    sizes = (len(a.weight), a.embedding_dim, a.weight.shape[1])
    embedding_kernel[(a.indices.numel(), blocks)](a.indices.contiguous(), *table, out, *sizes, **meta)
    return out


def embedding_bag(a: Any) -> torch.Tensor:
    """Return a sum, mean or max of a table's rows for each bag."""
    table, meta, blocks = _table(a)
    has_offsets = a.offsets is not None
    bags = len(a.offsets) - a.include_last_offset if has_offsets else len(a.indices)
    out = torch.empty((bags, a.embedding_dim), dtype=a.dtype, device=a.weight.device)
    offsets, samples = (table[0] if part is None else part.contiguous() for part in (a.offsets, a.per_sample_weights))
    padding = -1 if a.padding_idx is None else a.padding_idx % len(a.weight)
    ends = len(a.offsets) - 1 if has_offsets else 0
    width = 0 if has_offsets else a.indices.shape[1]
    sizes = (len(a.weight), a.embedding_dim, a.weight.shape[1], a.indices.numel(), width, ends, padding)
    meta |= {"HAS_OFFSETS": has_offsets, "HAS_SAMPLES": a.per_sample_weights is not None, "MODE": _MODES[a.mode]}
    bag_kernel[(bags, blocks)](a.indices.contiguous(), *table, out, offsets, samples, *sizes, **meta)
    return out
