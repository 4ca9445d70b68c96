"""The operators on integer values: a value is uint8, x ≈ (q - zero_point) * scale, with one scale for all of it.

Each gives what float arithmetic on the values that its integers stand for gives, quantized: single float32 operations
in a stated order, and sums of integers, which are exact. So a graph may quantize and dequantize anywhere, and one
operator may do the work of several, with the same bits. docs/numerics.md, "values".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxquant.errors import DTypeError
from fxquant.numerics import dequantize_value, quantize_value
from fxquant.ops.register import Kernel, arguments_of, public


@public
def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmax: int = 255) -> torch.Tensor:
    """Return clamp(round(x / scale) + zero_point, 0, qmax), a uint8 tensor in x's shape and memory format.

    x: float; scale: () float32; zero_point: () int32. Rounds half to even; NaN gives zero_point.
    DTypeError for an x that is not floating point.
    """
    return _quantize((x, scale, zero_point, qmax))


@public
def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Return (q - zero_point) * scale: uint8 -> float32, in the same shape and memory format."""
    return _dequantize((q, scale, zero_point))


@public
def lookup(q: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return table[q]: any function of single values. q: uint8; table: (256,) uint8 -> uint8 in q's shape."""
    return _lookup((q, table))


@public
def add_values(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_zero_point: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_zero_point: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    qmax: int = 255,
    alpha: float = 1.0,
    low: float | None = None,
    high: float | None = None,
) -> torch.Tensor:
    """Return a + alpha b of two uint8 values, clamped to [low, high], as uint8 under (scale, zero_point).

    The shapes are broadcast; alpha: ±1.
    """
    return _add((a, a_scale, a_zero_point, b, b_scale, b_zero_point, scale, zero_point, qmax, alpha, low, high))


@public
def mul_values(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_zero_point: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_zero_point: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    qmax: int = 255,
    low: float | None = None,
    high: float | None = None,
) -> torch.Tensor:
    """Return a b of two uint8 values, clamped to [low, high], as uint8 under (scale, zero_point), broadcast."""
    return _mul((a, a_scale, a_zero_point, b, b_scale, b_zero_point, scale, zero_point, qmax, low, high))


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
    return _pool(
        (x, x_scale, x_zero_point, scale, zero_point, kernel, stride, padding, ceil_mode, count_include_pad)
        + (divisor, qmax)
    )


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
def pad_value(x: torch.Tensor, zero_point: torch.Tensor, pad: Sequence[int]) -> torch.Tensor:
    """Return a uint8 value padded with real 0, which is its zero point; pad: as F.pad takes it."""
    return _pad((x, zero_point, pad))


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


def clamped(y: torch.Tensor, low: float | None, high: float | None) -> torch.Tensor:
    """Return a float tensor of ours clamped in place; None: no bound."""
    return y if low is None and high is None else y.clamp_(low, high)


def check_value(name: str, x: torch.Tensor) -> None:
    """Raise DTypeError unless x is uint8."""
    if x.dtype != torch.uint8:
        raise DTypeError(f"{name} of a static model takes uint8 values, got {x.dtype}; fxquant.ops.quantize makes them")


def _check_float(a: Any) -> None:
    if not a.x.is_floating_point():
        raise DTypeError(f"quantize takes a float tensor, got {a.x.dtype}; call x.float() before it")


def _add_reference(a: Any) -> torch.Tensor:
    real = dequantize_value(a.a, a.a_scale, a.a_zero_point)
    other = dequantize_value(a.b, a.b_scale, a.b_zero_point)
    total = real - other if a.alpha < 0 else real + other
    return quantize_value(clamped(total, a.low, a.high), a.scale, a.zero_point, a.qmax)


def _mul_reference(a: Any) -> torch.Tensor:
    product = dequantize_value(a.a, a.a_scale, a.a_zero_point) * dequantize_value(a.b, a.b_scale, a.b_zero_point)
    return quantize_value(clamped(product, a.low, a.high), a.scale, a.zero_point, a.qmax)


def _mean_reference(a: Any) -> torch.Tensor:
    count = math.prod(a.x.shape[dim] for dim in a.dims)
    sums = a.x.to(torch.int32).sub_(a.x_zero_point).sum(tuple(a.dims), keepdim=a.keepdim)
    return _averaged(a, sums.to(torch.float64) / count)


def _averaged(a: Any, average: torch.Tensor) -> torch.Tensor:
    """Return an average of centred integers, in float64, as the value that it stands for."""
    return quantize_value(average.to(torch.float32) * a.x_scale, a.scale, a.zero_point, a.qmax)


_POOLS: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def _run_pool(a: Any, x: torch.Tensor) -> torch.Tensor:
    options = (list(a.kernel), list(a.stride), list(a.padding), a.ceil_mode, a.count_include_pad)
    more = () if a.divisor is None else (a.divisor,)
    return _POOLS[len(a.kernel)](x, *options, *more)  # type: ignore[no-any-return]


def _run_adaptive(a: Any, x: torch.Tensor) -> torch.Tensor:
    return _ADAPTIVE[len(a.size)](x, list(a.size))  # type: ignore[no-any-return]


def _run_max_pool(a: Any) -> torch.Tensor:
    options = [list(part) for part in (a.kernel, a.stride, a.padding, a.dilation)]
    if len(a.kernel) == 1:  # torch has none of rank 1 for uint8
        wide = [[neutral, *part] for neutral, part in zip((1, 1, 0, 1), options, strict=True)]
        return F.max_pool2d(a.x.unsqueeze(-2), *wide, ceil_mode=a.ceil_mode).squeeze(-2)  # type: ignore[arg-type]
    pool = F.max_pool2d if len(a.kernel) == 2 else F.max_pool3d
    return pool(a.x, *options, ceil_mode=a.ceil_mode)  # type: ignore[arg-type]


def _centred(a: Any) -> torch.Tensor:
    return a.x.to(torch.float64).sub_(a.x_zero_point)  # type: ignore[no-any-return]


def _mean_fake(a: Any) -> torch.Tensor:
    dims = {dim % a.x.dim() for dim in a.dims}
    shape = [1 if d in dims else size for d, size in enumerate(a.x.shape) if a.keepdim or d not in dims]
    return a.x.new_empty(shape)


def _pair_fake(a: Any) -> torch.Tensor:
    return torch.empty_like(a.a + a.b)


_QPARAMS = "Tensor scale, Tensor zero_point"
_PAIR = f"(Tensor a, Tensor a_scale, Tensor a_zero_point, Tensor b, Tensor b_scale, Tensor b_zero_point, {_QPARAMS}, "


def _kernel(function: Any, schema: str, reference: Any, check: Any, fake: Any) -> Any:
    kernel: Kernel[torch.Tensor] = Kernel(
        name=function.__name__,
        schema=schema,
        arguments=arguments_of(function),
        reference=reference,
        check=check,
        fake=fake,
        prepare=lambda a: None,
        finish=lambda out, a: out,
        is_native=False,
    )
    return kernel.register()


_quantize = _kernel(
    quantize,
    f"(Tensor x, {_QPARAMS}, int qmax=255) -> Tensor",
    lambda a: quantize_value(a.x, a.scale, a.zero_point, a.qmax),
    _check_float,
    lambda a: torch.empty_like(a.x, dtype=torch.uint8),
)
_dequantize = _kernel(
    dequantize,
    f"(Tensor q, {_QPARAMS}) -> Tensor",
    lambda a: dequantize_value(a.q, a.scale, a.zero_point),
    lambda a: check_value("dequantize", a.q),
    lambda a: torch.empty_like(a.q, dtype=torch.float32),
)
_lookup = _kernel(
    lookup,
    "(Tensor q, Tensor table) -> Tensor",
    lambda a: a.table.index_select(0, a.q.reshape(-1).to(torch.int32)).view(a.q.shape),
    lambda a: check_value("lookup", a.q),
    lambda a: torch.empty_like(a.q, memory_format=torch.contiguous_format),
)
_add = _kernel(
    add_values,
    f"{_PAIR}int qmax=255, float alpha=1.0, float? low=None, float? high=None) -> Tensor",
    _add_reference,
    lambda a: (check_value("add_values", a.a), check_value("add_values", a.b)),
    _pair_fake,
)
_mul = _kernel(
    mul_values,
    f"{_PAIR}int qmax=255, float? low=None, float? high=None) -> Tensor",
    _mul_reference,
    lambda a: (check_value("mul_values", a.a), check_value("mul_values", a.b)),
    _pair_fake,
)
_mean = _kernel(
    mean_value,
    f"(Tensor x, Tensor x_scale, Tensor x_zero_point, {_QPARAMS}, int[] dims, bool keepdim=False, int qmax=255)"
    " -> Tensor",
    _mean_reference,
    lambda a: check_value("mean_value", a.x),
    _mean_fake,
)
_pool = _kernel(
    pool_value,
    f"(Tensor x, Tensor x_scale, Tensor x_zero_point, {_QPARAMS}, int[] kernel, int[] stride, int[] padding,"
    " bool ceil_mode=False, bool count_include_pad=True, int? divisor=None, int qmax=255) -> Tensor",
    lambda a: _averaged(a, _run_pool(a, _centred(a))),
    lambda a: check_value("pool_value", a.x),
    lambda a: _run_pool(a, a.x.to(torch.float64)).to(torch.uint8),
)
_adaptive_pool = _kernel(
    adaptive_pool_value,
    f"(Tensor x, Tensor x_scale, Tensor x_zero_point, {_QPARAMS}, SymInt[] size, int qmax=255) -> Tensor",
    lambda a: _averaged(a, _run_adaptive(a, _centred(a))),
    lambda a: check_value("adaptive_pool_value", a.x),
    lambda a: _run_adaptive(a, a.x.to(torch.float64)).to(torch.uint8),
)
_pad = _kernel(
    pad_value,
    "(Tensor x, Tensor zero_point, SymInt[] pad) -> Tensor",
    lambda a: F.pad(a.x.to(torch.int16).sub_(a.zero_point), list(a.pad)).add_(a.zero_point).to(torch.uint8),
    lambda a: check_value("pad_value", a.x),
    lambda a: F.pad(a.x, list(a.pad)),
)
_max_pool = _kernel(
    max_pool_value,
    "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode=False) -> Tensor",
    _run_max_pool,
    lambda a: check_value("max_pool_value", a.x),
    _run_max_pool,
)
