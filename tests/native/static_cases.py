"""Random cases for the operators of static quantization, each made from its number alone; see cases.py.

Tensors end where a page ends after which nothing can be read, or begin where one begins before which nothing can be.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxquant.ops import KERNELS
from tests.native import native

Case = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], bool]
CHANNELS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 70, 100, 130)
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
CURVES = (None, None, None, "leaky_relu", "hardswish", "silu")
CLAMPS = ((None, None), (None, None), (0.0, None), (0.0, 6.0), (-1.0, 0.5), (None, 1.0))
_PAGE = mmap.PAGESIZE
_C = ctypes.CDLL(None, use_errno=True) if sys.platform != "win32" else None


def fenced(tensor: torch.Tensor, at_end: bool = True) -> torch.Tensor:
    """Return a copy in memory of its own, with a page that cannot be touched right behind it, or right before it."""
    if _C is None or not tensor.numel():
        return tensor
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in steps)
    size = elements * tensor.element_size()
    pages = -(-size // _PAGE) * _PAGE
    memory = mmap.mmap(-1, pages + _PAGE)
    anchor = ctypes.c_char.from_buffer(memory)
    start = ctypes.addressof(anchor)
    del anchor
    closed, offset = (start + pages, pages - size) if at_end else (start, _PAGE)
    assert _C.mprotect(ctypes.c_void_p(closed), ctypes.c_size_t(_PAGE), 0) == 0
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=elements, offset=offset)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def same_places(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors lie alike: strides of dimensions with a single place aside."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.shape == b.shape and (not a.numel() or all(size == 1 or s == t for size, s, t in strides))


def _both_ways(name: str, arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what calls the library, as the operator does and directly, and what calls the reference as often."""
    kernel, run = KERNELS[name], getattr(native, name)

    def both(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        prepared = run(*args)
        direct = kernel.native()(True, *kernel.arguments(*args))  # type: ignore[misc]
        return prepared, prepared if direct is None else direct

    def expect(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        expected = kernel.reference(kernel.arguments(*args))
        return expected, expected

    return both, expect


def _case(name: str, rng: random.Random, args: Sequence[Any], is_rich: bool = False) -> Case:
    end = rng.random() < 0.8
    placed = tuple(fenced(a, end) if isinstance(a, torch.Tensor) and a.dim() else a for a in args)
    return (*_both_ways(name, placed), placed, is_rich)


def _begin(seed: int) -> random.Random:
    torch.manual_seed(seed)
    return random.Random(seed)


def _value(rng: random.Random, *shape: int) -> torch.Tensor:
    """Return any uint8 values, now and then all of them at one end, as rows or as pixels."""
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    if rng.random() < 0.15:
        x.fill_(rng.choice((0, 255)))
    return _laid_out(rng, x)


def _laid_out(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    if x.dim() in FORMATS and rng.random() < 0.5:
        return x.contiguous(memory_format=FORMATS[x.dim()])
    return x


def _scale(rng: random.Random, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a scale of about that size, and a zero point, often at an end."""
    zero_point = rng.choice((0, 255, rng.randrange(256)))
    return torch.tensor(size * 10 ** rng.uniform(-0.5, 0.5)), torch.tensor(zero_point, dtype=torch.int32)


def _qmax(rng: random.Random) -> int:
    return rng.choice((255, 255, 127, 15))


def _weight(rng: random.Random, *shape: int) -> torch.Tensor:
    """Return int8 weights in any order of dimensions, now and then the greatest."""
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    if rng.random() < 0.1:
        weight.fill_(rng.choice((-128, 127)))
    order = list(range(len(shape)))
    kind = rng.choice(("rows", "pixels", "pixels", "depthwise", "any"))
    if kind == "any":
        rng.shuffle(order)
    elif kind != "rows":
        first = 1 if kind == "pixels" else 0
        order = [d for d in order if d != first] + [first]
    back = [order.index(d) for d in range(len(shape))]
    return weight.permute(order).contiguous().permute(back)


def _ending(
    rng: random.Random, output: tuple[int, ...], window: int, x_scale: torch.Tensor
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Return (weight_scale, bias), (scale, zero_point) and what follows from the addend on."""
    channels = output[1] if len(output) > 2 else output[-1]
    of_weight = torch.rand(channels) * 0.01 + 1e-4
    bias = torch.randn(channels) if rng.random() < 0.7 else None
    spread = 5500.0 * math.sqrt(max(window, 1)) * float(x_scale) * 0.005 / 64
    scale: tuple[Any, ...] = (None, None) if rng.random() < 0.25 else _scale(rng, spread)
    addend = (_value(rng, *output), *_scale(rng, spread)) if rng.random() < 0.4 else (None, None, None)
    bounds, curve = rng.choice(CLAMPS), rng.choice(CURVES)
    bounds = bounds if curve is None else (None, None)
    return (of_weight, bias), scale, (*addend, _qmax(rng), *bounds, curve, rng.choice((0.0, 0.1, 1.5, -0.5)))


def _window(rng: random.Random, rank: int, is_deep: bool) -> dict[str, list[int]]:
    """Return kernel, stride, dilation, sides and input sizes; every window fits."""
    kernel = [rng.choice((1, 1, 2, 3, 3, 5, 7) if rank < 3 and not is_deep else (1, 1, 2, 3)) for _ in range(rank)]
    stride, dilation = ([rng.choice((1, 1, more, 3)) for _ in range(rank)] for more in (2, 1))
    sides = [rng.choice((0, 0, 1, 2, 3)) for _ in range(2 * rank)]
    if rng.random() < 0.4:  # as most networks have it
        kernel, dilation = [kernel[0]] * rank, [1] * rank
        stride, sides = [stride[0]] * rank, [kernel[0] // 2] * 2 * rank
    more = (0, 1, 2, 5, 6, 7, 13) if rank == 2 else (0, 1, 2, 4) if rank == 3 else (0, 1, 5, 30, 120, 500)
    least = [dilation[i] * (kernel[i] - 1) + 1 - sides[2 * i] - sides[2 * i + 1] for i in range(rank)]
    sizes = [max(1, size) + rng.choice(more) for size in least]
    return {"kernel": kernel, "stride": stride, "dilation": dilation, "sides": sides, "sizes": sizes}


def _convolved(window: dict[str, list[int]]) -> list[int]:
    sides, values = window["sides"], zip(*(window[n] for n in ("sizes", "kernel", "stride", "dilation")), strict=True)
    return [
        (size + sides[2 * i] + sides[2 * i + 1] - dilation * (kernel - 1) - 1) // stride + 1
        for i, (size, kernel, stride, dilation) in enumerate(values)
    ]


def convolution_case(seed: int) -> Case:
    """Return a convolution of rank 1 to 3: of all channels, in groups, or depthwise."""
    rng = _begin(seed)
    kind, rank = rng.choice(("full", "full", "groups", "depthwise")), rng.choice((1, 2, 2, 2, 3))
    inputs, outputs, groups = rng.choice(CHANNELS), rng.choice(CHANNELS), 1
    if kind == "depthwise":
        inputs = outputs = groups = rng.choice((rng.randint(1, 130), *CHANNELS))
    elif kind == "groups":
        groups = rng.choice((2, 3, 5))
        inputs, outputs = groups * rng.choice(CHANNELS[:10]), groups * rng.choice(CHANNELS[:12])
    is_deep = kind == "full" and rng.random() < 0.03
    inputs = rng.choice((300, 511, 600)) if is_deep else inputs
    window = _window(rng, rank, is_deep)
    shape, batch = _convolved(window), rng.choice((1, 1, 1, 2, 3, 0 if rng.random() < 0.2 else 1))
    work = math.prod(shape) * outputs * inputs // groups * math.prod(window["kernel"])
    if work > 1 << 21:  # plain C takes long
        batch, outputs = min(batch, 1), outputs if groups > 1 else min(outputs, 33)
    x, scale = _value(rng, batch, inputs, *window["sizes"]), _scale(rng, 0.02)
    weight = _weight(rng, outputs, inputs // groups, *window["kernel"])
    output = (batch, outputs, *shape)
    of_weight, to, rest = _ending(rng, output, weight[0].numel(), scale[0])
    windows = (window["stride"], window["sides"], window["dilation"], groups, False, [])
    return _case("static_convolution", rng, (x, *scale, weight, *of_weight, *to, *windows, *rest))


def transposed_case(seed: int) -> Case:
    """Return a transposed convolution of rank 1 to 3."""
    rng = _begin(seed)
    rank, groups = rng.choice((1, 2, 2, 2, 3)), rng.choice((1, 1, 1, 2, 3))
    inputs, outputs = groups * rng.choice(CHANNELS), groups * rng.choice(CHANNELS)
    if rng.random() < 0.2:
        inputs = outputs = groups = rng.choice((*CHANNELS[1:], rng.randint(2, 130)))
    kernel, stride = [[rng.choice((1, 2, 2, 3, 4)) for _ in range(rank)] for _ in range(2)]
    dilation, sides = (
        [rng.choice((1, 1, 1, 2, 3, 4)) for _ in range(rank)],
        [rng.choice((0, 0, 1, 2)) for _ in range(rank)],
    )
    more = [rng.randrange(max(stride[i], dilation[i])) for i in range(rank)]
    least = [2 * sides[i] - dilation[i] * (kernel[i] - 1) - more[i] for i in range(rank)]
    sizes = [max(0, -(-least[i] // stride[i])) + rng.choice((1, 1, 2, 3, 5)) for i in range(rank)]
    shape = [(sizes[i] - 1) * stride[i] + 1 - least[i] for i in range(rank)]
    batch = rng.choice((1, 1, 2, 0 if rng.random() < 0.2 else 1))
    x, scale = _value(rng, batch, inputs, *sizes), _scale(rng, 0.02)
    weight = _weight(rng, inputs, outputs // groups, *kernel)
    window = math.prod(kernel) * inputs // groups
    of_weight, to, rest = _ending(rng, (batch, outputs, *shape), window, scale[0])
    windows = (stride, [side for side in sides for _ in range(2)], dilation, groups, True, more)
    return _case("static_convolution", rng, (x, *scale, weight, *of_weight, *to, *windows, *rest))


def linear_case(seed: int) -> Case:
    """Return a linear on tokens of one to three dimensions, now and then of very many inputs."""
    rng = _begin(seed)
    inputs, outputs = rng.choice((*CHANNELS, 200, 515)), rng.choice(CHANNELS)
    before = rng.choice(((), (1,), (2,), (7,), (40,), (0,), (3, 5), (1, 2, 6)))
    if rng.random() < 0.02:
        inputs, outputs, before = rng.choice((9000, 32769, 65535)), 3, (2,)
    x, scale = _value(rng, *before, inputs), _scale(rng, 0.02)
    if before and rng.random() < 0.2:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    of_weight, to, rest = _ending(rng, (*before, outputs), inputs, scale[0])
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    if rng.random() < 0.1:
        weight.fill_(rng.choice((-128, 127)))
    if rest[0] is not None:
        addend = rest[0].contiguous()
        rest = (addend, *rest[1:])
    of_weight = (torch.rand(outputs) * 0.01 + 1e-4, None if of_weight[1] is None else torch.randn(outputs))
    return _case("static_linear", rng, (x, *scale, weight, *of_weight, *to, *rest))


def _any_shape(rng: random.Random) -> tuple[int, ...]:
    shapes = ((), (0,), (1,), (5,), (64,), (4099,), (3, 70), (2, 5, 7, 3), (1, 65, 9, 8), (2, 1, 4, 4), (2, 3, 2, 5, 4))
    return rng.choice(shapes)


def quantize_case(seed: int) -> Case:
    """Return floats, among them ties, infinities and NaN, and any scale."""
    rng = _begin(seed)
    x, (scale, zero_point) = torch.randn(_any_shape(rng)) * 10 ** rng.uniform(-3, 3), _scale(rng, 0.1)
    if rng.random() < 0.3:
        x = (x * 4).round() * scale / 2  # ties
    if rng.random() < 0.3 and x.numel():
        for value in (math.nan, math.inf, -math.inf, 1e38, -0.0, 1e-42):
            x.view(-1)[rng.randrange(x.numel())] = value
    return _case("quantize", rng, (_laid_out(rng, x), scale, zero_point, _qmax(rng)))


def dequantize_case(seed: int) -> Case:
    """Return any values and any scale."""
    rng = _begin(seed)
    return _case("dequantize", rng, (_value(rng, *_any_shape(rng)), *_scale(rng, 10 ** rng.uniform(-6, 6))))


def lookup_case(seed: int) -> Case:
    """Return any values and any table."""
    rng = _begin(seed)
    return _case("lookup", rng, (_value(rng, *_any_shape(rng)), torch.randint(0, 256, (256,), dtype=torch.uint8)))


def _pair(rng: random.Random) -> tuple[Any, ...]:
    """Return two values with their scales, alike, or the second with one value a channel of an image."""
    if rng.random() < 0.4:
        shape = (rng.choice((1, 2, 3)), rng.choice(CHANNELS[1:]), rng.choice((1, 4, 9)), rng.choice((2, 3, 8)))
        a = _value(rng, *shape).contiguous(memory_format=torch.channels_last)
        b = _value(rng, *shape[:2], 1, 1).contiguous()
    else:
        a = _value(rng, *_any_shape(rng))
        b = torch.empty_strided(a.shape, a.stride(), dtype=torch.uint8).copy_(_value(rng, *a.shape))
    return (a, *_scale(rng, 0.05), b, *_scale(rng, 0.05), *_scale(rng, 0.1), _qmax(rng))


def add_case(seed: int) -> Case:
    """Return a sum or a difference."""
    rng = _begin(seed)
    return _case("add_values", rng, (*_pair(rng), rng.choice((1.0, -1.0)), *rng.choice(CLAMPS)))


def mul_case(seed: int) -> Case:
    """Return a product."""
    rng = _begin(seed)
    return _case("mul_values", rng, (*_pair(rng), *rng.choice(CLAMPS)))


def _pooled(rng: random.Random) -> tuple[int, torch.Tensor]:
    rank = rng.choice((1, 2, 2, 3))
    sizes = [rng.choice((3, 4, 5, 7, 8, 12) if rank > 1 else (3, 8, 31, 100)) for _ in range(rank)]
    return rank, _value(rng, rng.choice((1, 1, 2, 3)), rng.choice(CHANNELS), *sizes)


def _pool_windows(rng: random.Random, rank: int) -> tuple[list[int], list[int], list[int]]:
    kernel = [rng.choice((1, 2, 2, 3)) for _ in range(rank)]
    stride = [rng.choice((1, 2, 2, 3)) for _ in range(rank)]
    return kernel, stride, [rng.randint(0, size // 2) for size in kernel]


def max_pool_case(seed: int) -> Case:
    """Return a max pooling, some dilated."""
    rng = _begin(seed)
    rank, x = _pooled(rng)
    kernel, stride, padding = _pool_windows(rng, rank)
    sizes = zip(x.shape[2:], kernel, padding, strict=True)
    dilation = [2 if rng.random() < 0.3 and 2 * (k - 1) + 1 <= n + 2 * p else 1 for n, k, p in sizes]
    return _case("max_pool_value", rng, (x, kernel, stride, padding, dilation, rng.random() < 0.5))


def pool_case(seed: int) -> Case:
    """Return an average pooling."""
    rng = _begin(seed)
    rank, x = _pooled(rng)
    divisor = rng.choice((None, None, 1, 5)) if rank > 1 else None
    options = (rng.random() < 0.5, rng.random() < 0.5, divisor, _qmax(rng))
    return _case("pool_value", rng, (x, *_scale(rng, 0.05), *_scale(rng, 0.02), *_pool_windows(rng, rank), *options))


def adaptive_pool_case(seed: int) -> Case:
    """Return an adaptive average pooling to sizes that divide the input's."""
    rng = _begin(seed)
    _, x = _pooled(rng)
    size = [rng.choice([d for d in range(1, n + 1) if n % d == 0]) for n in x.shape[2:]]
    return _case("adaptive_pool_value", rng, (x, *_scale(rng, 0.05), *_scale(rng, 0.02), size, _qmax(rng)))


def mean_case(seed: int) -> Case:
    """Return a mean of all pixels."""
    rng = _begin(seed)
    rank, x = _pooled(rng)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1)  # others are the reference's
    dims = [d + 2 if rng.random() < 0.5 else d - rank for d in range(rank)]
    rng.shuffle(dims)
    return _case("mean_value", rng, (x, *_scale(rng, 0.05), *_scale(rng, 0.02), dims, rng.random() < 0.5, _qmax(rng)))


def pad_case(seed: int) -> Case:
    """Return padding of some dimensions, which may also cut off."""
    rng = _begin(seed)
    rank, x = _pooled(rng)
    pad = [rng.choice((0, 0, 1, 2, 5, -1)) for _ in range(2 * rng.randint(1, rank))]
    if rng.random() < 0.1:  # nothing of x, or one pixel, is left in the last dimension
        left, right = -x.shape[-1], rng.choice((1, 4))
        pad[:2] = rng.choice(((left, right), (right, left), (left + 1, 0)))
    return _case("pad_value", rng, (x, _scale(rng, 0.1)[1], pad))


def resize_case(seed: int) -> Case:
    """Return an interpolation, to a size or by factors or both."""
    rng = _begin(seed)
    rank, x = _pooled(rng)
    size = [rng.choice((1, 2, 3, 5, 9, 16)) for _ in range(rank)]
    factors = [rng.choice((0.5, 0.7, 1.0, 1.5, 2.0, 3.3)) for _ in range(rank)]
    given = rng.choice(((size, None), (None, factors), (size, factors)))
    return _case("resize_value", rng, (x, *given, rng.random() < 0.4))


def lookup_channels_case(seed: int) -> Case:
    """Return any values and any tables."""
    rng = _begin(seed)
    _, x = _pooled(rng)
    return _case("lookup_channels", rng, (x, torch.randint(0, 256, (x.shape[1], 256), dtype=torch.uint8)))


CASES: dict[str, Callable[[int], Case]] = {
    "static_convolution": convolution_case,
    "static_transposed": transposed_case,
    "static_linear": linear_case,
    "quantize": quantize_case,
    "dequantize": dequantize_case,
    "lookup": lookup_case,
    "add_values": add_case,
    "mul_values": mul_case,
    "max_pool_value": max_pool_case,
    "pool_value": pool_case,
    "adaptive_pool_value": adaptive_pool_case,
    "mean_value": mean_case,
    "pad_value": pad_case,
    "resize_value": resize_case,
    "lookup_channels": lookup_channels_case,
}
