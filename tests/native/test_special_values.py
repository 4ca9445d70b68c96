"""The table of special rows in docs/numerics.md, a cell a test, on each instruction set and in the reference."""

import math

import pytest
import torch

from fxquant.formats import format_of
from tests.native import native
from tests.native.cases import kernels
from tests.ops import reference

COLUMNS, MAX = 70, torch.finfo(torch.float32).max
WEIGHT = torch.ones(5, COLUMNS, dtype=torch.int8)
WEIGHT[1] = -127
WEIGHT[2, ::2] = 0
SCALE = torch.tensor([1.0, 0.5, 2.0, 0.25, 1.0])
BIAS = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5])
REAL = WEIGHT.double() * SCALE.double()[:, None]


@pytest.fixture(params=["int8", "int16"])
def name(request):
    return request.param


@pytest.fixture
def linear(isa, name):
    """The kernels' linear, on weights of each format."""
    dtype = format_of(name).storage
    with kernels(isa, 1):
        yield lambda x, weight, *rest: native.linear(x, weight.to(dtype), *rest, format=name)


def row(value, at=3, others=1.0):
    x = torch.full((3, COLUMNS), others)
    x[1, at] = value
    return x


def test_nan_gives_nan_in_its_row_and_nowhere_else(linear):
    y, clean = linear(row(math.nan), WEIGHT, SCALE, BIAS), linear(row(1.0), WEIGHT, SCALE, BIAS)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 15, 16, 31, 32, 33, 39, 40, 70])
def test_a_token_of_any_width_is_measured_whole(isa, columns):
    """A NaN or a largest value is seen wherever it stands: row i has it in column i."""
    weight, scale = torch.ones(3, columns, dtype=torch.int8), torch.ones(3)
    for value in (math.nan, 100.0, -100.0):
        x = torch.rand(columns, columns) - 0.5
        x.fill_diagonal_(value)
        expected = reference.linear(x, weight, scale, None)
        with kernels(isa, 1):
            assert torch.equal(native.linear(x, weight, scale, None).nan_to_num(1e9), expected.nan_to_num(1e9)), value


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_infinity_is_the_greatest_float_and_the_others_are_zero(linear, sign):
    y = linear(row(sign * math.inf), WEIGHT, SCALE, BIAS)
    assert torch.equal(y, linear(row(sign * MAX), WEIGHT, SCALE, BIAS))
    expected = (sign * MAX * REAL[:, 3] + BIAS.double()).clamp(-MAX, MAX)
    got = y[1].double().clamp(-MAX, MAX)
    assert ((got - expected).abs() <= 1e-5 * expected.abs() + 1e-6).all()  # 255 steps make up the range, to rounding


def test_the_widest_range_does_not_overflow(linear):
    x = torch.zeros(1, COLUMNS)
    x[0, 0], x[0, 2] = MAX, -MAX
    y = linear(x, WEIGHT * 0 + 1, SCALE * 1e-3, None)
    # the two ends cancel but for the zero point's rounding: at most one step of 2 MAX / 255
    assert (y.abs() <= SCALE * 1e-3 * (2 * MAX / 255)).all()


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, -3e-39])
def test_a_row_of_subnormals_is_zero(linear, tiny):
    assert torch.equal(linear(torch.full((2, COLUMNS), tiny), WEIGHT, SCALE, BIAS), BIAS.expand(2, 5))


@pytest.mark.parametrize("constant", [0.0, 3.7, -0.02, 1e30])
def test_a_constant_row_is_that_constant(linear, constant):
    x = torch.full((2, COLUMNS), constant)
    expected = x.double() @ REAL.t() + BIAS.double()
    slack = 1e-6 * (abs(constant) * REAL.abs().sum(1) + BIAS.abs())  # float32 rounding of scale, product and sum
    assert ((linear(x, WEIGHT, SCALE, BIAS) - expected).abs() <= slack).all()


def test_an_empty_row_is_the_bias(linear):
    y = linear(torch.zeros(2, 0), torch.zeros(5, 0, dtype=torch.int8), SCALE, BIAS)
    assert torch.equal(y, BIAS.expand(2, 5))


def test_no_outputs_and_no_rows_are_empty(linear):
    assert linear(torch.zeros(2, 4), torch.zeros(0, 4, dtype=torch.int8), torch.zeros(0)).shape == (2, 0)
    assert linear(torch.zeros(0, COLUMNS), WEIGHT, SCALE).shape == (0, 5)


def test_the_reference_gives_the_same(linear, name):
    storage = format_of(name).storage
    for x in (row(math.nan), row(math.inf), row(-math.inf), row(MAX), row(1e-42, others=0.0), row(2.0)):
        ours = linear(x, WEIGHT, SCALE, BIAS)
        theirs = reference.linear(x, WEIGHT.to(storage), SCALE, BIAS, format=name)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
