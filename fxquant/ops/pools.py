"""Poolings and means of integer values: sums are exact, and an average is divided in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxquant.numerics import divided, quantize_value
from fxquant.ops.register import public
from fxquant.ops.values import by_pixels, check_value, layout, register_value


@public
def mean_value(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    dims: Sequence[int],
    keepdim: bool = False,
    qmax: int = 255,
) -> torch.Tensor:
    """Return the mean of a uint8 value over dimensions, as uint8: its sum is exact, and divided in float64."""
    return _mean((x, x_scale, x_zero_point, scale, zero_point, dims, keepdim, qmax))


@public
def pool_value(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
    qmax: int = 255,
) -> torch.Tensor:
    """Return the average pooling of a uint8 value, as uint8; kernel, stride, padding: a number a dimension."""
    values = (x, x_scale, x_zero_point, scale, zero_point)
    return _pool((*values, kernel, stride, padding, ceil_mode, count_include_pad, divisor, qmax))


@public
def adaptive_pool_value(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    size: Sequence[int],
    qmax: int = 255,
) -> torch.Tensor:
    """Return the adaptive average pooling of a uint8 value to a size, as uint8."""
    return _adaptive_pool((x, x_scale, x_zero_point, scale, zero_point, size, qmax))


@public
def max_pool_value(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> torch.Tensor:
    """Return the max pooling of a uint8 value, whose scale it keeps; a number a dimension each."""
    return _max_pool((x, kernel, stride, padding, dilation, ceil_mode))


def _mean_reference(a: Any) -> torch.Tensor:
    count = math.prod(a.x.shape[dim] for dim in a.dims)
    sums = a.x.to(torch.int32).sub_(a.x_zero_point).sum(tuple(a.dims), keepdim=a.keepdim)
    return _averaged(a, divided(sums.to(torch.float64), count))


def _averaged(a: Any, average: torch.Tensor) -> torch.Tensor:
    """Return an average of centred integers, in float64, as the value that it stands for."""
    return quantize_value(average.to(torch.float32) * a.x_scale, a.scale, a.zero_point, a.qmax)


_POOLS: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _run_pool(a: Any, x: torch.Tensor) -> torch.Tensor:
    options = (list(a.kernel), list(a.stride), list(a.padding), a.ceil_mode, a.count_include_pad)
    more = () if a.divisor is None else (a.divisor,)
    y: torch.Tensor = _POOLS[len(a.kernel)](x, *options, *more)
    return y


def _run_adaptive(a: Any, x: torch.Tensor) -> torch.Tensor:
    sizes = list(zip(x.shape[2:], a.size, strict=True))
    if 0 in a.size:
        return x.new_empty(*x.shape[:2], *a.size)
    if all(n % out == 0 for n, out in sizes):  # a sum, divided once
        y: torch.Tensor = _POOLS[len(sizes)](x, [n // out for n, out in sizes])
        return y
    counts = []
    for dim, (n, out) in enumerate(sizes, 2):  # whole numbers: differences of running sums are exact
        at = torch.arange(out, device=x.device)
        first, last = at * n // out, ((at + 1) * n + out - 1) // out
        sums = F.pad(x.movedim(dim, -1).cumsum(-1), (1, 0))
        x = (sums.index_select(-1, last) - sums.index_select(-1, first)).movedim(-1, dim)
        counts.append((last - first).to(x.dtype).view(-1, *[1] * (x.dim() - dim - 1)))
    return functools.reduce(torch.div, counts, x)  # as torch divides on the CPU


def _run_max_pool(a: Any) -> torch.Tensor:
    options: list[Any] = [list(part) for part in (a.kernel, a.stride, a.padding, a.dilation)]
    pool: Any = F.max_pool3d if len(a.kernel) == 3 else F.max_pool2d
    x: torch.Tensor = a.x.contiguous()  # torch refuses more than 255 pixels of uint8 in channels_last
    x = x if x.is_cpu else x.to(torch.float32)  # on a GPU torch pools floats alone
    y: torch.Tensor
    if len(a.kernel) == 1:  # torch has none of rank 1 for uint8
        wide = [[neutral, *part] for neutral, part in zip((1, 1, 0, 1), options, strict=True)]
        y = pool(x.unsqueeze(-2), *wide, ceil_mode=a.ceil_mode).squeeze(-2)
    else:
        y = pool(x, *options, ceil_mode=a.ceil_mode)
    return y.to(torch.uint8).contiguous(memory_format=layout(a.x))


def _prepare(a: Any) -> Any:
    return a._replace(x=by_pixels(a.x))


def _prepare_mean(a: Any) -> Any:
    is_spatial = a.x.dim() > 2 and {dim % a.x.dim() for dim in a.dims} == set(range(2, a.x.dim()))
    return _prepare(a) if is_spatial else a


def _as_input(out: torch.Tensor, a: Any) -> torch.Tensor:
    return out.contiguous(memory_format=layout(a.x))


def _centred(a: Any) -> torch.Tensor:
    centred: torch.Tensor = a.x.to(torch.float64).sub_(a.x_zero_point)
    return centred


def _mean_fake(a: Any) -> torch.Tensor:
    dims = {dim % a.x.dim() for dim in a.dims}
    shape = [1 if d in dims else size for d, size in enumerate(a.x.shape) if a.keepdim or d not in dims]
    y: torch.Tensor = a.x.new_empty(shape)
    return y


_QPARAMS = "Tensor scale, Tensor zero_point"
_mean = register_value(
    mean_value,
    f"(Tensor x, Tensor x_scale, Tensor x_zero_point, {_QPARAMS}, int[] dims, bool keepdim=False, int qmax=255)"
    " -> Tensor",
    _mean_reference,
    lambda a: check_value("mean_value", a.x),
    _mean_fake,
    _prepare_mean,
)
_pool = register_value(
    pool_value,
    f"(Tensor x, Tensor x_scale, Tensor x_zero_point, {_QPARAMS}, int[] kernel, int[] stride, int[] padding,"
    " bool ceil_mode=False, bool count_include_pad=True, int? divisor=None, int qmax=255) -> Tensor",
    lambda a: _as_input(_averaged(a, _run_pool(a, _centred(a))), a),
    lambda a: check_value("pool_value", a.x),
    lambda a: _as_input(_run_pool(a, a.x.to(torch.float64)).to(torch.uint8), a),
    _prepare,
    _as_input,
)
_adaptive_pool = register_value(
    adaptive_pool_value,
    f"(Tensor x, Tensor x_scale, Tensor x_zero_point, {_QPARAMS}, SymInt[] size, int qmax=255) -> Tensor",
    lambda a: _as_input(_averaged(a, _run_adaptive(a, _centred(a))), a),
    lambda a: check_value("adaptive_pool_value", a.x),
    lambda a: _as_input(_run_adaptive(a, a.x.to(torch.float64)).to(torch.uint8), a),
    _prepare,
    _as_input,
)
_max_pool = register_value(
    max_pool_value,
    "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode=False) -> Tensor",
    _run_max_pool,
    lambda a: check_value("max_pool_value", a.x),
    _run_max_pool,
    _prepare,
    _as_input,
)
