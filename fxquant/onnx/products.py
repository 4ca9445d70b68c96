"""Products of activations that are quantized token by token: docs/numerics.md, "Activations" and "Linear".

int8 weights are multiplied by MatMulInteger, exactly; int16 ones in float64, exactly; 4- and 3-bit ones are dequantized
in blocks and multiplied in float32, as float16 ones are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from onnxscript import ir
from onnxscript import opset21 as op

from fxquant.formats import FLOAT32, INT4, INT8, INT16, INT16_MAX, Activation, Format, format_of
from fxquant.numerics import FLOAT32_MAX, FLOAT32_TINY
from fxquant.onnx.graph import Model, cast, cast_like, ints, number, rank_of, shape_of, to_float, turned

Multiply = Callable[[Any, Any], Any]
"""(tokens, what is added to the products or None) -> products."""


@dataclass(frozen=True)
class Weight:
    """A weight as an operator of ours has it: values of the graph, and how they are stored."""

    format: Format
    values: Any
    scale: Any
    columns: int
    group_size: int


def linear(model: Model, a: Any) -> Any:
    """Return x @ dequantize(weight).T + bias."""
    columns = a.in_features or shape_of(a.weight)[1]
    weight = Weight(format_of(a.format), a.weight, a.scale, columns, a.group_size)
    is_vector = rank_of(a.x) == 1
    x = to_float(a.x)
    x = op.Unsqueeze(x, ints(0)) if is_vector else x
    y = multiplier(model, weight, a.per_token, a.qmax)(x, None if a.bias is None else to_float(a.bias))
    y = op.Relu(y) if a.relu else y
    return cast_like(op.Squeeze(y, ints(0)) if is_vector else y, a.x)


def multiplier(model: Model, weight: Weight, per_token: bool, qmax: int) -> Multiply:
    """Return the product with a weight, as a function: what depends on the weight alone is recorded once, now."""
    if weight.format is INT8:
        return _integer_multiplier(weight, per_token, qmax)
    if weight.format is INT16:
        return _wide_multiplier(weight, per_token)
    real = _real(model, weight)
    if weight.format.activation is Activation.FLOAT:
        return lambda x, start: _add(start, op.MatMul(x, real))

    def multiply(x: Any, start: Any) -> Any:
        q, scale, zero_point = quantize_tokens(x, per_token, qmax)
        return _add(start, op.Mul(op.MatMul(op.Sub(q, zero_point), real), scale))

    return multiply


def quantize_tokens(x: Any, per_token: bool, qmax: int) -> tuple[Any, Any, Any]:
    """Return (q, scale, zero point) of each token: whole numbers in float32, and a number a token, (..., 1)."""
    low, high = _range(x, per_token)
    low, high = op.Clip(low, number(-FLOAT32_MAX), number(0.0)), op.Clip(high, number(0.0), number(FLOAT32_MAX))
    half = number(0.5)
    scale = _at_least_tiny(op.Div(op.Sub(op.Mul(high, half), op.Mul(low, half)), number(qmax * 0.5)))
    inverse = op.Div(number(1.0), scale)
    most = number(float(qmax))
    zero_point = op.Clip(op.Round(op.Mul(low, op.Neg(inverse))), number(0.0), most)
    return op.Clip(op.Add(op.Round(op.Mul(x, inverse)), zero_point), number(0.0), most), scale, zero_point


def _range(x: Any, per_token: bool) -> tuple[Any, Any]:
    axes = ints(-1) if per_token else None
    return op.ReduceMin(x, axes, keepdims=1), op.ReduceMax(x, axes, keepdims=1)


def _at_least_tiny(scale: Any) -> Any:
    return op.Where(op.Less(scale, number(FLOAT32_TINY)), number(1.0), scale)


def _add(start: Any, product: Any) -> Any:
    return product if start is None else op.Add(product, start)


def _integer_multiplier(weight: Weight, per_token: bool, qmax: int) -> Multiply:
    """(q - z) W = q W - z times the weights' sums, all of it in int32. ONNX Runtime takes no zero point a token."""
    values = turned(weight.values)
    sums = op.ReduceSum(cast(values, ir.DataType.INT32), ints(0), keepdims=0)
    weight_scale = op.Reshape(to_float(weight.scale), ints(-1))

    def multiply(x: Any, start: Any) -> Any:
        q, scale, zero_point = quantize_tokens(x, per_token, qmax)
        products = op.MatMulInteger(cast(q, ir.DataType.UINT8), values)
        total = op.Sub(products, op.Mul(cast(zero_point, ir.DataType.INT32), sums))
        return _add(start, op.Mul(cast(total, ir.DataType.FLOAT), op.Mul(scale, weight_scale)))

    return multiply


def _wide_multiplier(weight: Weight, per_token: bool) -> Multiply:
    """Whole numbers of 16 bits: their products and sums are exact in float64."""
    values = cast(turned(weight.values), ir.DataType.DOUBLE)
    weight_scale = op.Reshape(to_float(weight.scale), ints(-1))

    def multiply(x: Any, start: Any) -> Any:
        low, high = _range(x, per_token)
        largest = op.Min(op.Max(op.Neg(low), high), number(FLOAT32_MAX))
        scale = _at_least_tiny(op.Div(largest, number(float(INT16_MAX))))
        inverse = op.Neg(
            op.Div(number(-1.0), scale)
        )  # ONNX Runtime makes x / s of (1 / s) x, and that rounds otherwise
        q = op.Round(op.Mul(x, inverse))
        q = op.Clip(q, number(-float(INT16_MAX)), number(float(INT16_MAX)))
        total = cast(op.MatMul(cast(q, ir.DataType.DOUBLE), values), ir.DataType.FLOAT)
        return _add(start, op.Mul(total, op.Mul(scale, weight_scale)))

    return multiply


def _real(model: Model, weight: Weight) -> Any:
    """Return a weight as (K, N) float32, computed from what is stored: by a runtime once, when it loads the file.

    Not by DequantizeLinear in blocks: ONNX Runtime 1.32 computes that at each call, or makes a MatMulNBits of it, which
    rounds the activations once more, to 8 bits in blocks.
    """
    if weight.format.activation is Activation.FLOAT:
        values = turned(weight.values)
        return values if weight.format is FLOAT32 else cast(values, ir.DataType.FLOAT)
    scale = op.Unsqueeze(cast(weight.scale, ir.DataType.FLOAT), ints(2))
    size, columns = weight.group_size, weight.columns
    if weight.format is INT4:
        integers = model.store("int4", [weight.values], lambda w: _int4(INT4.unpack(w, columns)))
    else:
        integers = _unpack_int3(weight)
    whole = cast(integers, ir.DataType.FLOAT)
    if columns % size:
        whole = op.Pad(whole, ints(0, 0, 0, size - columns % size))
    grouped = op.Reshape(whole, ints(0, -1, size))
    real = op.Reshape(op.Mul(grouped, scale), ints(0, -1))
    real = op.Slice(real, ints(0), ints(columns), ints(1)) if columns % size else real
    return op.Transpose(real, perm=[1, 0])


def _int4(values: torch.Tensor) -> Any:
    """Return an ONNX tensor of signed 4-bit integers, two a byte in the file."""
    import ml_dtypes

    return ir.tensor(values.contiguous().numpy().astype(ml_dtypes.int4))


def _unpack_int3(weight: Weight) -> Any:
    """Return (N, K) whole numbers -4 to 3 in int32, from eight in three bytes: docs/numerics.md, "int3 block"."""
    rows, stored = shape_of(weight.values)
    blocks = op.Reshape(weight.values, ints(rows, stored // 3, 3))
    pieces = op.BitwiseAnd(blocks, _byte(3))
    shifts = op.Constant(value=ir.tensor([0, 2, 4], dtype=ir.DataType.UINT8))
    moved = cast(op.BitShift(pieces, shifts, direction="LEFT"), ir.DataType.INT32)
    first = cast(op.ReduceSum(moved, ints(2), keepdims=1), ir.DataType.UINT8)
    pairs = op.Concat(first, _right(blocks, 2), axis=2)
    both = op.Concat(
        op.Unsqueeze(op.BitwiseAnd(pairs, _byte(7)), ints(3)), op.Unsqueeze(_right(pairs, 3), ints(3)), axis=3
    )
    flat = op.Reshape(both, ints(rows, stored // 3 * 8))
    kept = op.Slice(flat, ints(0), ints(weight.columns), ints(1))
    return op.Sub(cast(kept, ir.DataType.INT32), op.Constant(value=ir.tensor([4], dtype=ir.DataType.INT32)))


def _byte(value: int) -> Any:
    return op.Constant(value=ir.tensor([value], dtype=ir.DataType.UINT8))


def _right(x: Any, bits: int) -> Any:
    return op.BitShift(x, _byte(bits), direction="RIGHT")
