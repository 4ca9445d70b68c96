"""The static products: uint8 values by int8 weights, exact int32 sums, and float or uint8 results.

A result is what the float epilogue gives, (Σ (q - z) w) (s_x s_w) + bias + addend, clamped or bent by a curve, and
then, where it is to be an integer, quantized as `quantize` does: docs/numerics.md, "static product".
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxquant.errors import ArgumentError, ShapeError
from fxquant.numerics import dequantize_value, quantize_value
from fxquant.ops.elementwise import CURVES, curved
from fxquant.ops.gpu import OnGpu
from fxquant.ops.library import plain
from fxquant.ops.linear import EXACT_COLUMNS, integer_matmul
from fxquant.ops.register import public
from fxquant.ops.values import by_pixels, check_value, clamped, layout, register_value

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_HAS_EXACT_FLOATS = platform.machine().lower() in ("x86_64", "amd64")  # its float32 convolutions only multiply and add


@public
def static_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    addend_scale: torch.Tensor | None = None,
    addend_zero_point: torch.Tensor | None = None,
    qmax: int = 255,
    low: float | None = None,
    high: float | None = None,
    curve: str | None = None,
    slope: float = 0.0,
) -> torch.Tensor:
    """Return x @ weight.T + bias + addend, clamped to [low, high]: float32, or uint8 under (scale, zero_point).

    x: (..., I) uint8; weight: (O, I) int8; weight_scale: (O,) float32; bias: (O,) or None; addend: (..., O) uint8.
    curve: "leaky_relu" with this slope, "hardswish" or "silu", in place of bounds; None: none of them.
    """
    product = (x, x_scale, x_zero_point, weight, weight_scale, bias, scale, zero_point)
    return _linear((*product, addend, addend_scale, addend_zero_point, qmax, low, high, curve, slope))


@public
def static_convolution(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    is_transposed: bool = False,
    output_padding: Sequence[int] = (),
    addend: torch.Tensor | None = None,
    addend_scale: torch.Tensor | None = None,
    addend_zero_point: torch.Tensor | None = None,
    qmax: int = 255,
    low: float | None = None,
    high: float | None = None,
    curve: str | None = None,
    slope: float = 0.0,
) -> torch.Tensor:
    """Return a convolution of uint8 values by int8 weights + bias + addend, clamped: float32, or uint8.

    x: (B, I, L), (B, I, H, W) or (B, I, D, H, W); weight: (O, I / groups, ...), of a transposed one
    (I, O / groups, ...); weight_scale: (O,). padding: before and after in each dimension, with real 0. curve, slope: as
    of `static_linear`.
    """
    product = (x, x_scale, x_zero_point, weight, weight_scale, bias, scale, zero_point)
    windows = (stride, padding, dilation, groups, is_transposed, output_padding)
    ending = (addend, addend_scale, addend_zero_point, qmax, low, high, curve, slope)
    return _convolution((*product, *windows, *ending))


def _finish(sums: torch.Tensor, a: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Return what a product gives of its int32 sums. shape: that in which a number an output channel is broadcast."""
    y: torch.Tensor = sums.to(torch.float32).mul_((a.weight_scale * a.x_scale).view(shape))
    if a.bias is not None:
        y.add_(a.bias.to(torch.float32).view(shape))
    if a.addend is not None:
        y.add_(dequantize_value(a.addend, a.addend_scale, a.addend_zero_point))
    y = clamped(curved(y, a.curve, a.slope), a.low, a.high)
    return y if a.scale is None else quantize_value(y, a.scale, a.zero_point, a.qmax)


def _linear_reference(a: Any) -> torch.Tensor:
    rows: torch.Tensor = a.x.reshape(math.prod(a.x.shape[:-1]), a.x.shape[-1]).to(torch.float32)
    zero_point = a.x_zero_point.to(torch.float32).expand(len(rows), 1)
    sums = integer_matmul(rows, zero_point, a.weight.contiguous())
    return _finish(sums.view(*a.x.shape[:-1], len(a.weight)), a, (-1,))


def _convolution_reference(a: Any) -> torch.Tensor:
    centred = a.x.to(torch.float32).sub_(a.x_zero_point)
    return _as_input(_finish(_convolution_sums(centred, a), a, (-1, *[1] * (a.x.dim() - 2))), a)


def _as_input(out: torch.Tensor, a: Any) -> torch.Tensor:
    return out.contiguous(memory_format=layout(a.x))


def _prepare_linear(a: Any) -> Any:
    return a._replace(x=plain(a.x), addend=None if a.addend is None else plain(a.addend))


def _prepare_convolution(a: Any) -> Any:
    return a._replace(x=by_pixels(a.x), addend=None if a.addend is None else by_pixels(a.addend))


def _convolution_sums(x: torch.Tensor, a: Any) -> torch.Tensor:
    """Return the int32 sums of a convolution of whole numbers, exactly.

    By float32 convolutions of so few channels that their sums are exact in any order, or by one in float64, which may
    be transformed (by FFT, say) as long as it rounds to the right whole numbers.
    """
    run = _runner(a)
    window = math.prod(a.weight.shape[2:])
    whole = a.weight.contiguous()  # torch's own convolution in groups misreads some strides of dimensions of one place
    if window > EXACT_COLUMNS or x.device.type != "cpu" or not _HAS_EXACT_FLOATS:
        return run(x.to(torch.float64), whole.to(torch.float64)).round_().to(torch.int32)
    weight, groups = whole.to(torch.float32), a.groups
    inputs, at_once = x.shape[1] // groups, EXACT_COLUMNS // window
    if inputs <= at_once:
        return run(x, weight).to(torch.int32)
    total: torch.Tensor | None = None
    grouped = x.unflatten(1, (groups, inputs))  # type: ignore[no-untyped-call]
    turned = weight.unflatten(0, (groups, inputs)) if a.is_transposed else weight
    for start in range(0, inputs, at_once):
        part = slice(start, start + at_once)
        factors = turned[:, part].flatten(0, 1) if a.is_transposed else turned[:, part]
        sums = run(grouped[:, :, part].flatten(1, 2), factors).to(torch.int32)
        total = sums if total is None else total.add_(sums)
    assert total is not None
    return total


def _runner(a: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the float convolution of an input and a weight."""
    rank, before, after = a.x.dim() - 2, a.padding[::2], a.padding[1::2]
    if a.is_transposed:
        convolve = _TRANSPOSED[rank]
        options = (None, list(a.stride), list(before), list(a.output_padding), a.groups, list(a.dilation))
        return lambda x, weight: convolve(x, weight, *options)
    if list(before) == list(after):
        return lambda x, w: _CONVOLUTIONS[rank](x, w, None, list(a.stride), list(before), list(a.dilation), a.groups)
    sides = [side for dim in reversed(range(rank)) for side in (before[dim], after[dim])]
    return lambda x, w: _CONVOLUTIONS[rank](F.pad(x, sides), w, None, list(a.stride), 0, list(a.dilation), a.groups)


def _check_linear(a: Any) -> None:
    check_value("a linear", a.x)
    _check_curve(a)
    if a.x.dim() == 0 or a.x.shape[-1] != a.weight.shape[1]:
        inputs = a.weight.shape[1]
        raise ShapeError(
            f"a quantized linear of {inputs} inputs takes x of shape (..., {inputs}), got {tuple(a.x.shape)}"
        )


def _check_convolution(a: Any) -> None:
    check_value("a convolution", a.x)
    _check_curve(a)
    rank = a.weight.dim()
    inputs = a.weight.shape[0] if a.is_transposed else a.weight.shape[1] * a.groups
    if a.x.dim() != rank or a.x.shape[1] != inputs:
        raise ShapeError(
            f"a quantized Conv{rank - 2}d of {inputs} channels takes {rank}-D input with {inputs} in dimension 1, got "
            f"{tuple(a.x.shape)}"
        )


def _check_curve(a: Any) -> None:
    if a.curve is not None and (a.curve not in CURVES or a.low is not None or a.high is not None):
        raise ArgumentError(
            f"a static product ends with one of {', '.join(CURVES)}, or with bounds; got {a.curve!r}, "
            f"[{a.low}, {a.high}]"
        )


def _linear_fake(a: Any) -> torch.Tensor:
    dtype = torch.float32 if a.scale is None else torch.uint8
    y: torch.Tensor = a.x.new_empty((*a.x.shape[:-1], a.weight.shape[0]), dtype=dtype)
    return y


def _convolution_fake(a: Any) -> torch.Tensor:
    dtype = torch.float32 if a.scale is None else torch.uint8
    return _as_input(_runner(a)(a.x.to(torch.float32), a.weight.to(torch.float32)).to(dtype), a)


def _is_for_triton(a: Any) -> bool:
    """Return whether Triton's kernel computes a product: of something, with scales as models have them."""
    single = [scale for scale in (a.x_scale, a.scale, a.addend_scale) if scale is not None]
    is_usual = all(scale.dtype == torch.float32 for scale in (*single, a.weight_scale))
    is_usual = is_usual and all(scale.numel() == 1 for scale in single)
    return is_usual and a.x.numel() > 0 and a.weight.numel() > 0


def _is_image_for_triton(a: Any) -> bool:
    """Return whether Triton's kernel computes a convolution: of images, in one group, not transposed."""
    return a.x.dim() == 4 and a.groups == 1 and not a.is_transposed and _is_for_triton(a)


_X = "(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_scale, Tensor? bias"
_END = (
    "Tensor? addend=None, Tensor? addend_scale=None, Tensor? addend_zero_point=None, int qmax=255, float? low=None,"
    " float? high=None, str? curve=None, float slope=0.0) -> Tensor"
)


_linear = register_value(
    static_linear,
    f"{_X}=None, Tensor? scale=None, Tensor? zero_point=None, {_END}",
    _linear_reference,
    _check_linear,
    _linear_fake,
    _prepare_linear,
    on_gpu=OnGpu("triton_static", "linear", _is_for_triton),
)
_convolution = register_value(
    static_convolution,
    f"{_X}, Tensor? scale, Tensor? zero_point, int[] stride, int[] padding, int[] dilation, int groups=1,"
    f" bool is_transposed=False, int[] output_padding=[], {_END}",
    _convolution_reference,
    _check_convolution,
    _convolution_fake,
    _prepare_convolution,
    _as_input,
    on_gpu=OnGpu("triton_static", "convolution", _is_image_for_triton),
)
