"""Convert: modules swapped at their paths, calls rewritten in place, ties kept."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import convert_fx, float_qparams_weight_only_qconfig, ops
from fxquant.graph.edit import byte_count
from tests.samples import Call, WordLM, everything, kinds, lm_inputs, prepare, quantize, same_bits


def test_modules_are_swapped_at_the_same_paths():
    model = WordLM()
    assert kinds(quantize(model, *lm_inputs(model))) == {
        "": "WordLM",
        "drop": "Dropout",
        "encoder": "QuantizedEmbedding",
        "rnn": "DynamicQuantizedLSTM",
        "decoder": "DynamicQuantizedLinear",
    }


def test_a_call_keeps_its_name_place_and_stack_trace():
    prepared = prepare(Call(F.linear, 4, 6), torch.randn(2, 6))
    before = next(n for n in prepared.graph.nodes if n.target is F.linear)
    quantized = convert_fx(prepared)
    after = next(n for n in quantized.graph.nodes if n.op == "call_function")
    assert (after.name, after.stack_trace) == (before.name, before.stack_trace)
    assert after.target is ops.linear


def test_the_float_weight_of_a_call_is_gone():
    quantized = quantize(Call(F.linear, 4, 6), torch.randn(2, 6))
    assert {n: t.dtype for n, t in quantized.state_dict().items()} == {
        "weight_int8": torch.int8, "weight_scale": torch.float32}  # fmt: skip


def test_a_module_used_twice_stays_one():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x):
            return self.net(torch.tanh(self.net(x)))

    quantized = quantize(Model(), torch.randn(2, 4))
    assert [n.target for n in quantized.graph.nodes if n.op == "call_module"] == ["net", "net"]
    assert len(quantized.record.sites) == 1


def test_a_module_at_two_paths_stays_one():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.ModuleList([self.a])

        def forward(self, x):
            return self.b[0](torch.tanh(self.a(x)))

    model, x = Model(), torch.randn(2, 4)
    quantized = quantize(model, x)
    assert byte_count(quantized) == 4 * 4 + 4 * 4 + 4 * 4  # weight, scale, bias, once
    assert (quantized(x) - model(x)).norm() < 0.1 * model(x).norm()


def storages(module):
    return {t.data_ptr() for t in module.state_dict().values() if t.dtype in (torch.int8, torch.uint8)}


class Tied(nn.Module):
    """An Embedding whose weight is also the decoder's, as a module or a functional."""

    def __init__(self, functional=False):
        super().__init__()
        self.encoder = nn.Embedding(20, 8)
        self.decoder = None if functional else nn.Linear(8, 20)
        if not functional:
            self.decoder.weight = self.encoder.weight

    def forward(self, x):
        x = torch.tanh(self.encoder(x))
        return F.linear(x, self.encoder.weight) if self.decoder is None else self.decoder(x)


IDS = torch.arange(20)


@pytest.mark.parametrize("functional", [True, False])
def test_tied_weights_stay_one_table(functional):
    model = Tied(functional).eval()
    quantized = quantize(model, IDS)
    assert len(quantized.record.sites) == 2
    assert len(storages(quantized)) == 1
    assert byte_count(quantized) == 20 * 8 + 20 * 4 + (0 if functional else 20 * 4)
    assert (quantized(IDS) - model(IDS)).norm() < 0.02 * model(IDS).norm()


def test_tied_weights_under_two_schemes_are_two_tables():
    mapping = everything().set_object_type(nn.Embedding, float_qparams_weight_only_qconfig)
    quantized = quantize(Tied(), IDS, mapping=mapping)
    assert len(storages(quantized)) == 2


@pytest.mark.parametrize("float_one", ["encoder", "decoder"])
def test_one_of_two_tied_modules_may_stay_float(float_one):
    model = Tied().eval()
    quantized = quantize(model, IDS, mapping=everything().set_module_name(float_one, None))
    assert torch.equal(getattr(quantized, float_one).weight, model.encoder.weight)
    assert (quantized(IDS) - model(IDS)).norm() < 0.02 * model(IDS).norm()


def test_a_functional_on_the_weight_of_a_module_that_stays_float():
    model = Tied(functional=True).eval()
    quantized = quantize(model, IDS, mapping=everything().set_module_name("encoder", None))
    assert torch.equal(quantized.encoder.weight, model.encoder.weight)
    (site,) = quantized.record.sites
    assert site.kind == "F.linear"
    assert (quantized(IDS) - model(IDS)).norm() < 0.02 * model(IDS).norm()


def test_a_functional_may_come_before_the_module_whose_weight_it_reads():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.net(F.linear(x, self.net.weight)) + F.linear(x, self.net.weight)

    model, x = Model(), torch.randn(2, 4)
    quantized = quantize(model, x)
    linear = quantize(nn.Sequential(model.net), x)
    assert torch.equal(quantized(x), linear(linear(x)) + linear(x))
    assert len({t.data_ptr() for t in quantized.state_dict().values() if t.dtype == torch.int8}) == 1


def test_a_module_whose_weight_a_float_functional_reads():
    model = Tied(functional=True).eval()
    quantized = quantize(model, IDS, mapping=everything().set_object_type(F.linear, None))
    assert kinds(quantized)["encoder"] == "QuantizedEmbedding"
    assert (quantized(IDS) - model(IDS)).norm() < 0.02 * model(IDS).norm()


@pytest.mark.parametrize("seed", range(2))
def test_views_of_one_storage_are_not_taken_for_ties(seed):
    """Two weights that are halves of one tensor are two weights."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            both = torch.randn(8, 4)
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.a.weight, self.b.weight = nn.Parameter(both[:4]), nn.Parameter(both[4:])

        def forward(self, x):
            return self.a(x), self.b(x)

    model, x = Model(), torch.randn(2, 4)
    quantized = quantize(model, x)
    for got, expected in zip(quantized(x), model(x), strict=True):
        assert (got - expected).norm() < 0.05 * expected.norm()
    assert len(storages(quantized)) == 2


def test_bytes_are_recorded_for_every_site():
    model = WordLM()
    for site in quantize(model, *lm_inputs(model)).record.sites:
        assert 0.2 < site.int_bytes / site.float_bytes < 0.6


def test_converting_twice_from_one_prepared_model_gives_the_same():
    model = WordLM()
    inputs = lm_inputs(model)
    prepared = prepare(model, *inputs)
    assert same_bits(convert_fx(prepared)(*inputs), convert_fx(prepared)(*inputs))


def test_a_read_of_a_weight_that_nothing_uses_goes_and_pickles_load():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(x) / self.layer.weight.shape[0]

    x = torch.randn(2, 64)
    quantized = quantize(Asks(), x)
    assert [node.target for node in quantized.graph.find_nodes(op="get_attr")] == []
    assert same_bits(pickle.loads(pickle.dumps(quantized))(x), quantized(x))
