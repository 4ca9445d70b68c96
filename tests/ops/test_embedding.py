"""The operators embedding and embedding_bag: their references, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from fxquant import DTypeError, IndexRangeError, ops
from fxquant.formats import UINT4
from tests.ops import reference
from tests.ops.operands import random_int8, table_arguments

ULP = 2.0**-23


@pytest.mark.parametrize("bits", [8, 4])
def test_embedding_is_its_equation(bits):
    q = torch.randint(2**bits, (10, 5), dtype=torch.uint8)
    scale, zero_point = torch.rand(10), torch.randn(10) * 5
    indices = torch.tensor([[3, 9, 0], [3, 1, 1]])
    got = reference.embedding(indices, UINT4.pack(q) if bits == 4 else q, scale, zero_point, 5, f"uint{bits}")
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


@pytest.mark.parametrize("name", ["embedding", "embedding_bag"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool])
def test_tables_refuse_other_indices(name, dtype):
    indices, *table = table_arguments()
    with pytest.raises(DTypeError, match=rf"takes int32 or int64 indices, got {dtype}"):
        getattr(ops, name)(indices.to(dtype), *table)
