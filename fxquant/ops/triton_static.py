"""Triton's kernel of the static products: convolutions of images and linear, of uint8 values by int8 weights.

A convolution is a product without a matrix of windows: for each place of the kernel and some channels, a program reads
what its pixels see there. Images lie pixel by pixel (channels_last). Linear is a convolution of images of one pixel.
Integers are shifted by 128 as they are read, and the last of a tile's rows is a row of ones: see `triton_linear`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fxquant.ops.elementwise import CURVES
from fxquant.ops.triton_cells import expm1
from fxquant.ops.triton_common import EXACT, blocks, clamped, from_value, to_value
from fxquant.ops.triton_linear import tile_of
from fxquant.ops.triton_tuning import Shape, tuned
from fxquant.ops.values import by_pixels, layout


class _Images(NamedTuple):
    """What the kernel reads: images of a height and width, and the windows of their output pixels."""

    height: int
    width: int
    out_height: int
    out_width: int
    kernel_width: int
    taps: int
    strides: tuple[int, int]
    before: tuple[int, int]
    dilation: tuple[int, int]


_PIXELS = _Images(1, 1, 1, 1, 1, 1, (1, 1), (0, 0), (1, 1))


@triton.jit
def _bent(y, low, high, slope, CURVE: tl.constexpr):
    """Return y within bounds, or a curve of it: elementwise.curved."""
    if CURVE == 1:
        bent = tl.where(y > 0, y, y * slope)
    elif CURVE == 2:
        bent = y * clamped(y + 3.0, 0.0, 6.0) * 0.16666666666666666
    elif CURVE == 3:
        bent = tl.div_rn(y, expm1(-y) + 2.0)
    else:
        bent = clamped(y, low, high)
    return bent


@triton.jit
def _ended(
    y, bias, outs, outputs, places, keep, addend, addend_scale, addend_zero_point, scale, zero_point, qmax,
    low, high, slope,
    HAS_BIAS: tl.constexpr, HAS_ADDEND: tl.constexpr, CURVE: tl.constexpr, IS_FLOAT: tl.constexpr,
):  # fmt: skip
    """Return what follows the products: the bias, the addend, bounds or a curve, and quantization."""
    if HAS_BIAS:
        y += tl.load(bias + outs, mask=outs < outputs, other=0.0).to(tl.float32)[None, :]
    if HAS_ADDEND:
        other = tl.load(addend + places, mask=keep, other=0)
        y += from_value(other, tl.load(addend_scale), tl.load(addend_zero_point).to(tl.float32))
    bent = _bent(y, low, high, slope, CURVE)
    return bent if IS_FLOAT else to_value(bent, tl.load(scale), tl.load(zero_point).to(tl.float32), qmax)


@triton.jit
def _seen(places, inside, some, nothing, MASKED: tl.constexpr):
    """Return what pixels see, as int32; beyond the image, where not inside, nothing: real 0."""
    if MASKED:
        q = tl.load(places, mask=inside[:, None] & some[None, :], other=0).to(tl.int32)
        q = tl.where(inside[:, None], q, nothing)
    else:
        q = tl.load(places).to(tl.int32)
    return q


@triton.jit
def static_kernel(
    x, x_scale, x_zero_point, weight, weight_scale, bias, scale, zero_point, addend, addend_scale, addend_zero_point, y,
    pixels, outputs, channels, height, width, out_height, out_width, kernel_width, taps,
    down, right, above, before, tall, wide, qmax, low, high, slope,
    HAS_BIAS: tl.constexpr, HAS_ADDEND: tl.constexpr, CURVE: tl.constexpr, IS_FLOAT: tl.constexpr,
    EVEN: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write a tile of BM - 1 pixels by BN channels. EVEN: BK divides the channels; PADDED: windows reach outside."""
    m, n = tile_of(pixels, outputs, BM - 1, BN)
    r, c = tl.arange(0, BM), tl.arange(0, BK)
    at, outs = m * (BM - 1) + r, n * BN + tl.arange(0, BN)
    pixel = tl.minimum(at, pixels - 1)
    row, column = pixel // out_width % out_height * down - above, pixel % out_width * right - before
    image = (pixel // (out_width * out_height)).to(tl.int64) * height * width * channels
    kernel = weight + (outs % outputs).to(tl.int64)[None, :] * taps * channels
    nothing = tl.load(x_zero_point).to(tl.int32)
    sums = tl.zeros((BM, BN), tl.int32)
    for tap in range(taps):
        i, j = row + tap // kernel_width * tall, column + tap % kernel_width * wide
        inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        source = x + image + (i * width + j) * channels
        for start in range(0, channels, BK):
            right_side = kernel + (tap * channels + start + c)[:, None]
            some = (start + c < channels) if not EVEN else (c < BK)
            q = _seen(source[:, None] + (start + c)[None, :], inside, some, nothing, PADDED or not EVEN)
            a = tl.where((r == BM - 1)[:, None], 1, q - 128).to(tl.int8)
            b = tl.load(right_side) if EVEN else tl.load(right_side, mask=some[:, None], other=0)
            sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    ones = tl.sum(tl.where((r == BM - 1)[:, None], sums, 0), 0)
    factor = tl.load(weight_scale + outs, mask=outs < outputs, other=0.0) * tl.load(x_scale)
    result = (sums + (128 - nothing) * ones[None, :]).to(tl.float32) * factor[None, :]
    places = at.to(tl.int64)[:, None] * outputs + outs[None, :]
    keep = ((r < BM - 1) & (at < pixels))[:, None] & (outs < outputs)[None, :]
    ended = _ended(
        result, bias, outs, outputs, places, keep, addend, addend_scale, addend_zero_point, scale, zero_point, qmax,
        low, high, slope, HAS_BIAS, HAS_ADDEND, CURVE, IS_FLOAT,
    )  # fmt: skip
    tl.store(y + places, ended, mask=keep)


_CURVES = {None: 0} | {name: i for i, name in enumerate(CURVES, 1)}


def _run(a: Any, x: torch.Tensor, weight: torch.Tensor, addend: Any, y: torch.Tensor, images: _Images) -> None:
    """Write a product. x: (..., channels), weight: (O, taps, channels), addend and y: (..., O), all contiguous."""
    outputs, channels = weight.shape[0], x.shape[-1]
    pixels = y.numel() // outputs
    none = a.x_scale
    optional = (a.bias, a.scale, a.zero_point, addend, a.addend_scale, a.addend_zero_point)
    bias, scale, zero_point, *added = (none if part is None else part.contiguous() for part in optional)
    operands = (x, a.x_scale, a.x_zero_point, weight, a.weight_scale.contiguous(), bias, scale, zero_point, *added, y)
    sizes = (pixels, outputs, channels, *images[:6], *images.strides, *images.before, *images.dilation)
    low, high = -math.inf if a.low is None else float(a.low), math.inf if a.high is None else float(a.high)
    meta: dict[str, Any] = {
        "HAS_BIAS": a.bias is not None,
        "HAS_ADDEND": addend is not None,
        "CURVE": _CURVES[a.curve],
        "IS_FLOAT": a.scale is None,
        "PADDED": images is not _PIXELS,
        **EXACT,
    }

    def launch(tile: Shape) -> None:
        programs = blocks(pixels, tile.tokens - 1) * blocks(outputs, tile.outputs)
        numbers = (*sizes, float(a.qmax), low, high, float(a.slope))
        even = channels % tile.columns == 0
        static_kernel[(programs,)](*operands, *numbers, **meta, EVEN=even, BM=tile.tokens, **tile.options)

    tuned(("static", outputs, channels, images.taps), pixels, x.device, launch)


def linear(a: Any) -> torch.Tensor:
    """Return a static linear's result, (..., O)."""
    dtype = torch.float32 if a.scale is None else torch.uint8
    y = torch.empty((*a.x.shape[:-1], a.weight.shape[0]), dtype=dtype, device=a.x.device)
    addend = None if a.addend is None else a.addend.contiguous()
    _run(a, a.x.contiguous(), a.weight.contiguous(), addend, y, _PIXELS)
    return y


def convolution(a: Any) -> torch.Tensor:
    """Return a static convolution's result, (B, O, H, W), which lies as x does."""
    x, weight, before, after = by_pixels(a.x), by_pixels(a.weight), a.padding[::2], a.padding[1::2]
    kernel = a.weight.shape[2:]
    size = [
        (x.shape[2 + i] + before[i] + after[i] - a.dilation[i] * (kernel[i] - 1) - 1) // a.stride[i] + 1 for i in (0, 1)
    ]
    images = _Images(
        x.shape[2], x.shape[3], size[0], size[1], kernel[1], kernel[0] * kernel[1],
        (a.stride[0], a.stride[1]), (before[0], before[1]), (a.dilation[0], a.dilation[1]),
    )  # fmt: skip
    dtype = torch.float32 if a.scale is None else torch.uint8
    y = torch.empty((x.shape[0], *size, weight.shape[0]), dtype=dtype, device=x.device)
    addend = None if a.addend is None else by_pixels(a.addend).movedim(1, -1)
    _run(a, x.movedim(1, -1), weight.movedim(1, -1), addend, y, images)
    return y.movedim(-1, 1).contiguous(memory_format=layout(a.x))
