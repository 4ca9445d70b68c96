"""QuantizedEmbedding and QuantizedEmbeddingBag: near the float rows by half a step, and every option."""

import pytest
import torch
from torch import nn

from fxquant import (
    DTypeError,
    IndexRangeError,
    ShapeError,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    per_tensor_dynamic_qconfig,
)
from fxquant.nn import QuantizedEmbedding, QuantizedEmbeddingBag
from fxquant.qconfig import default_dynamic_qconfig

QCONFIGS = {
    "int8": default_dynamic_qconfig,
    "uint8": float_qparams_weight_only_qconfig,
    "uint4": float_qparams_weight_only_qconfig_4bit,
    "float16": float16_dynamic_qconfig,
    "one scale": per_tensor_dynamic_qconfig,
}


def half_steps(weight, kind):
    """Return half a quantization step of each row, (V, 1)."""
    weight = weight.detach().double()
    top = weight.abs().amax(1, keepdim=True)
    span = weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)
    return {
        "int8": top / 127 / 2,
        "uint8": span / 255 / 2,
        "uint4": span / 15 / 2,
        "float16": top * 2**-11,
        "one scale": (top.max() / 127.5).expand_as(top),  # a whole step: +127.5 has no integer
    }[kind] * (1 + 2**-12) + 2**-20 * top


@pytest.mark.parametrize("kind", QCONFIGS)
@pytest.mark.parametrize("columns", [8, 7, 1])
def test_rows_come_back_within_half_a_step(kind, columns):
    module = nn.Embedding(20, columns)
    quantized = QuantizedEmbedding.from_float(module, QCONFIGS[kind])
    error = (quantized(torch.arange(20)).double() - module.weight.detach().double()).abs()
    assert bool((error <= half_steps(module.weight, kind)).all())


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 0), (2, 1, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_of_any_rank_and_both_dtypes(shape, dtype):
    quantized = QuantizedEmbedding.from_float(nn.Embedding(20, 7))
    indices = torch.randint(20, shape, dtype=dtype)
    table = quantized(torch.arange(20))
    assert torch.equal(quantized(indices), table[indices.long()])


def test_non_contiguous_indices():
    quantized = QuantizedEmbedding.from_float(nn.Embedding(20, 7))
    indices = torch.randint(20, (8, 6)).t()[::2, 1::3]
    assert not indices.is_contiguous()
    assert torch.equal(quantized(indices), quantized(indices.contiguous()))


def test_the_padding_row_is_kept_as_trained():
    module = nn.Embedding(20, 7, padding_idx=3)
    quantized = QuantizedEmbedding.from_float(module)
    assert torch.equal(quantized(torch.tensor([3])), torch.zeros(1, 7))
    assert quantized.padding_idx == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_have_the_float_tables_dtype(dtype):
    module = nn.Embedding(20, 7).to(dtype)
    assert QuantizedEmbedding.from_float(module)(torch.arange(3)).dtype == dtype
    assert QuantizedEmbeddingBag.from_float(nn.EmbeddingBag(20, 7, dtype=dtype))(torch.ones(1, 3).long()).dtype == dtype


@pytest.mark.parametrize("bad", [20, -1])
@pytest.mark.parametrize("kind", [QuantizedEmbedding, QuantizedEmbeddingBag])
def test_an_index_beyond_the_table_is_refused(bad, kind):
    module = {QuantizedEmbedding: nn.Embedding, QuantizedEmbeddingBag: nn.EmbeddingBag}[kind](20, 7)
    with pytest.raises(IndexRangeError, match="a quantized table of 20 rows got indices from"):
        kind.from_float(module)(torch.tensor([[1, bad]]))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("kind", ["int8", "uint8", "uint4", "float16"])
def test_bags_are_near_the_float_bags(mode, padding_idx, kind):
    module = nn.EmbeddingBag(20, 7, mode=mode, padding_idx=padding_idx)
    indices = torch.randint(20, (6, 5))
    indices[1] = 3
    got = QuantizedEmbeddingBag.from_float(module, QCONFIGS[kind])(indices)
    assert (got - module(indices)).abs().max() <= half_steps(module.weight, kind).max() * (5 if mode == "sum" else 1)


@pytest.mark.parametrize("include_last_offset", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bags_by_offsets(include_last_offset, dtype):
    module = nn.EmbeddingBag(20, 7, include_last_offset=include_last_offset)
    indices, offsets = torch.randint(20, (9,), dtype=dtype), torch.tensor([0, 2, 2, 9], dtype=dtype)
    got = QuantizedEmbeddingBag.from_float(module)(indices, offsets)
    expected = module(indices, offsets)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= half_steps(module.weight, "int8").max()


def test_weighted_bags():
    module = nn.EmbeddingBag(20, 7, mode="sum")
    indices, weights = torch.randint(20, (4, 5)), torch.randn(4, 5)
    got = QuantizedEmbeddingBag.from_float(module)(indices, per_sample_weights=weights)
    bound = half_steps(module.weight, "int8").max() * weights.abs().sum(1, keepdim=True)
    assert bool(((got - module(indices, per_sample_weights=weights)).abs() <= bound * 1.001).all())


def test_no_bags_give_no_rows():
    module = QuantizedEmbeddingBag.from_float(nn.EmbeddingBag(20, 7))
    assert module(torch.empty(0, 4, dtype=torch.int64)).shape == (0, 7)
    assert module(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)).shape == (0, 7)


@pytest.mark.parametrize(("shape", "offsets"), [((4,), None), ((2, 4), [0, 1]), ((2, 2, 2), None), ((), None)])
def test_a_bag_of_another_form_is_refused(shape, offsets):
    given = None if offsets is None else torch.tensor(offsets)
    with pytest.raises(ShapeError, match="takes 2-D input without offsets or 1-D input with offsets"):
        QuantizedEmbeddingBag.from_float(nn.EmbeddingBag(20, 7))(torch.zeros(shape, dtype=torch.int64), given)


@pytest.mark.parametrize(("mode", "shape"), [("mean", (2, 4)), ("sum", (4, 2))])
def test_sample_weights_that_do_not_fit_are_refused(mode, shape):
    module = QuantizedEmbeddingBag.from_float(nn.EmbeddingBag(20, 7, mode=mode))
    with pytest.raises(ShapeError, match=r"per_sample_weights must have the input's shape \(2, 4\) and mode 'sum'"):
        module(torch.zeros(2, 4, dtype=torch.int64), None, torch.ones(shape))


@pytest.mark.parametrize("given", [{"offsets": [0, 1]}, {"offsets": torch.tensor([0]), "per_sample_weights": [1.0]}])
def test_offsets_and_sample_weights_are_tensors(given):
    module = QuantizedEmbeddingBag.from_float(nn.EmbeddingBag(20, 7, mode="sum"))
    with pytest.raises(DTypeError, match=f"EmbeddingBag's {list(given)[-1]} takes a tensor, got list"):
        module(torch.zeros(4, dtype=torch.int64), **given)


def test_repr_shows_sizes_and_scheme():
    embedding = QuantizedEmbedding.from_float(nn.Embedding(20, 7, padding_idx=3))
    bag = QuantizedEmbeddingBag.from_float(nn.EmbeddingBag(20, 7, mode="max"), float_qparams_weight_only_qconfig_4bit)
    assert repr(embedding) == "QuantizedEmbedding(20, 7, padding_idx=3, int8 symmetric per channel)"
    assert repr(bag) == "QuantizedEmbeddingBag(20, 7, uint4 affine per channel, mode='max')"


def test_4_bit_rows_take_half_the_bytes():
    module = QuantizedEmbedding.from_float(nn.Embedding(20, 8), float_qparams_weight_only_qconfig_4bit)
    assert module.weight_uint4.shape == (20, 4)
