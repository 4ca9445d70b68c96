"""Quantized tables: rows by Gather, dequantized in float32, exactly as fxquant does; and bags of them."""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import ir
from onnxscript import opset21 as op

from fxquant.formats import UINT4, format_of
from fxquant.onnx.graph import Model, cast, dtype_of, ints, number, rank_of, to_float


def embedding(_: Model, a: Any) -> Any:
    """Return the rows of a table at the indices."""
    return _as(_rows(a), a.dtype)


def embedding_bag(_: Model, a: Any) -> Any:
    """Return a sum, mean or maximum of rows for each bag; of an empty one zeros."""
    rows = _rows(a)
    if a.per_sample_weights is not None:
        rows = op.Mul(rows, op.Unsqueeze(to_float(a.per_sample_weights), ints(-1)))
    counts_in = None
    if a.padding_idx is not None:
        padding = a.padding_idx % a.weight.shape[0]
        is_read = op.Not(op.Equal(cast(a.indices, ir.DataType.INT64), op.Constant(value_int=padding)))
        counts_in = op.Unsqueeze(is_read, ints(-1))
    bags = _equal_bags(a, rows, counts_in) if a.offsets is None else _offset_bags(a, rows, counts_in)
    return _as(bags, a.dtype)


def _as(x: Any, dtype: torch.dtype) -> Any:
    return x if dtype == torch.float32 else cast(x, dtype_of(dtype))


def _rows(a: Any) -> Any:
    """Return (*indices.shape, D) float32: (integers - zero point) * scale."""
    rows = op.Gather(a.weight, a.indices, axis=0)
    if format_of(a.format) is UINT4:
        rows = _unpack_uint4(rows, rank_of(a.indices), a.embedding_dim)
    real = cast(rows, ir.DataType.FLOAT)
    if a.zero_point is not None:
        real = op.Sub(real, op.Unsqueeze(op.Gather(to_float(a.zero_point), a.indices), ints(-1)))
    if a.scale is not None:
        real = op.Mul(real, op.Unsqueeze(op.Gather(to_float(a.scale), a.indices), ints(-1)))
    return real


def _unpack_uint4(packed: Any, axis: int, columns: int) -> Any:
    """Return what is packed two a byte along an axis, the last one, as bytes."""
    low = op.BitwiseAnd(packed, op.Constant(value=ir.tensor([15], dtype=ir.DataType.UINT8)))
    high = op.BitShift(packed, op.Constant(value=ir.tensor([4], dtype=ir.DataType.UINT8)), direction="RIGHT")
    both = op.Concat(op.Unsqueeze(low, ints(-1)), op.Unsqueeze(high, ints(-1)), axis=-1)
    flat = op.Reshape(both, op.Constant(value_ints=[*[0] * axis, -1]))
    return op.Slice(flat, ints(0), ints(columns), ints(axis))


def _equal_bags(a: Any, rows: Any, counts_in: Any) -> Any:
    """Return bags of as many indices each, (B, N)."""
    if a.mode == "max":
        if counts_in is None:
            return op.ReduceMax(rows, ints(1), keepdims=0)
        return _or_zero(op.ReduceMax(op.Where(counts_in, rows, number(-float("inf"))), ints(1), keepdims=0))
    if counts_in is None:
        return (op.ReduceSum if a.mode == "sum" else op.ReduceMean)(rows, ints(1), keepdims=0)
    sums = op.ReduceSum(op.Where(counts_in, rows, number(0.0)), ints(1), keepdims=0)
    if a.mode == "sum":
        return sums
    count = op.ReduceSum(cast(counts_in, ir.DataType.FLOAT), ints(1), keepdims=0)
    return op.Div(sums, op.Max(count, number(1.0)))


def _offset_bags(a: Any, rows: Any, counts_in: Any) -> Any:
    """Return bags that begin at offsets: each row is added to its bag's, in order."""
    offsets = cast(a.offsets, ir.DataType.INT64)
    offsets = op.Slice(offsets, ints(0), ints(-1), ints(0)) if a.include_last_offset else offsets
    one = op.Constant(value_int=1)
    length = op.Shape(a.indices)
    places = op.Range(op.Constant(value_int=0), op.Squeeze(length, ints(0)), one)
    begun = op.GreaterOrEqual(op.Unsqueeze(places, ints(1)), op.Unsqueeze(offsets, ints(0)))
    bag = op.Sub(op.ReduceSum(cast(begun, ir.DataType.INT64), ints(1), keepdims=1), one)
    shape = op.Concat(op.Shape(offsets), ints(a.embedding_dim), axis=0)
    at = op.Expand(bag, op.Concat(length, ints(a.embedding_dim), axis=0))
    is_max = a.mode == "max"
    start = -float("inf") if is_max else 0.0
    rows = rows if counts_in is None else op.Where(counts_in, rows, number(start))
    empty = op.ConstantOfShape(shape, value=ir.tensor([start], dtype=ir.DataType.FLOAT))
    bags = op.ScatterElements(empty, at, rows, axis=0, reduction="max" if is_max else "add")
    if is_max:
        return _or_zero(bags)
    if a.mode == "sum":
        return bags
    ones = op.Expand(number(1.0), op.Concat(length, ints(1), axis=0)) if counts_in is None else counts_in
    none = op.ConstantOfShape(op.Concat(op.Shape(offsets), ints(1), axis=0), value=_ZERO)
    count = op.ScatterElements(none, bag, cast(ones, ir.DataType.FLOAT), axis=0, reduction="add")
    return op.Div(bags, op.Max(count, number(1.0)))


_ZERO = ir.tensor([0.0], dtype=ir.DataType.FLOAT)


def _or_zero(largest: Any) -> Any:
    """Return maxima, 0 where there was nothing."""
    return op.Where(op.IsInf(largest, detect_positive=0), number(0.0), largest)
