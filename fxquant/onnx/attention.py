"""Products of two activations, and attention: in float32, whose order of sums ONNX leaves open."""

from __future__ import annotations

from typing import Any

from onnxscript import ir
from onnxscript import opset21 as op

from fxquant.onnx.graph import Model, cast_like, ints, number, rank_of, to_float
from fxquant.ops.attention import scale_of


def matmul(_: Model, a: Any) -> Any:
    """Return a @ b."""
    return op.MatMul(a.a, a.b)


def attention(_: Model, a: Any) -> Any:
    """Return softmax(scale query keyᵀ + mask) value; a query that sees no key gets zeros."""
    query, key, value = (to_float(x) for x in (a.query, a.key, a.value))
    rank = rank_of(a.key)
    turned = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.Mul(op.MatMul(query, turned), number(scale_of(a.query, a.scale)))
    least = number(-float("inf"))
    if a.mask is not None and a.mask.dtype == ir.DataType.BOOL:
        scores = op.Where(a.mask, scores, least)
    elif a.mask is not None:
        scores = op.Add(scores, to_float(a.mask))
    if a.is_causal:
        scores = op.Where(_causal(scores), scores, least)
    weights = op.Softmax(scores, axis=-1)
    if a.mask is not None:
        sees = op.Greater(op.ReduceMax(scores, ints(-1), keepdims=1), least)
        weights = op.Where(sees, weights, number(0.0))
    return cast_like(op.MatMul(weights, value), a.query)


def _causal(scores: Any) -> Any:
    """Return (L, S) bool: True where key s ≤ query l."""
    size = op.Shape(scores, start=-2)
    ones = op.ConstantOfShape(size, value=ir.tensor([1], dtype=ir.DataType.INT64))
    return op.Cast(op.Trilu(ones, upper=0), to=int(ir.DataType.BOOL))
