"""Outputs follow .half(), .bfloat16(), .double() and .to(dtype) after quantizing, in copies and files too."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import convert_fx, default_dynamic_qconfig_mapping, prepare_fx, quantize_dynamic

DTYPES = (torch.float16, torch.bfloat16, torch.float64)


class Calls(nn.Module):
    """Tables and a product that are calls, not modules."""

    def __init__(self):
        super().__init__()
        self.table, self.bags = nn.Parameter(torch.randn(11, 16)), nn.Parameter(torch.randn(11, 16))
        self.weight, self.bias = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(8))

    def forward(self, words):
        rows = F.embedding(words, self.table).mean(1) + F.embedding_bag(words, self.bags)
        return F.linear(rows, self.weight, self.bias)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.bags = nn.Embedding(11, 16, padding_idx=0), nn.EmbeddingBag(11, 16)
        self.lstm, self.gru = nn.LSTM(16, 12, batch_first=True), nn.GRU(12, 16, batch_first=True)
        self.attention, self.norm = nn.MultiheadAttention(16, 2, batch_first=True), nn.LayerNorm(16)
        self.conv, self.last = nn.Conv1d(16, 64, 65, padding=32), nn.Linear(64, 8)

    def forward(self, words):
        x = self.norm(self.words(words))
        x = self.norm(self.gru(self.lstm(x)[0])[0])
        x = self.attention(x, x, x, need_weights=False)[0] + self.bags(words)[:, None]
        return self.last(self.conv(x.transpose(1, 2)).mean(2))


def by_fx(model, words):
    return convert_fx(prepare_fx(model, default_dynamic_qconfig_mapping(), words))


def by_module(model, _):
    return quantize_dynamic(model)


WAYS = [(Calls, by_fx), (Layers, by_fx), (Layers, by_module)]
IDS = ["calls", "graph", "modules"]


@pytest.fixture
def words():
    return torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "way"), WAYS, ids=IDS)
def test_outputs_follow_and_the_integers_stay(kind, way, dtype, words):
    torch.manual_seed(0)
    quantized = way(kind().eval(), words)
    expected = quantized(words)
    scales = {name: t for name, t in quantized.state_dict().items() if name.endswith("_scale")}
    moved = copy.deepcopy(quantized).to(dtype)
    got = moved(words)
    assert got.dtype == dtype
    # Each of at most ten operators rounds to the dtype, and an activation may fall to the next of 255 steps.
    slack = 10 * torch.finfo(dtype).eps + 10 / 255 * (dtype != torch.float64)
    assert (got.double() - expected.double()).abs().max() <= slack * expected.abs().max()
    assert all(torch.equal(moved.state_dict()[name], scale) for name, scale in scales.items())
    assert moved.to(torch.float32)(words).dtype == quantized(words).dtype == torch.float32


@pytest.mark.parametrize(("kind", "way"), WAYS, ids=IDS)
def test_a_model_quantized_in_bfloat16_becomes_float32(kind, way, words):
    quantized = way(kind().bfloat16().eval(), words)
    assert quantized(words).dtype == torch.bfloat16
    assert quantized.float()(words).dtype == torch.float32


@pytest.mark.parametrize(("kind", "way"), WAYS, ids=IDS)
def test_the_dtype_is_saved_copied_and_pickled(kind, way, words, tmp_path):
    quantized = way(kind().eval(), words).half()
    expected = quantized(words)
    fxquant.save(quantized, tmp_path / "half.safetensors")
    with torch.device("meta"):
        skeleton = kind().eval()
    twins = (
        fxquant.load(skeleton, tmp_path / "half.safetensors"),
        copy.deepcopy(quantized),
        pickle.loads(pickle.dumps(quantized)),
    )
    for twin in twins:
        assert twin(words).dtype == torch.float16
        assert torch.equal(twin(words), expected)
    assert twins[0].float()(words).dtype == torch.float32


def test_a_graph_inside_another_model_follows(words):
    outer = prepare_fx(nn.Sequential(by_fx(Calls().eval(), words)).eval(), {"": None}, words)
    for model in (nn.Sequential(by_fx(Calls().eval(), words)), outer):
        assert model.half()(words).dtype == torch.float16


def test_moves_that_keep_the_dtype_keep_it(words):
    quantized = by_fx(Calls().half().eval(), words)
    assert quantized.share_memory().cpu()(words).dtype == torch.float16
