"""The plain-torch operators, against Python's whole numbers and float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from fxquant import IndexRangeError
from fxquant.numerics import pack_uint4, quantize_rows, quantize_rows_int16
from fxquant.ops import reference

ULP = 2.0**-23


def random_int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def products(q, zero_point, weight):
    """Return (q - zero_point) @ weight.T in Python's whole numbers."""
    rows = [[int(v) - int(z) for v in row] for row, (z,) in zip(q.tolist(), zero_point.tolist(), strict=True)]
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in weight.tolist()] for row in rows]


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 513, 3), (17, 64, 9), (1, 2000, 2)])
def test_integer_matmul_is_exact(monkeypatch, shape, is_fast):
    if is_fast and not reference.has_exact_int_mm():
        pytest.skip("this CPU's torch._int_mm is not exact")
    monkeypatch.setattr(reference, "has_exact_int_mm", lambda: is_fast)
    m, k, n = shape
    q, zero_point = torch.randint(256, (m, k)).float(), torch.randint(256, (m, 1)).float()
    weight = random_int8(n, k)
    assert reference.integer_matmul(q, zero_point, weight).tolist() == products(q, zero_point, weight)


@pytest.mark.parametrize("is_fast", [False, True])
def test_integer_matmul_is_exact_at_the_extremes(monkeypatch, is_fast):
    if is_fast and not reference.has_exact_int_mm():
        pytest.skip("this CPU's torch._int_mm is not exact")
    monkeypatch.setattr(reference, "has_exact_int_mm", lambda: is_fast)
    columns = 60_001  # the sum, about 2**31 * 0.9, is odd: no float32 holds it
    q, weight = torch.full((2, columns), 255.0), torch.full((3, columns), 127, dtype=torch.int8)
    sums = reference.integer_matmul(q, torch.zeros(2, 1), weight)
    assert set(sums.flatten().tolist()) == {columns * 255 * 127}


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (2, 0, 3)])
def test_integer_matmul_of_nothing_is_zeros(shape):
    m, k, n = shape
    sums = reference.integer_matmul(torch.zeros(m, k), torch.zeros(m, 1), random_int8(n, k))
    assert torch.equal(sums, torch.zeros(m, n, dtype=torch.int32))


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("qmax", [255, 127])
@pytest.mark.parametrize("relu", [True, False])
def test_linear_is_its_equation(per_row, qmax, relu):
    x, weight = torch.randn(4, 30) * 3, random_int8(6, 30)
    scale, bias = torch.rand(6) / 50, torch.randn(6)
    q, row_scale, zero_point = quantize_rows(x, qmax, per_row)
    sums = torch.tensor(products(q, zero_point, weight), dtype=torch.float64)
    scaled = sums * row_scale.double() * scale.double()
    expected = (scaled + bias.double()).clamp(min=0 if relu else -math.inf)
    got = reference.linear(x, weight, scale, bias, relu, per_row, qmax)
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
    assert bool(((reference.linear(x, weight, None, bias) - expected).abs() <= bound).all())


def test_expm1_is_accurate():
    x = torch.cat((torch.linspace(-43, 43, 20001), torch.logspace(-30, 0, 500), -torch.logspace(-30, 0, 500)))
    exact = torch.expm1(x.double())
    assert bool(((reference.expm1_(x.clone()) - exact).abs() <= 4e-7 * exact.abs()).all())


def test_expm1_saturates_and_keeps_nan():
    got = reference.expm1_(torch.tensor([math.inf, -math.inf, 0.0, math.nan]))
    assert got[0] == reference.expm1_(torch.tensor([43.0]))
    assert got[1] == -1
    assert got[2] == 0
    assert got[3].isnan()


@pytest.mark.parametrize("bits", [8, 4])
def test_embedding_is_its_equation(bits):
    q = torch.randint(2**bits, (10, 5), dtype=torch.uint8)
    scale, zero_point = torch.rand(10), torch.randn(10) * 5
    indices = torch.tensor([[3, 9, 0], [3, 1, 1]])
    got = reference.embedding(indices, pack_uint4(q) if bits == 4 else q, scale, zero_point, 5, bits)
    expected = (q.double() - zero_point.double()[:, None]) * scale.double()[:, None]
    bound = ULP * scale.double()[:, None] * (2**bits + zero_point.abs().double()[:, None])
    assert bool(((got - expected[indices]).abs() <= bound[indices]).all())


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 0, 3), (2, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_embedding_takes_indices_of_any_rank(shape, dtype):
    weight, scale = random_int8(10, 5), torch.rand(10)
    indices = torch.randint(10, shape, dtype=dtype)
    got = reference.embedding(indices, weight, scale, None, 5)
    assert torch.equal(got, (weight.float() * scale[:, None])[indices.long()])


@pytest.mark.parametrize("bad", [-1, 10])
@pytest.mark.parametrize("name", ["embedding", "embedding_bag"])
def test_indices_beyond_the_table_are_refused(bad, name):
    with pytest.raises(IndexRangeError, match=f"of 10 rows got indices from {min(bad, 2)} to {max(bad, 2)}"):
        getattr(reference, name)(torch.tensor([[2, bad]]), random_int8(10, 5), torch.rand(10), None, 5)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3, -2])
@pytest.mark.parametrize("form", ["2-D", "offsets", "last offset"])
def test_embedding_bag_is_torchs_on_the_dequantized_table(mode, padding_idx, form):
    weight, scale = random_int8(10, 5), torch.rand(10)
    table = weight.float() * scale[:, None]
    indices = torch.randint(10, (6, 4))
    indices[2] = 3  # a bag of padding alone
    offsets = {"2-D": None, "offsets": torch.tensor([0, 5, 5, 20]), "last offset": torch.tensor([0, 5, 5, 24])}[form]
    options = {"offsets": offsets, "mode": mode, "padding_idx": padding_idx,
               "include_last_offset": form == "last offset"}  # fmt: skip
    indices = indices if offsets is None else indices.reshape(-1)
    got = reference.embedding_bag(indices, weight, scale, None, 5, **options)
    expected = F.embedding_bag(indices, table.double(), **options)
    assert torch.allclose(got.double(), expected, rtol=0, atol=24 * ULP * float(table.abs().max()) * 12)


def test_embedding_bag_weighs_samples():
    weight, scale, indices = random_int8(10, 5), torch.rand(10), torch.randint(10, (3, 4))
    samples = torch.randn(3, 4)
    got = reference.embedding_bag(indices, weight, scale, None, 5, mode="sum", per_sample_weights=samples)
    table = weight.double() * scale.double()[:, None]
    expected = (table[indices] * samples.double()[..., None]).sum(1)
    assert torch.allclose(got.double(), expected, rtol=0, atol=8 * ULP * float(table.abs().max()) * 4 * 4)


def test_an_empty_bag_is_zeros():
    got = reference.embedding_bag(
        torch.tensor([1, 2]), random_int8(10, 5), torch.rand(10), None, 5, torch.tensor([0, 0, 2]), "mean"
    )
    assert torch.equal(got[[0, 2]], torch.zeros(2, 5))


@pytest.mark.parametrize("columns", [1, 33, 64, 100])
@pytest.mark.parametrize("relu", [True, False])
def test_int4_linear_is_its_equation(columns, relu):
    x, bias = torch.randn(4, columns) * 3, torch.randn(6)
    weight = torch.randint(-8, 8, (6, columns), dtype=torch.int8)
    scale = (torch.randn(6, -(-columns // 32)) * 0.1).to(torch.bfloat16)
    packed = pack_uint4((weight + 8).to(torch.uint8))
    y = reference.linear(x, packed, scale, bias, relu, True, 255, 32, columns)
    q, row_scale, zero_point = quantize_rows(x, 255)
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
    y = reference.linear(torch.zeros(2, 0), weight, scale, bias, True, True, 255, 64, 0)
    assert y.tolist() == [[1.0, 0.0, 3.0]] * 2
    assert bias.tolist() == [1.0, -2.0, 3.0]


@pytest.mark.parametrize("columns", [1, 64, 3000])
@pytest.mark.parametrize("per_row", [True, False])
def test_int16_linear_is_its_equation(columns, per_row):
    x, bias, scale = torch.randn(4, columns) * 3, torch.randn(6), torch.rand(6)
    weight = torch.randint(-32768, 32768, (6, columns), dtype=torch.int16)
    y = reference.linear(x, weight, scale, bias, True, per_row, 255)
    q, row_scale = quantize_rows_int16(x, per_row)
    # Python's integers are exact; each float32 operation is that of numbers rounded before
    sums = [[sum(a * b for a, b in zip(map(int, row), w, strict=True)) for w in weight.tolist()] for row in q.tolist()]
    product = torch.tensor(sums).to(torch.float32) * (row_scale * scale)
    assert torch.equal(y, (product + bias).clamp(min=0))


def test_an_int16_sum_beyond_float32_is_rounded_once():
    weight = torch.full((1, 2049), 32767, dtype=torch.int16)
    weight[0, 0] = 1  # a sum of 2048 * 32767**2 + 32767, of 41 bits, which no float32 and no int32 holds
    y = reference.linear(torch.ones(1, 2049), weight, torch.ones(1))
    inverse = torch.tensor(1.0) / 32767
    assert y.item() == (torch.tensor(float(2048 * 32767**2 + 32767)) * inverse).item()
