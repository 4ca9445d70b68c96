"""The operators on integer values: what float arithmetic on the values gives, quantized."""

import random

import pytest
import torch
import torch.nn.functional as F

from fxquant import ops
from fxquant.errors import DTypeError, ShapeError
from tests.native.static_cases import same_places

SCALE, ZERO = torch.tensor(0.05), torch.tensor(100, dtype=torch.int32)
OUT_SCALE, OUT_ZERO = torch.tensor(0.11), torch.tensor(37, dtype=torch.int32)


def value(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def real(q, scale=SCALE, zero_point=ZERO):
    return (q.double() - zero_point) * scale.double()


def within_half_a_step(q, expected, scale=OUT_SCALE, zero_point=OUT_ZERO, qmax=255):
    low, high = -zero_point * scale.double(), (qmax - zero_point) * scale.double()
    return bool(((real(q, scale, zero_point) - expected.clamp(low, high)).abs() <= scale * 0.50001).all())


def test_quantize_rounds_half_to_even_and_clamps():
    x = torch.tensor([-100.0, 0.0, 0.5, 1.5, 2.5, 1000.0])
    q = ops.quantize(x, torch.tensor(1.0), torch.tensor(3, dtype=torch.int32))
    assert q.tolist() == [0, 3, 3, 5, 5, 255]
    assert q.dtype == torch.uint8


def test_quantize_takes_nan_as_zero_and_infinities_as_the_ends():
    x = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert ops.quantize(x, SCALE, ZERO, 15).tolist() == [15, 15, 0]  # the zero point lies above qmax here
    assert ops.quantize(x, SCALE, ZERO).tolist() == [100, 255, 0]


def test_dequantize_is_its_inverse():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ops.quantize(ops.dequantize(every, SCALE, ZERO), SCALE, ZERO), every)


def test_memory_formats_are_kept():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    q = ops.quantize(x, SCALE, ZERO)
    assert q.is_contiguous(memory_format=torch.channels_last)
    assert ops.dequantize(q, SCALE, ZERO).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (3, 1)), ((0, 3), (0, 3))])
@pytest.mark.parametrize("bounds", [(None, None), (0.0, None), (-1.0, 2.0)])
def test_sums_and_products_are_those_of_the_values(shapes, bounds):
    a, b = value(*shapes[0]), value(*shapes[1], seed=1)
    sides = (a, SCALE, ZERO, b, OUT_SCALE, OUT_ZERO, OUT_SCALE, OUT_ZERO)
    low, high = (bound if bound is not None else sign * 1e9 for bound, sign in zip(bounds, (-1, 1), strict=True))
    for alpha in (1.0, -1.0):
        total = (real(a) + alpha * real(b, OUT_SCALE, OUT_ZERO)).clamp(low, high)
        assert within_half_a_step(ops.add_values(*sides, 255, alpha, *bounds), total)
    product = (real(a) * real(b, OUT_SCALE, OUT_ZERO)).clamp(low, high)
    assert within_half_a_step(ops.mul_values(*sides, 255, *bounds), product)


def test_a_table_is_any_function():
    table = torch.arange(255, -1, -1, dtype=torch.uint8)
    assert torch.equal(ops.lookup(value(3, 5, 7), table), 255 - value(3, 5, 7))


def test_a_table_a_channel_is_any_function_of_value_and_channel():
    table, x = torch.randint(256, (5, 256), dtype=torch.uint8), value(3, 5, 7)
    for q in (x, x[..., 0], x.transpose(0, 2).contiguous().transpose(0, 2)):
        expected = torch.stack([table[c][q[:, c].long()] for c in range(5)], 1)
        assert torch.equal(ops.lookup_channels(q, table), expected)
    with pytest.raises(ShapeError, match="of 5 channels takes x with so many in dimension 1"):
        ops.lookup_channels(x.transpose(0, 1), table)


@pytest.mark.parametrize(("dims", "keepdim"), [((-2, -1), True), ((1,), False), ((0, 1, 2, 3), False)])
def test_means_are_those_of_the_values(dims, keepdim):
    x = value(2, 3, 5, 7)
    q = ops.mean_value(x, SCALE, ZERO, OUT_SCALE, OUT_ZERO, dims, keepdim)
    assert within_half_a_step(q, real(x).mean(dims, keepdim))


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("ceil", [True, False])
def test_poolings_are_those_of_the_values(counts, ceil):
    x = value(2, 3, 9, 7)
    q = ops.pool_value(x, SCALE, ZERO, OUT_SCALE, OUT_ZERO, (3, 2), (2, 2), (1, 0), ceil, counts)
    assert within_half_a_step(q, F.avg_pool2d(real(x), (3, 2), 2, (1, 0), ceil, counts))
    q = ops.adaptive_pool_value(x, SCALE, ZERO, OUT_SCALE, OUT_ZERO, (2, 3))
    assert within_half_a_step(q, F.adaptive_avg_pool2d(real(x), (2, 3)))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_max_pooling_takes_the_greatest_integers(rank):
    x = value(2, 3, *(7, 6, 5)[:rank])
    sizes = [[3] * rank, [2] * rank, [1] * rank, [1] * rank]
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    assert torch.equal(ops.max_pool_value(x, *sizes, True).float(), pool(x.float(), *sizes, ceil_mode=True))


def test_padding_is_real_zero():
    padded = ops.pad_value(value(2, 3, 4), ZERO, [1, 2])
    assert torch.equal(real(padded), F.pad(real(value(2, 3, 4)), (1, 2)))


@pytest.mark.parametrize("name", ["dequantize", "lookup", "mean_value", "pad_value"])
def test_floats_are_refused(name):
    rest = {
        "dequantize": (SCALE, ZERO),
        "lookup": (torch.zeros(256, dtype=torch.uint8),),
        "mean_value": (SCALE, ZERO, SCALE, ZERO, (0,)),
        "pad_value": (ZERO, [1, 1]),
    }
    with pytest.raises(DTypeError, match=f"{name} of a static model takes uint8 values, got torch.float32"):
        getattr(ops, name)(torch.zeros(3, 3), *rest[name])


def test_quantize_refuses_integers():
    with pytest.raises(DTypeError, match=r"quantize takes a float tensor, got torch.uint8"):
        ops.quantize(value(3), SCALE, ZERO)


def operand(rng, shape):
    """Return a uint8 tensor that broadcasts to a shape, in a layout that users' models have."""
    kind = rng.choice(("whole", "whole", "channels", "some", "expanded", "fewer"))
    own = [*shape[:2], *[1] * (len(shape) - 2)] if kind == "channels" else shape[kind == "fewer" :]
    own = [rng.choice((n, 1)) for n in own] if kind in ("some", "expanded") else own
    order = rng.sample(range(len(own)), len(own))
    x = value(*(own[i] for i in order), seed=rng.randrange(99)).permute([order.index(i) for i in range(len(own))])
    if rng.random() < 0.4:
        x = x.contiguous()
    elif x.dim() == 4 and rng.random() < 0.5:
        x = x.contiguous(memory_format=torch.channels_last)
    elif rng.random() < 0.2:
        x = value(*(2 * n for n in own), seed=1)[tuple(slice(0, n) for n in own)]
    return x.expand(shape) if kind == "expanded" else x


@pytest.mark.parametrize("name", ["add_values", "mul_values"])
def test_pairs_of_any_layout_have_the_references_numbers_and_strides(name):
    rng, kernel = random.Random(0), ops.KERNELS[name]
    for _ in range(300):
        shape = [rng.choice((1, 2, 3, 5)) for _ in range(rng.choice((1, 2, 3, 4, 4, 5)))]
        more = (255, rng.choice((1.0, -1.0)), None, 2.0) if name == "add_values" else (255, 0.0, None)
        pair = operand(rng, shape), operand(rng, shape)
        args = (pair[0], SCALE, ZERO, pair[1], OUT_SCALE, OUT_ZERO, SCALE, OUT_ZERO, *more)
        expected, got = kernel.reference(kernel.arguments(*args)), getattr(ops, name)(*args)
        like = kernel.fake(kernel.arguments(*args))
        assert torch.equal(got, expected)
        assert same_places(got, expected), pair
        assert same_places(like, expected), pair


@pytest.mark.parametrize("dims", [[2], [-2, -1], [1]])
def test_means_lie_as_the_references(dims):
    kernel, x = ops.KERNELS["mean_value"], value(2, 3, 4, *[5] * (len(dims) - 1))
    for keepdim in (True, False):
        args = (x, SCALE, ZERO, OUT_SCALE, OUT_ZERO, dims, keepdim)
        expected = kernel.reference(kernel.arguments(*args))
        assert torch.equal(ops.mean_value(*args), expected)
        assert same_places(ops.mean_value(*args), expected)
