"""The static products: exact sums, a float epilogue, and the same bits as quantizing its result."""

import pytest
import torch
import torch.nn.functional as F

from fxquant import ops
from fxquant.errors import ArgumentError, DTypeError, ShapeError
from fxquant.ops import static

SCALE, ZERO = torch.tensor(0.05), torch.tensor(100, dtype=torch.int32)
OUT = {"scale": torch.tensor(0.2), "zero_point": torch.tensor(90, dtype=torch.int32)}


def integers(shape, low, high, seed):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def product(outputs, *rest):
    weight = integers((outputs, *rest), -127, 128, 1).to(torch.int8)
    return weight, torch.linspace(0.001, 0.01, outputs), torch.linspace(-1, 1, outputs)


def real(q):
    return (q.double() - ZERO) * SCALE.double()


def float32_of_exact(sums, weight_scale, bias, shape):
    """The epilogue, one float32 operation after another."""
    return sums.float() * (weight_scale * SCALE).view(shape) + bias.view(shape)


@pytest.mark.parametrize("inputs", [1, 70, 1100])
def test_a_linear_sums_exactly(inputs):
    x = integers((2, 5, inputs), 0, 256, 0).to(torch.uint8)
    weight, scale, bias = product(6, inputs)
    sums = (x.long() - ZERO) @ weight.long().t()
    assert torch.equal(
        ops.static_linear(x, SCALE, ZERO, weight, scale, bias), float32_of_exact(sums, scale, bias, (-1,))
    )


@pytest.mark.parametrize(
    ("rank", "groups", "inputs", "kernel"), [(1, 1, 600, 3), (2, 1, 130, 3), (2, 4, 8, 5), (2, 1, 3, 23), (3, 2, 4, 3)]
)
@pytest.mark.parametrize("form", ["float32", "float64"])
def test_a_convolution_sums_exactly(monkeypatch, rank, groups, inputs, kernel, form):
    monkeypatch.setattr(static, "_HAS_EXACT_FLOATS", form == "float32" and static._HAS_EXACT_FLOATS)
    x = integers((2, inputs, *[kernel + 2] * rank), 0, 256, 0).to(torch.uint8)
    weight, scale, bias = product(8, inputs // groups, *[kernel] * rank)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    sums = convolve(F.pad(x.double() - ZERO, [1, 1] * rank), weight.double(), None, 2, 0, 1, groups)
    ours = ops.static_convolution(
        x, SCALE, ZERO, weight, scale, bias, None, None, [2] * rank, [1, 1] * rank, [1] * rank, groups
    )
    assert torch.equal(ours, float32_of_exact(sums, scale, bias, (-1, *[1] * rank)))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_sums_exactly(groups):
    x = integers((2, 120, 5, 4), 0, 256, 0).to(torch.uint8)
    weight = product(120, 6 // groups, 3, 3)[0]
    _, scale, bias = product(6)
    ours = ops.static_convolution(
        x, SCALE, ZERO, weight, scale, bias, None, None, [2, 1], [1, 1, 0, 0], [1, 1], groups, True, [1, 0]
    )
    sums = F.conv_transpose2d(x.double() - ZERO, weight.double(), None, (2, 1), (1, 0), (1, 0), groups)
    assert torch.equal(ours, float32_of_exact(sums, scale, bias, (-1, 1, 1)))


@pytest.mark.parametrize("bounds", [(None, None), (0.0, None), (0.0, 6.0), (-0.5, 0.5)])
@pytest.mark.parametrize("has_addend", [False, True])
def test_integers_are_the_float_result_quantized(bounds, has_addend):
    x = integers((2, 5, 6, 6), 0, 256, 0).to(torch.uint8)
    addend = integers((2, 8, 4, 4), 0, 256, 3).to(torch.uint8)
    tensors = (x, SCALE, ZERO, *product(8, 5, 3, 3))
    sizes = ([1, 1], [0, 0, 0, 0], [1, 1], 1, False, [])
    more = (addend, OUT["scale"], OUT["zero_point"]) if has_addend else (None, None, None)
    plain = ops.static_convolution(*tensors, None, None, *sizes)
    expected = plain + ops.dequantize(addend, *more[1:]) if has_addend else plain
    expected = expected.clamp(*bounds) if bounds != (None, None) else expected
    assert torch.equal(ops.static_convolution(*tensors, None, None, *sizes, *more, 255, *bounds), expected)
    ours = ops.static_convolution(*tensors, *OUT.values(), *sizes, *more, 200, *bounds)
    assert torch.equal(ours, ops.quantize(expected, *OUT.values(), 200))


def test_weights_may_lie_anyhow():
    x = integers((1, 24, 11, 1), 0, 256, 0).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    weight, scale, bias = product(6, 8, 3, 1)
    strided = weight.movedim(1, -1).contiguous().movedim(-1, 1).as_strided((6, 8, 3, 1), (24, 1, 8, 144))
    assert torch.equal(strided, weight)
    sizes = (None, None, [3, 1], [0, 1, 0, 0], [3, 1], 3)
    got, expected = (ops.static_convolution(x, SCALE, ZERO, w, scale, bias, *sizes) for w in (strided, weight))
    assert torch.equal(got, expected)


CURVES = [("leaky_relu", -0.3, lambda x: F.leaky_relu(x, -0.3)), ("hardswish", 0.0, F.hardswish), ("silu", 0.0, F.silu)]


@pytest.mark.parametrize(("curve", "slope", "function"), CURVES)
def test_a_curve_is_of_the_float_result_and_is_rounded_once(curve, slope, function):
    tensors = (integers((3, 4, 70), 0, 256, 0).to(torch.uint8), SCALE, ZERO, *product(6, 70))
    plain = ops.static_linear(*tensors)
    curved = ops.static_linear(*tensors, curve=curve, slope=slope)
    torch.testing.assert_close(curved, function(plain.double()).float(), rtol=2e-6, atol=1e-7)  # some roundings
    ours = ops.static_linear(*tensors, *OUT.values(), qmax=200, curve=curve, slope=slope)
    assert torch.equal(ours, ops.quantize(curved, *OUT.values(), 200))


def test_a_curve_that_is_unknown_or_beside_bounds_is_refused():
    tensors = (torch.zeros(1, 2, dtype=torch.uint8), SCALE, ZERO, *product(3, 2))
    with pytest.raises(ArgumentError, match="one of leaky_relu, hardswish, silu, or with bounds; got 'gelu'"):
        ops.static_linear(*tensors, curve="gelu")
    with pytest.raises(ArgumentError, match=r"got 'silu', \[0.0, None\]"):
        ops.static_linear(*tensors, low=0.0, curve="silu")


def test_unequal_sides_are_padded_as_they_are():
    x = integers((1, 2, 5), 0, 256, 0).to(torch.uint8)
    tensors = (x, SCALE, ZERO, *product(3, 2, 3))
    ours = ops.static_convolution(*tensors, None, None, [1], [2, 0], [1])
    padded = (ops.pad_value(x, ZERO, [2, 0]), *tensors[1:])
    assert torch.equal(ours, ops.static_convolution(*padded, None, None, [1], [0, 0], [1]))


def test_an_empty_batch_gives_an_empty_one():
    tensors = (torch.zeros(0, 2, 5, 5, dtype=torch.uint8), SCALE, ZERO, *product(3, 2, 3, 3))
    assert ops.static_convolution(*tensors, None, None, [1, 1], [0] * 4, [1, 1]).shape == (0, 3, 3, 3)
    assert ops.static_linear(torch.zeros(0, 2, dtype=torch.uint8), SCALE, ZERO, *product(3, 2)).shape == (0, 3)


def test_other_inputs_are_refused():
    weight, scale, bias = product(3, 2)
    with pytest.raises(DTypeError, match=r"a linear of a static model takes uint8 values, got torch\.float32"):
        ops.static_linear(torch.zeros(4, 2), SCALE, ZERO, weight, scale, bias)
    with pytest.raises(ShapeError, match=r"of 2 inputs takes x of shape \(..., 2\), got \(4, 3\)"):
        ops.static_linear(torch.zeros(4, 3, dtype=torch.uint8), SCALE, ZERO, weight, scale, bias)
    x = torch.zeros(1, 5, 4, 4, dtype=torch.uint8)
    with pytest.raises(ShapeError, match=r"Conv2d of 2 channels takes 4-D input with 2 in dimension 1, got"):
        ops.static_convolution(x, SCALE, ZERO, *product(3, 2, 3, 3), None, None, [1, 1], [0] * 4, [1, 1])
