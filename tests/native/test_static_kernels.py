"""The native kernels of static quantization against the reference: the same bits, lying alike; and large ones."""

import random

import pytest
import torch

from fxquant import ops
from fxquant.ops import KERNELS
from tests.native import cases, native, static_cases
from tests.native.cases import failures, kernels, same_bits
from tests.native.static_cases import same_places

SETTINGS = [(isa, threads) for isa in cases.usable() for threads in (1, 2, 3)]
PARTS = 4
LEAST_CONVOLUTIONS, OTHERS = 10_400, 100  # the former in all, the latter times as many settings

ONE, ZERO = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_convolutions_give_the_references_bits(part):
    count = -(-LEAST_CONVOLUTIONS // (PARTS * len(SETTINGS)))
    seeds = range(part * count, (part + 1) * count)
    wrong = [line for seed in seeds for line in failures("static_convolution", seed, SETTINGS)]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("operator", [name for name in static_cases.CASES if name != "static_convolution"])
def test_random_cases_give_the_references_bits(operator):
    wrong = [line for seed in range(OTHERS) for line in failures(operator, seed, SETTINGS)]
    assert not wrong, "\n".join(wrong[:20])


def convolve(x, weight, zero_point=0, to=(None, None), stride=1, side=0, groups=1, **more):
    rank = x.dim() - 2
    args = (x, ONE * 0.5, ZERO + zero_point, weight, torch.full((weight.shape[0],), 0.25), None, *to)
    return KERNELS["static_convolution"].arguments(
        *args, [stride] * rank, [side] * 2 * rank, [1] * rank, groups, **more
    )


@pytest.mark.parametrize("channels", range(1, 131))
def test_depthwise_convolutions_of_each_width_give_the_references_bits(channels):
    """Blocks of 64 channels, and pairs of pixels with at most 32; a kernel of 2 has no whole four taps."""
    rng = random.Random(channels)
    kernel, stride = rng.choice(((3, 1), (3, 2), (2, 1), (5, 1), (1, 1))), rng.choice((1, 2))
    x = torch.randint(0, 256, (1, channels, 6, 7), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-128, 128, (channels, 1, *kernel), dtype=torch.int8)
    to = (ONE * 40, ZERO + rng.choice((0, 100, 255)))
    a = convolve(static_cases.fenced(x), weight, rng.choice((0, 255)), to, stride, 1, max(channels, 1))
    expected = KERNELS["static_convolution"].reference(a)
    for isa in cases.usable():
        for threads in (1, 2):
            with kernels(isa, threads):
                assert same_bits(native.static_convolution(*a), expected), (isa, threads)


@pytest.mark.parametrize("inputs", [1, 70, 1280])
@pytest.mark.parametrize("rows", [1, 2, 8, 9])
def test_linears_of_few_rows_give_the_references_bits(rows, inputs):
    """Up to 8 rows take the kernels of dynamic products."""
    x, addend = torch.randint(0, 256, (rows, inputs)).to(torch.uint8), torch.randint(0, 256, (rows, 70)).to(torch.uint8)
    x[-1], weight = 255, torch.randint(-128, 128, (70, inputs), dtype=torch.int8)
    product = (
        static_cases.fenced(x),
        ONE * 0.5,
        ZERO + 255,
        static_cases.fenced(weight),
        torch.rand(70),
        torch.randn(70),
    )
    for to in ((None, None), (ONE * inputs**0.5 * 40, ZERO + 100)):
        for more in (
            {},
            {"low": 0.0, "high": 900.0},
            {"addend": addend, "addend_scale": ONE * 9, "addend_zero_point": ZERO + 7},
        ):
            a = KERNELS["static_linear"].arguments(*product, *to, **more)
            expected = KERNELS["static_linear"].reference(a)
            for isa, threads in SETTINGS:
                with kernels(isa, threads):
                    assert same_bits(native.static_linear(*a), expected), (isa, threads, to, more)


@pytest.mark.parametrize("scale", [1e-30, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("bias", [0.0, 3e38, float("inf"), float("nan")])
def test_sums_beyond_any_scale_end_as_the_references(scale, bias):
    """One of 64 outputs is no number, or far beyond what 32 bits hold in units of the scale."""
    x, weight = torch.full((1, 8, 13), 255, dtype=torch.uint8), torch.full((64, 8, 1), -128, dtype=torch.int8)
    weight[::2] = 127
    scales, biases = torch.full((64,), 0.25), torch.zeros(64)
    scales[[5, 8]], biases[[6, 9]] = scale, bias
    for extra in ({}, {"low": 0.0}, {"low": -3.0, "high": 2.0, "qmax": 15}):
        a = KERNELS["static_convolution"].arguments(
            x, ONE, ZERO + 3, weight, scales, biases, ONE * 1e-3, ZERO + 9, [1], [0, 0], [1], **extra
        )
        expected = KERNELS["static_convolution"].reference(a)
        for isa in cases.usable():
            with kernels(isa, 1):
                assert same_bits(native.static_convolution(*a), expected), (isa, extra)


@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize(("value", "zero_point"), [(255, 0), (0, 255), (255, 255)])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_greatest_sums_do_not_overflow(isa, weight, value, zero_point, groups):
    """65,535 products of 255 * -128 are as much as 32 bits hold; pairs of 255 * 127 more than 16 bits do."""
    inputs = 65_535 // 3 * groups
    x = torch.full((1, inputs, 4), value, dtype=torch.uint8)
    w = torch.full((3 * groups, inputs // groups, 3), weight, dtype=torch.int8)
    a = convolve(x, w, zero_point, groups=groups)
    with kernels(isa, 2):
        y = native.static_convolution(*a)
    exact = 65_535 * (value - zero_point) * weight
    assert torch.equal(y, (torch.tensor(exact, dtype=torch.int32).float() * 0.125).expand_as(y))


def test_windows_of_more_inputs_are_the_references(isa):
    x = torch.full((1, 65_536, 2), 255, dtype=torch.uint8)
    a = convolve(x, torch.full((1, 65_536, 1), 127, dtype=torch.int8))
    with kernels(isa, 1):
        assert KERNELS["static_convolution"].run_native(a) is None


@pytest.mark.parametrize("keepdim", [False, True])
def test_the_mean_of_a_very_large_image_does_not_overflow(isa, keepdim):
    """8,421,505 times 255 is more than 31 bits hold."""
    x = torch.full((1, 1, 2903, 2903), 255, dtype=torch.uint8)
    with kernels(isa, 1):
        mean = ops.mean_value(x, ONE, ZERO, ONE, ZERO, [2, 3], keepdim)
        assert mean.flatten().tolist() == [255]
        assert ops.adaptive_pool_value(x, ONE, ZERO, ONE, ZERO, [1, 1]).flatten().tolist() == [255]


def test_a_large_image_gives_its_parts(isa):
    """4096² pixels: what a pixel sees is the same in a small image cut around it."""
    row = torch.randint(0, 256, (1, 3, 4096), dtype=torch.uint8)
    x = row[..., None].expand(1, 3, 4096, 9).contiguous(memory_format=torch.channels_last)
    weight, to = torch.randint(-128, 128, (8, 3, 3, 3), dtype=torch.int8), (ONE * 30, ZERO + 100)
    with kernels(isa, 2):
        whole = native.static_convolution(*convolve(x, weight, 7, to, side=1))
        for first in (0, 2000, 4090):
            part = x[:, :, max(first - 1, 0) : first + 6]
            y = native.static_convolution(*convolve(part, weight, 7, to, side=1))
            inner = slice(first, min(first + 5, 4096))
            expected = whole[:, :, inner]
            got = y[:, :, min(first, 1) :][:, :, : expected.shape[2]]
            if first == 4090:
                expected, got = expected[:, :, :5], got[:, :, :5]
            assert torch.equal(got, expected), first


def test_an_image_gives_the_same_bits_alone_and_in_any_batch(isa):
    x = torch.randint(0, 256, (9, 20, 5, 6), dtype=torch.uint8)
    weight, to = torch.randint(-128, 128, (70, 20, 3, 3), dtype=torch.int8), (ONE * 30, ZERO + 100)
    with kernels(isa, 2):
        together = native.static_convolution(*convolve(x, weight, 7, to, side=1))
        for images in (1, 2, 5):
            alone = native.static_convolution(*convolve(x[3 : 3 + images], weight, 7, to, side=1))
            assert torch.equal(alone, together[3 : 3 + images]), images


TRANSPOSED = torch.arange(70, dtype=torch.uint8).view(7, 10).t()
SLICED = torch.arange(200, dtype=torch.uint8).view(2, 5, 20)[..., ::2]


@pytest.mark.parametrize("q", [TRANSPOSED, SLICED, torch.arange(5, dtype=torch.uint8).expand(3, 5)], ids=str)
def test_values_that_lie_anywhere_are_taken(isa, q):
    """Those with gaps by the reference."""
    table = torch.arange(255, -1, -1).to(torch.uint8)
    with kernels(isa, 2):
        x = ops.dequantize(q, ONE * 0.5, ZERO + 3)
        assert torch.equal(x, (q.float() - 3) * 0.5)
        assert torch.equal(ops.quantize(x, ONE * 0.5, ZERO + 3), q)
        assert torch.equal(ops.lookup(q, table), 255 - q)
        assert torch.equal(ops.add_values(q, ONE, ZERO, q, ONE, ZERO, ONE * 2, ZERO), q)


@pytest.mark.parametrize("b_shape", [(2, 6, 1, 1), (1, 6, 4, 5), (2, 1, 4, 5), (), (5,), (2, 6, 4, 1)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pairs_of_any_shapes_are_broadcast(isa, b_shape, memory_format):
    a = torch.randint(0, 256, (2, 6, 4, 5), dtype=torch.uint8).contiguous(memory_format=memory_format)
    b = torch.randint(0, 256, b_shape, dtype=torch.uint8)
    for name in ("add_values", "mul_values"):
        for x, y in ((a, b), (b, a)):
            args = KERNELS[name].arguments(x, ONE * 0.1, ZERO + 9, y, ONE * 0.2, ZERO + 200, ONE * 0.7, ZERO + 50)
            with kernels(isa, 1):
                got = getattr(ops, name)(*args)
            expected = KERNELS[name].reference(args)
            assert torch.equal(got, expected)
            assert same_places(got, expected)


def test_max_pools_of_many_pixels_in_channels_last_need_no_library():
    x = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8)
    for shape, rank, memory_format in (
        ((1, 3, 20, 20), 2, torch.channels_last),
        ((1, 3, 4, 10, 10), 3, torch.channels_last_3d),
    ):
        windows = ([2] * rank, [2] * rank, [0] * rank, [1] * rank)
        args = KERNELS["max_pool_value"].arguments(x.view(shape).contiguous(memory_format=memory_format), *windows)
        plain = KERNELS["max_pool_value"].arguments(x.view(shape), *windows)
        assert torch.equal(KERNELS["max_pool_value"].reference(args), KERNELS["max_pool_value"].reference(plain))
