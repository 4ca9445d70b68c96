"""The arithmetic of docs/numerics.md, against its equations in float64 and whole numbers in Python."""

import math

import pytest
import torch

from fxquant import TensorSpec
from fxquant.formats import format_of
from fxquant.numerics import (
    FLOAT32_MAX,
    MAX_COLUMNS,
    QuantizedTensor,
    choose_qparams,
    choose_value_qparams,
    dequantize,
    quantize_tokens,
    quantize_tokens_int16,
    quantize_with,
    to_floats,
    value_qparams_of,
    weight_range,
)

ULP = 2.0**-23  # a float32 rounding is at most half of this, relatively
INT8 = TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis="channel")
TORCH_INT8 = TensorSpec(dtype="int8", qmin=-128, qmax=127, symmetric=True, axis="channel", scale_steps=127.5)
UINT8 = TensorSpec(dtype="uint8", qmin=0, qmax=255, axis="channel")
UINT4 = TensorSpec(dtype="uint4", qmin=0, qmax=15, axis="channel")


@pytest.mark.parametrize("qmax", [255, 127])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_rows_come_back_within_half_a_step(qmax, shift):
    x = torch.randn(40, 33) * torch.logspace(-20, 20, 40).unsqueeze(1) + shift
    q, scale, zero_point = quantize_tokens(x, qmax)
    # Rounding the zero point can leave an end of the range outside by up to half a step: then the error is up to one.
    error = ((q.double() - zero_point) * scale.double() - x.double()).abs()
    is_clipped = (q == 0) | (q == qmax)
    slack = ULP * 2 * qmax  # 1 / scale, the product and the division each round: relatively to x, up to qmax steps
    assert bool((error <= scale.double() * torch.where(is_clipped, 1.0, 0.5) * (1 + slack) + x.abs() * 2 * ULP).all())


@pytest.mark.parametrize("qmax", [255, 127])
def test_row_scale_is_the_range_over_the_steps(qmax):
    x = torch.randn(20, 17)
    _, scale, _ = quantize_tokens(x, qmax)
    for row, got in zip(x.double().tolist(), scale[:, 0].tolist(), strict=True):
        assert math.isclose(got, (max(*row, 0) - min(*row, 0)) / qmax, rel_tol=2 * ULP)


def test_values_are_whole_numbers_in_range():
    q, _, zero_point = quantize_tokens(torch.randn(9, 50) * 100, 255)
    for numbers in (q, zero_point):
        assert torch.equal(numbers, numbers.round())
        assert numbers.min() >= 0
        assert numbers.max() <= 255


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_zero_is_exact(shift):
    x = torch.randn(30, 8) + shift
    x[:, 3] = 0
    q, _, zero_point = quantize_tokens(x, 255)
    assert torch.equal(q[:, 3:4], zero_point)


def test_a_positive_row_has_zero_point_0_and_a_negative_row_the_greatest():
    _, _, zero_point = quantize_tokens(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), 255)
    assert zero_point[:, 0].tolist() == [0, 255]


def test_one_scale_for_all_rows_is_that_of_the_flattened_tensor():
    x = torch.randn(6, 5)
    q, scale, zero_point = quantize_tokens(x, 255, per_token=False)
    q1, scale1, zero_point1 = quantize_tokens(x.reshape(1, -1), 255)
    assert torch.equal(q.reshape(1, -1), q1)
    assert torch.equal(scale, scale1.expand(6, 1))
    assert torch.equal(zero_point, zero_point1.expand(6, 1))


def test_a_row_of_zeros_has_scale_1():
    q, scale, zero_point = quantize_tokens(torch.zeros(1, 4), 255)
    assert (q.tolist(), scale.item(), zero_point.item()) == ([[0, 0, 0, 0]], 1.0, 0.0)


def test_a_row_too_small_for_a_normal_scale_is_zeros():
    q, scale, zero_point = quantize_tokens(torch.tensor([[1e-40, -1e-40]]), 255)
    assert torch.equal((q - zero_point) * scale, torch.zeros(1, 2))
    assert scale.item() == 1.0


def test_nan_marks_the_scale_of_its_row_alone():
    x = torch.randn(3, 4)
    clean = quantize_tokens(x, 255)
    x[1, 2] = math.nan
    q, scale, zero_point = quantize_tokens(x, 255)
    assert scale[:, 0].isnan().tolist() == [False, True, False]
    assert not q.isnan().any()
    assert not zero_point.isnan().any()
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(clean, (q, scale, zero_point), strict=True))


@pytest.mark.parametrize(("value", "level"), [(math.inf, 255), (-math.inf, 0)])
def test_infinity_saturates(value, level):
    q, scale, zero_point = quantize_tokens(torch.tensor([[1.0, value, -1.0]]), 255)
    assert q[0, 1] == level
    assert q[0, 0] == q[0, 2] == zero_point  # nothing else is visible beside the largest float
    assert math.isclose(scale.item(), FLOAT32_MAX / 255, rel_tol=2 * ULP)


def test_the_widest_range_does_not_overflow():
    _, scale, zero_point = quantize_tokens(torch.tensor([[FLOAT32_MAX, -FLOAT32_MAX]]), 255)
    assert math.isclose(scale.item(), 2 * FLOAT32_MAX / 255, rel_tol=2 * ULP)
    assert zero_point.item() == 128  # 127.5, to even


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_activations(shape):
    q, scale, zero_point = quantize_tokens(torch.empty(shape), 255)
    assert q.shape == shape
    assert scale.shape == zero_point.shape == (shape[0], 1)


def test_symmetric_qparams():
    scale, zero_point = choose_qparams(torch.tensor([-2.54, -1.0]), torch.tensor([1.0, 1.27]), INT8)
    assert torch.allclose(scale, torch.tensor([0.02, 0.01]), rtol=ULP, atol=0)
    assert zero_point.tolist() == [0, 0]


def test_scale_steps_divide_the_range_as_torch_does():
    scale, _ = choose_qparams(torch.tensor([-1.0]), torch.tensor([0.5]), TORCH_INT8)
    assert math.isclose(scale.item(), 1 / 127.5, rel_tol=ULP)  # torch.ao: 2 max|w| / (127 - -128)


@pytest.mark.parametrize("spec", [UINT8, UINT4])
def test_affine_qparams(spec):
    low, high = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 4.0])
    scale, zero_point = choose_qparams(low, high, spec)
    assert torch.allclose(scale.double(), (high - low).double() / spec.qmax, rtol=2 * ULP, atol=0)
    assert torch.allclose(zero_point.double() * scale.double(), -low.double(), rtol=2 * ULP, atol=0)


@pytest.mark.parametrize("spec", [INT8, UINT8, UINT4])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.7, 1e-30])
def test_a_constant_channel_is_exact(spec, value):
    weight = torch.full((2, 4), value)
    scale, zero_point = choose_qparams(*weight_range(weight, spec), spec)
    q = quantize_with(weight, scale, zero_point, spec)
    q = spec.format.unpack(q, 4)
    back = (q.double() - zero_point.double().unsqueeze(1)) * scale.double().unsqueeze(1)
    assert torch.allclose(back, weight.double(), rtol=4 * ULP, atol=0)


@pytest.mark.parametrize("spec", [INT8, UINT8, UINT4])
def test_a_denormal_channel_is_zero(spec):
    weight = torch.full((1, 4), 1e-40)
    scale, zero_point = choose_qparams(*weight_range(weight, spec), spec)
    q = quantize_with(weight, scale, zero_point, spec)
    assert (q.tolist()[0][0], scale.item(), zero_point.item()) == (0, 1.0, 0.0)


@pytest.mark.parametrize("spec", [INT8, TORCH_INT8, UINT8])
def test_weights_come_back_within_half_a_step(spec):
    weight = torch.randn(16, 40) * torch.logspace(-3, 3, 16).unsqueeze(1)
    scale, zero_point = choose_qparams(*weight_range(weight, spec), spec)
    q = quantize_with(weight, scale, zero_point, spec)
    assert q.dtype == spec.torch_dtype
    error = ((q.double() - zero_point.double().unsqueeze(1)) * scale.double().unsqueeze(1) - weight.double()).abs()
    reach = 1.0 if spec is TORCH_INT8 else 0.5  # +127.5 has no integer
    assert bool((error <= scale.double().unsqueeze(1) * reach * (1 + 512 * ULP)).all())


def test_weights_round_half_to_even_and_clamp():
    spec = TensorSpec(dtype="int8", qmin=-3, qmax=3, symmetric=True, axis="channel")
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 9.0, -9.0]])
    q = quantize_with(weight, torch.ones(1), torch.zeros(1), spec)
    assert q.tolist() == [[0, 2, 2, 0, -2, 3, -3]]


@pytest.mark.parametrize("shape", [(1000, 700), (3, 300_000), (0, 5), (5, 0)])
def test_a_weight_of_any_size_is_quantized_row_by_row(shape):
    weight = torch.randn(shape)
    scale = torch.rand(shape[0]) + 0.01
    q = quantize_with(weight, scale, torch.zeros(shape[0]), INT8)
    assert torch.equal(q, (weight * (1 / scale)[:, None]).round().clamp(-127, 127).to(torch.int8))


def test_per_tensor_range_is_one_for_all_channels():
    spec = TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis="tensor")
    low, high = weight_range(torch.tensor([[-1.0, 2.0], [5.0, 3.0]]), spec)
    assert (low.tolist(), high.tolist()) == ([-1, -1], [5, 5])


@pytest.mark.parametrize(("shape", "channels"), [((0, 4), 0), ((3, 0), 3)])
def test_range_of_nothing(shape, channels):
    low, high = weight_range(torch.empty(shape), INT8)
    assert (low.tolist(), high.tolist()) == ([0.0] * channels, [0.0] * channels)


def test_float16_weights_saturate_instead_of_overflowing():
    values = to_floats(torch.tensor([[1e6, -1e6, 1.0]]), format_of("float16")).values
    assert values.dtype == torch.float16
    assert values.tolist() == [[65504.0, -65504.0, 1.0]]


def test_dequantize_reads_every_kind():
    half = torch.tensor([[0.5]], dtype=torch.float16)
    whole = torch.tensor([[3], [-2]], dtype=torch.int8)
    packed = torch.tensor([[0x21, 0x03]], dtype=torch.uint8)

    def read(name, *parts):
        return dequantize(QuantizedTensor(format_of(name), *parts)).tolist()

    assert read("float16", half, None, None, 1) == [[0.5]]
    assert read("int8", whole, torch.tensor([0.5, 2.0]), None, 1) == [[1.5], [-4.0]]
    assert read("uint4", packed, torch.tensor([2.0]), torch.tensor([1.0]), 3) == [[0.0, 2.0, 4.0]]


def test_the_widest_sum_of_products_fits_int32():
    assert MAX_COLUMNS * 255 * 128 < 2**31
    assert (MAX_COLUMNS + 1) * 255 * 128 > 2**31 - 255 * 128


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("columns", [1, 31, 64, 65, 200])
def test_int4_reads_back_what_it_wrote(columns, group_size):
    spec = TensorSpec(dtype="int4", qmin=-8, qmax=7, symmetric=True, axis="group", group_size=group_size)
    q = torch.randint(-7, 8, (3, columns))
    q[:, ::group_size] = -8  # so that each group's scale is its own
    scale = 2.0 ** torch.arange(-(-columns // group_size)) * torch.tensor([[1.0], [-0.5], [4.0]])
    weight = torch.stack([q[:, k] * scale[:, k // group_size] for k in range(columns)], dim=1)
    found, zero_point = choose_qparams(*weight_range(weight, spec), spec)
    assert torch.equal(found.float(), scale)
    values = quantize_with(weight, found, zero_point, spec)
    assert torch.equal(spec.format.unpack(values, columns), q.to(torch.int8))
    assert torch.equal(dequantize(QuantizedTensor(spec.format, values, found, None, columns, group_size)), weight)


def test_a_group_of_zeros_has_scale_1():
    spec = TensorSpec(dtype="int4", qmin=-8, qmax=7, symmetric=True, axis="group", group_size=32)
    weight = torch.cat((torch.ones(1, 32), torch.zeros(1, 40)), dim=1)
    scale, zero_point = choose_qparams(*weight_range(weight, spec), spec)
    assert scale.tolist() == [[-0.125, 1.0, 1.0]]
    assert spec.format.unpack(quantize_with(weight, scale, zero_point, spec), 72).tolist() == [[-8] * 32 + [0] * 40]


def test_int16_rows_come_back_within_half_a_step():
    x = torch.randn(40, 33) * torch.logspace(-20, 20, 40).unsqueeze(1)
    q, scale = quantize_tokens_int16(x)
    assert torch.equal(q, q.round())
    assert q.abs().amax(1).tolist() == [32767.0] * 40
    for row, got in zip(x.double(), scale[:, 0].tolist(), strict=True):
        assert math.isclose(got, float(row.abs().max()) / 32767, rel_tol=ULP)
    error = (q.double() * scale.double() - x.double()).abs()
    assert bool((error <= scale.double() * (0.5 + 32767 * 1.5 * ULP)).all())


@pytest.mark.parametrize("per_token", [True, False])
def test_an_int16_scale_is_a_rows_or_that_of_all(per_token):
    x = torch.tensor([[1.0, -2.0], [0.5, 32.767]])
    q, scale = quantize_tokens_int16(x, per_token)
    assert torch.allclose(scale, torch.tensor([[2 / 32767 if per_token else 0.001], [0.001]]), rtol=ULP, atol=0)
    assert q[1].tolist() == [500.0, 32767.0]
    assert q[0].tolist() == ([16384.0, -32767.0] if per_token else [1000.0, -2000.0])  # 16383.5 to the even one


def test_an_int16_row_of_special_values():
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[math.nan, 1.0], [math.inf, -1.0], [-math.inf, largest], [1e-40, -1e-36], [0.0, 0.0]])
    q, scale = quantize_tokens_int16(x)
    assert q[1:].tolist() == [[32767.0, 0.0], [-32767.0, 32767.0], [0.0, 0.0], [0.0, 0.0]]
    assert scale[0].isnan()
    assert torch.allclose(scale[1:3], torch.tensor([[largest / 32767]] * 2), rtol=ULP, atol=0)
    assert scale[3:].tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_int16_rows_of_nothing(shape):
    q, scale = quantize_tokens_int16(torch.zeros(shape))
    assert (q.shape, scale.tolist()) == (shape, [[1.0]] * shape[0])


def test_numbers_give_the_bits_that_tensors_give():
    generator = torch.Generator().manual_seed(0)
    bounds = torch.randn(400, 2, generator=generator) * 10 ** (6 * torch.randn(400, 1, generator=generator))
    bounds = torch.cat([bounds, torch.tensor([[0.0, 0.0], [-3e38, 3e38], [0.0, 1e-40], [-1.0, 0.0]])])
    for low, high in bounds.sort(1).values:
        for qmax in (3, 127, 255):
            scale, zero_point = choose_value_qparams(low, high, qmax)
            expected = scale.item(), (1.0 / scale).item(), zero_point.item()
            assert value_qparams_of(low.item(), high.item(), qmax) == expected
