"""The operators on integer values: a value is uint8, x ≈ (q - zero_point) * scale, with one scale for all of it.

Each gives what float arithmetic on the values that its integers stand for gives, quantized: single float32 operations
in a stated order, and sums of integers, which are exact. So a graph may quantize and dequantize anywhere, and one
operator may do the work of several, with the same bits. docs/numerics.md, "Static values".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxquant.errors import DTypeError, ShapeError
from fxquant.numerics import dequantize_value, quantize_value
from fxquant.ops.gpu import OnGpu, has_usual_qparams, lies_alike
from fxquant.ops.library import bare
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
    """Return table[q]: any function of single values. q: uint8; table: (256,) uint8 -> uint8, lying as q does."""
    return _lookup((q, table))


@public
def lookup_channels(q: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return table[channel, q]: any function of single values and their channel, dimension 1.

    q: (B, C, ...) uint8; table: (C, 256) uint8 -> uint8 in q's shape. Raises ShapeError for another number of channels.
    """
    return _lookup_channels((q, table))


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
def pad_value(x: torch.Tensor, zero_point: torch.Tensor, pad: Sequence[int]) -> torch.Tensor:
    """Return a uint8 value padded with real 0, which is its zero point; pad: as F.pad takes it."""
    return _pad((x, zero_point, pad))


def clamped(y: torch.Tensor, low: float | None, high: float | None) -> torch.Tensor:
    """Return a float tensor of ours clamped in place; None: no bound."""
    return y if low is None and high is None else y.clamp_(low, high)


_BY_PIXELS = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout(x: torch.Tensor) -> torch.memory_format:
    """Return the memory format of a tensor with channels, as that of what convolutions and pools make of it."""
    by_pixels = _BY_PIXELS.get(x.dim())
    if by_pixels is None or x.is_contiguous() or not x.is_contiguous(memory_format=by_pixels):
        return torch.contiguous_format
    return by_pixels


def by_pixels(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor with channels, or a copy, that lies pixel by pixel, as the kernels want it."""
    return bare(x).movedim(1, -1).contiguous().movedim(-1, 1)


def as_it_lies(a: Any) -> Any:
    """Return arguments whose x, or a copy, is dense, by rows or by pixels."""
    return a._replace(x=bare(a.x).contiguous(memory_format=layout(a.x)))


def check_value(name: str, x: torch.Tensor) -> None:
    """Raise DTypeError unless x is uint8."""
    if x.dtype != torch.uint8:
        raise DTypeError(f"{name} of a static model takes uint8 values, got {x.dtype}; fxquant.ops.quantize makes them")


def _check_pair(name: str) -> Callable[[Any], None]:
    def check(a: Any) -> None:
        check_value(name, a.a)
        check_value(name, a.b)

    return check


def _check_float(a: Any) -> None:
    if not a.x.is_floating_point():
        raise DTypeError(f"quantize takes a float tensor, got {a.x.dtype}; call x.float() before it")


def _check_channels(a: Any) -> None:
    check_value("lookup_channels", a.q)
    if a.q.dim() < 2 or a.q.shape[1] != a.table.shape[0]:
        channels, got = a.table.shape[0], tuple(a.q.shape)
        raise ShapeError(f"lookup_channels of {channels} channels takes x with so many in dimension 1, got {got}")


def _lookup_channels_reference(a: Any) -> torch.Tensor:
    first = torch.arange(0, a.table.numel(), 256, dtype=torch.int32, device=a.q.device)
    at = a.q.to(torch.int32) + first.view(-1, *[1] * (a.q.dim() - 2))
    found: torch.Tensor = a.table.view(-1).index_select(0, at.reshape(-1)).view(a.q.shape)
    return found.contiguous(memory_format=layout(a.q))


def _pad_reference(a: Any) -> torch.Tensor:
    centred = F.pad(a.x.to(torch.int16).sub_(a.zero_point), list(a.pad))
    padded: torch.Tensor = centred.add_(a.zero_point).to(torch.uint8)
    return padded.contiguous(memory_format=layout(a.x))


def _add_reference(a: Any) -> torch.Tensor:
    real = dequantize_value(a.a, a.a_scale, a.a_zero_point)
    other = dequantize_value(a.b, a.b_scale, a.b_zero_point)
    total = real - other if a.alpha < 0 else real + other
    return quantize_value(clamped(total, a.low, a.high), a.scale, a.zero_point, a.qmax)


def _mul_reference(a: Any) -> torch.Tensor:
    product = dequantize_value(a.a, a.a_scale, a.a_zero_point) * dequantize_value(a.b, a.b_scale, a.b_zero_point)
    return quantize_value(clamped(product, a.low, a.high), a.scale, a.zero_point, a.qmax)


def _pair_fake(a: Any) -> torch.Tensor:
    return torch.empty_like(a.a.to(torch.float32) + a.b.to(torch.float32), dtype=torch.uint8)


def _prepare_pair(a: Any) -> Any:
    """Return a pair as the library takes it: a whole, pixel by pixel, and b like it, or a value for each channel."""
    x, y = _unexpanded(bare(a.a), a.b), _unexpanded(bare(a.b), a.a)
    shape: torch.Size = torch.broadcast_shapes(x.shape, y.shape)  # type: ignore[no-untyped-call]
    whole, other = (a.a_scale, a.a_zero_point), (a.b_scale, a.b_zero_point)
    if x.shape != shape and getattr(a, "alpha", 1.0) > 0:
        x, y, whole, other = y, x, other, whole
    by_channel = (*shape[:2], *[1] * (len(shape) - 2))
    if x.shape != shape or len(shape) < 2:
        return a
    y = y.contiguous() if len(shape) > 3 and y.shape == by_channel else by_pixels(y.expand(shape))
    names = ("a", "a_scale", "a_zero_point", "b", "b_scale", "b_zero_point")
    return a._replace(**dict(zip(names, (by_pixels(x), *whole, y, *other), strict=True)))


def _unexpanded(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return x with size 1 where it was expanded to the size of what it is combined with: x.expand_as(other)."""
    for dim in range(-min(x.dim(), other.dim()), 0):
        if x.stride(dim) == 0 != other.stride(dim) and x.shape[dim] == other.shape[dim]:
            x = x.narrow(dim, 0, 1)
    return x


def _finish_pair(out: torch.Tensor, a: Any) -> torch.Tensor:
    """Return the library's output lying in memory as the reference's does: mostly as a."""
    like = torch.empty_like(a.a)
    if a.a.shape != out.shape or a.a.stride() != like.stride():
        like = _pair_fake(a)
    return out if out.stride() == like.stride() else like.copy_(out)


_QPARAMS = "Tensor scale, Tensor zero_point"
_PAIR = f"(Tensor a, Tensor a_scale, Tensor a_zero_point, Tensor b, Tensor b_scale, Tensor b_zero_point, {_QPARAMS}, "


def register_value(
    function: Any,
    schema: str,
    reference: Callable[[Any], torch.Tensor],
    check: Callable[[Any], object],
    fake: Callable[[Any], torch.Tensor],
    prepare: Callable[[Any], Any] = lambda a: a,
    finish: Callable[[torch.Tensor, Any], torch.Tensor] = lambda out, _: out,
    on_gpu: OnGpu | None = None,
) -> Callable[[tuple[Any, ...]], torch.Tensor]:
    """Register an operator on integer values, and return what calls it."""
    kernel: Kernel[torch.Tensor] = Kernel(
        name=function.__name__,
        schema=schema,
        arguments=arguments_of(function),
        reference=reference,
        check=check,
        fake=fake,
        prepare=prepare,
        finish=finish,
        on_gpu=on_gpu,
    )
    return kernel.register()


_quantize = register_value(
    quantize,
    f"(Tensor x, {_QPARAMS}, int qmax=255) -> Tensor",
    lambda a: quantize_value(a.x, a.scale, a.zero_point, a.qmax),
    _check_float,
    lambda a: torch.empty_like(a.x, dtype=torch.uint8),
    on_gpu=OnGpu("triton_values", "quantize", has_usual_qparams),
)
_dequantize = register_value(
    dequantize,
    f"(Tensor q, {_QPARAMS}) -> Tensor",
    lambda a: dequantize_value(a.q, a.scale, a.zero_point),
    lambda a: check_value("dequantize", a.q),
    lambda a: torch.empty_like(a.q, dtype=torch.float32),
    on_gpu=OnGpu("triton_values", "dequantize", has_usual_qparams),
)
_lookup = register_value(
    lookup,
    "(Tensor q, Tensor table) -> Tensor",
    lambda a: torch.empty_like(a.q).copy_(a.table.index_select(0, a.q.reshape(-1).to(torch.int32)).view(a.q.shape)),
    lambda a: check_value("lookup", a.q),
    lambda a: torch.empty_like(a.q),
    on_gpu=OnGpu("triton_values", "lookup"),
)
_lookup_channels = register_value(
    lookup_channels,
    "(Tensor q, Tensor table) -> Tensor",
    _lookup_channels_reference,
    _check_channels,
    lambda a: torch.empty_like(a.q, memory_format=layout(a.q)),
    lambda a: a._replace(q=bare(a.q).contiguous(memory_format=layout(a.q)), table=a.table.contiguous()),
)
_add = register_value(
    add_values,
    f"{_PAIR}int qmax=255, float alpha=1.0, float? low=None, float? high=None) -> Tensor",
    _add_reference,
    _check_pair("add_values"),
    _pair_fake,
    _prepare_pair,
    _finish_pair,
    on_gpu=OnGpu("triton_values", "add", lies_alike),
)
_mul = register_value(
    mul_values,
    f"{_PAIR}int qmax=255, float? low=None, float? high=None) -> Tensor",
    _mul_reference,
    _check_pair("mul_values"),
    _pair_fake,
    _prepare_pair,
    _finish_pair,
    on_gpu=OnGpu("triton_values", "mul", lies_alike),
)
_pad = register_value(
    pad_value,
    "(Tensor x, Tensor zero_point, SymInt[] pad) -> Tensor",
    _pad_reference,
    lambda a: check_value("pad_value", a.x),
    lambda a: F.pad(a.x, list(a.pad)).contiguous(memory_format=layout(a.x)),
    as_it_lies,
)
