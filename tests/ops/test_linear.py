"""The operator linear: its reference against the equations, and what it refuses."""

import importlib
import math
import re

import pytest
import torch
import torch.nn.functional as F

from fxquant import ArgumentError, DTypeError, ShapeError, ops
from fxquant.formats import FORMATS
from fxquant.numerics import quantize_tokens, quantize_tokens_int16
from fxquant.ops.linear import integer_matmul
from fxquant.qconfig import int16_dynamic_qconfig
from tests.ops import reference
from tests.ops.operands import quantized, quantized_int4, random_int8

MODULE = importlib.import_module("fxquant.ops.linear")  # whose name in the package is the function's
ULP = 2.0**-23


def products(q, zero_point, weight):
    """Return (q - zero_point) @ weight.T in Python's whole numbers."""
    rows = [[int(v) - int(z) for v in row] for row, (z,) in zip(q.tolist(), zero_point.tolist(), strict=True)]
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in weight.tolist()] for row in rows]


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 513, 3), (17, 64, 9), (1, 2000, 2)])
def test_integer_matmul_is_exact(monkeypatch, shape, is_fast):
    if is_fast and not MODULE.has_exact_int_mm():
        pytest.skip("this CPU's torch._int_mm is not exact")
    monkeypatch.setattr(MODULE, "has_exact_int_mm", lambda: is_fast)
    m, k, n = shape
    q, zero_point = torch.randint(256, (m, k)).float(), torch.randint(256, (m, 1)).float()
    weight = random_int8(n, k)
    assert integer_matmul(q, zero_point, weight).tolist() == products(q, zero_point, weight)


@pytest.mark.parametrize("is_fast", [False, True])
def test_integer_matmul_is_exact_at_the_extremes(monkeypatch, is_fast):
    if is_fast and not MODULE.has_exact_int_mm():
        pytest.skip("this CPU's torch._int_mm is not exact")
    monkeypatch.setattr(MODULE, "has_exact_int_mm", lambda: is_fast)
    columns = 60_001  # the sum, about 2**31 * 0.9, is odd: no float32 holds it
    q, weight = torch.full((2, columns), 255.0), torch.full((3, columns), 127, dtype=torch.int8)
    sums = integer_matmul(q, torch.zeros(2, 1), weight)
    assert set(sums.flatten().tolist()) == {columns * 255 * 127}


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (2, 0, 3)])
def test_integer_matmul_of_nothing_is_zeros(shape):
    m, k, n = shape
    sums = integer_matmul(torch.zeros(m, k), torch.zeros(m, 1), random_int8(n, k))
    assert torch.equal(sums, torch.zeros(m, n, dtype=torch.int32))


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("qmax", [255, 127])
@pytest.mark.parametrize("relu", [True, False])
def test_linear_is_its_equation(per_token, qmax, relu):
    x, weight = torch.randn(4, 30) * 3, random_int8(6, 30)
    scale, bias = torch.rand(6) / 50, torch.randn(6)
    q, row_scale, zero_point = quantize_tokens(x, qmax, per_token)
    sums = torch.tensor(products(q, zero_point, weight), dtype=torch.float64)
    scaled = sums * row_scale.double() * scale.double()
    expected = (scaled + bias.double()).clamp(min=0 if relu else -math.inf)
    got = reference.linear(x, weight, scale, bias, relu, per_token, qmax)
    # float32: the sum, the scales' product, the two products, the addition round once each
    assert bool(((got.double() - expected).abs() <= 2.5 * ULP * (scaled.abs() + bias.abs())).all())


@pytest.mark.parametrize("shape", [(30,), (2, 30), (2, 3, 4, 30), (0, 30), (2, 0, 30)])
def test_linear_takes_any_leading_dimensions(shape):
    x, weight, scale = torch.randn(shape), random_int8(6, 30), torch.rand(6)
    got = reference.linear(x, weight, scale)
    assert got.shape == (*shape[:-1], 6)
    rows = [reference.linear(row, weight, scale) for row in x.reshape(-1, 30)]
    assert torch.equal(got.reshape(-1, 6), torch.stack(rows) if rows else torch.empty(0, 6))


def test_linear_takes_strided_rows():
    x, weight, scale = torch.randn(30, 5).t(), random_int8(6, 30), torch.rand(6)
    assert torch.equal(reference.linear(x, weight, scale), reference.linear(x.contiguous(), weight, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_linear_computes_in_float32_and_gives_back_the_inputs_dtype(dtype):
    x, weight, scale, bias = torch.randn(3, 30).to(dtype), random_int8(6, 30), torch.rand(6), torch.randn(6).to(dtype)
    got = reference.linear(x, weight, scale, bias)
    assert got.dtype == dtype
    assert torch.equal(got, reference.linear(x.float(), weight, scale, bias.float()).to(dtype))


def test_linear_with_half_weights_is_the_float_product():
    x, weight, bias = torch.randn(3, 30), torch.randn(6, 30).half(), torch.randn(6)
    expected = F.linear(x.double(), weight.double(), bias.double())
    bound = 32 * ULP / 2 * (x.abs().double() @ weight.abs().double().t() + bias.abs())
    assert bool(((reference.linear(x, weight, None, bias, format="float16") - expected).abs() <= bound).all())


@pytest.mark.parametrize("row", [row for row in FORMATS if row.group_sizes], ids=str)
@pytest.mark.parametrize("columns", [1, 33, 64, 100])
@pytest.mark.parametrize("relu", [True, False])
def test_a_linear_in_groups_is_its_equation(row, columns, relu):
    x, bias = torch.randn(4, columns) * 3, torch.randn(6)
    weight = torch.randint(row.limits[0], row.limits[1] + 1, (6, columns), dtype=torch.int8)
    scale = (torch.randn(6, -(-columns // 32)) * 0.1).to(torch.bfloat16)
    packed = row.pack(weight)
    y = reference.linear(x, packed, scale, bias, relu, True, 255, row.name, 32, columns)
    q, row_scale, zero_point = quantize_tokens(x, 255)
    expected, size = bias.double().expand(4, 6), bias.double().abs().expand(4, 6)
    for g in range(scale.shape[1]):
        part = slice(32 * g, 32 * g + 32)
        sums = torch.tensor(products(q[:, part], zero_point, weight[:, part])).double()
        expected = expected + sums * row_scale.double() * scale[:, g].double()
        size = size + (sums * row_scale.double() * scale[:, g].double()).abs()
    expected = expected.clamp(min=0) if relu else expected
    assert bool(((y.double() - expected).abs() <= 8 * ULP * size).all())


def test_int4_linear_without_columns_is_the_bias():
    weight, scale = torch.zeros(3, 0, dtype=torch.uint8), torch.zeros(3, 0, dtype=torch.bfloat16)
    bias = torch.tensor([1.0, -2.0, 3.0])
    y = reference.linear(torch.zeros(2, 0), weight, scale, bias, True, True, 255, "int4", 64, 0)
    assert y.tolist() == [[1.0, 0.0, 3.0]] * 2
    assert bias.tolist() == [1.0, -2.0, 3.0]


@pytest.mark.parametrize("columns", [1, 64, 3000])
@pytest.mark.parametrize("per_token", [True, False])
def test_int16_linear_is_its_equation(columns, per_token):
    x, bias, scale = torch.randn(4, columns) * 3, torch.randn(6), torch.rand(6)
    weight = torch.randint(-32768, 32768, (6, columns), dtype=torch.int16)
    y = reference.linear(x, weight, scale, bias, True, per_token, 255, "int16")
    q, row_scale = quantize_tokens_int16(x, per_token)
    # Python's integers are exact; each float32 operation is that of numbers rounded before
    sums = [[sum(a * b for a, b in zip(map(int, row), w, strict=True)) for w in weight.tolist()] for row in q.tolist()]
    product = torch.tensor(sums).to(torch.float32) * (row_scale * scale)
    assert torch.equal(y, (product + bias).clamp(min=0))


def test_an_int16_sum_beyond_float32_is_rounded_once():
    weight = torch.full((1, 2049), 32767, dtype=torch.int16)
    weight[0, 0] = 1  # a sum of 2048 * 32767**2 + 32767, of 41 bits, which no float32 and no int32 holds
    y = reference.linear(torch.ones(1, 2049), weight, torch.ones(1), format="int16")
    inverse = torch.tensor(1.0) / 32767
    assert y.item() == (torch.tensor(float(2048 * 32767**2 + 32767)) * inverse).item()


LINEAR = quantized(4, 6)


@pytest.mark.parametrize("shape", [(3, 5), (), (6, 3)])
def test_linear_refuses_another_shape(shape):
    with pytest.raises(ShapeError, match=r"of 6 inputs takes x of shape \(..., 6\), got"):
        ops.linear(torch.zeros(shape), *LINEAR)


@pytest.mark.parametrize("columns", [74, 76, 38])
def test_int4_linear_refuses_another_shape(columns):
    weight, groups = quantized_int4(4, 75)
    with pytest.raises(ShapeError, match=rf"of 75 inputs takes x of shape \(..., 75\), got \(3, {columns}\)"):
        ops.linear(torch.zeros(3, columns), *weight, None, False, True, 255, *groups)


@pytest.mark.parametrize(
    ("weight", "scale", "group_size", "words"),
    [
        ((4, 37), (4, 3), 32, "got torch.uint8 (4, 37)"),
        ((4, 38), (4, 2), 32, "with scale torch.bfloat16 (4, 2)"),
        ((4, 38), (3, 3), 32, "with scale torch.bfloat16 (3, 3)"),
        ((4, 38), (12,), 32, "with scale torch.bfloat16 (12,)"),
        ((4, 38), (4, 3), 48, "with scale one a group of 32 or 64 or 128 columns"),
        ((4, 38), (4, 3), 0, "with scale one a group of 32 or 64 or 128 columns"),
    ],
)
def test_int4_linear_refuses_weights_and_scales_that_do_not_fit(weight, scale, group_size, words):
    operands = torch.zeros(weight, dtype=torch.uint8), torch.ones(scale, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match=r"\(4, 75\) in int4: expected torch.uint8 \(4, 38\) .*" + re.escape(words)):
        ops.linear(torch.zeros(3, 75), *operands, None, False, True, 255, "int4", group_size, 75)


@pytest.mark.parametrize(("weight", "scale"), [("int8", "bfloat16"), ("uint8", "float32")])
def test_int4_linear_refuses_other_dtypes(weight, scale):
    operands = torch.zeros(4, 38, dtype=getattr(torch, weight)), torch.ones(4, 3, dtype=getattr(torch, scale))
    words = rf"expected torch.uint8 .* with scale torch.bfloat16 .*, got torch.{weight} .* with scale torch.{scale}"
    with pytest.raises(DTypeError, match=words):
        ops.linear(torch.zeros(3, 75), *operands, None, False, True, 255, "int4", 32, 75)


@pytest.mark.parametrize("name", ["int17", "uint4", "float32", ""])
def test_linear_refuses_a_format_that_no_product_has(name):
    words = f"a quantized linear takes one of the formats 'int8', .*'float16', got {name!r}"
    for operands in (LINEAR, (torch.zeros(4, 3, dtype=torch.uint8), None), (torch.zeros(4, 6), None)):
        with pytest.raises(ArgumentError, match=words):
            ops.linear(torch.zeros(3, 6), *operands, format=name, in_features=6)


@pytest.mark.parametrize("name", ["int16", "float16"])
def test_linear_takes_no_weight_for_one_of_another_format(name):
    with pytest.raises(DTypeError, match=rf"in {name}: expected torch.{name} .*, got torch.int8"):
        ops.linear(torch.zeros(3, 6), *LINEAR, format=name)


def test_a_format_of_floats_has_no_scale():
    with pytest.raises(ShapeError, match=r"in float16: expected torch.float16 \(4, 6\) with no scale, got"):
        ops.linear(torch.zeros(3, 6), torch.zeros(4, 6).half(), torch.ones(4), format="float16")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_linear_refuses_integers(dtype):
    with pytest.raises(DTypeError, match=f"takes a float tensor, got {dtype}".replace(".", r"\.")):
        ops.linear(torch.zeros(3, 6, dtype=dtype), *LINEAR)


def test_activations_of_16_bits_have_a_greatest_integer_of_their_own():
    weight, scale = int16_dynamic_qconfig.quantize_weight(torch.randn(4, 6)).tensors[:2]
    x = torch.randn(3, 6)
    expected = reference.linear(x, weight, scale, format="int16")
    assert torch.equal(ops.linear(x, weight, scale, None, False, True, 32767, "int16"), expected)
