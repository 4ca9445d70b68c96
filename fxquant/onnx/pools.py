"""Poolings, means and interpolation of integer values."""

from __future__ import annotations

import math
from typing import Any

from onnxscript import ir
from onnxscript import opset21 as op

from fxquant.onnx.graph import Model, cast, ints, number, rank_of
from fxquant.onnx.static import grid_of, real, to_integers


def mean_value(model: Model, a: Any) -> Any:
    """Return the mean over dimensions."""
    x = real(a.x, grid_of(model, a.x_scale, a.x_zero_point))
    dims, rank = sorted(dim % rank_of(a.x) for dim in a.dims), rank_of(a.x)
    if rank > 2 and dims == list(range(2, rank)):  # which runtimes fuse
        y = op.GlobalAveragePool(x)
        return to_integers(y, *_output(model, a)) if a.keepdim else _squeezed(model, a, y, dims)
    y = op.ReduceMean(x, ints(*dims), keepdims=int(a.keepdim))
    return to_integers(y, *_output(model, a))


def _output(model: Model, a: Any) -> tuple[Any, int]:
    return grid_of(model, a.scale, a.zero_point), a.qmax


def _squeezed(model: Model, a: Any, y: Any, dims: list[int]) -> Any:
    return op.Squeeze(to_integers(y, *_output(model, a)), ints(*dims))


def pool_value(model: Model, a: Any) -> Any:
    """Return the average pooling."""
    y = op.AveragePool(
        real(a.x, grid_of(model, a.x_scale, a.x_zero_point)),
        kernel_shape=list(a.kernel),
        strides=list(a.stride) or list(a.kernel),
        pads=[*a.padding, *a.padding],
        ceil_mode=int(a.ceil_mode),
        count_include_pad=int(a.count_include_pad or a.divisor is not None),
    )
    if a.divisor is not None:
        y = op.Mul(y, number(math.prod(a.kernel) / a.divisor))
    return to_integers(y, *_output(model, a))


def adaptive_pool_value(model: Model, a: Any) -> Any:
    """Return the adaptive average pooling to sizes that divide the input's."""
    x = real(a.x, grid_of(model, a.x_scale, a.x_zero_point))
    if all(size == 1 for size in a.size):
        return to_integers(op.GlobalAveragePool(x), *_output(model, a))
    windows = [int(n) // size for n, size in zip(a.x.shape[2:], a.size, strict=True)]
    return to_integers(op.AveragePool(x, kernel_shape=windows, strides=windows), *_output(model, a))


def max_pool_value(_: Model, a: Any) -> Any:
    """Return the max pooling."""
    y = op.MaxPool(
        a.x,
        kernel_shape=list(a.kernel),
        strides=list(a.stride) or list(a.kernel),
        pads=[*a.padding, *a.padding],
        dilations=list(a.dilation),
        ceil_mode=int(a.ceil_mode),
    )
    return y[0] if isinstance(y, (list, tuple)) else y


def resize_value(_: Model, a: Any) -> Any:
    """Return linear means of neighbours."""
    rank = rank_of(a.x)
    x = cast(a.x, ir.DataType.FLOAT)
    x = op.Unsqueeze(x, ints(2)) if rank == 3 else x  # runtimes have none of one dimension
    lead = [1] if rank == 3 else []
    mode = "align_corners" if a.align_corners else "half_pixel"
    options = {"mode": "linear", "coordinate_transformation_mode": mode}
    if a.size is not None:
        first = op.Shape(x, start=0, end=2)
        y = op.Resize(x, None, None, op.Concat(first, ints(*lead, *a.size), axis=0), **options)
    else:
        factors = [1.0, 1.0, *map(float, lead), *a.factors]
        y = op.Resize(x, None, op.Constant(value_floats=factors), None, **options)
    y = op.Squeeze(y, ints(2)) if rank == 3 else y
    return op.Cast(op.Round(y), to=int(ir.DataType.UINT8))


__all__ = ["adaptive_pool_value", "max_pool_value", "mean_value", "pool_value", "resize_value"]
