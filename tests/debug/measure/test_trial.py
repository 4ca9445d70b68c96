"""Partial passes give the bits of whole ones, and are taken only where they do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fxquant import default_dynamic_qconfig_mapping, float16_dynamic_qconfig, sensitivity
from fxquant.debug.measure.sensitivity import variants_of
from fxquant.debug.measure.trial import Trial
from fxquant.graph.edit import byte_count
from fxquant.graph.record import record_of
from fxquant.tuning.mapping import by_name
from tests.debug.measure.test_sensitivity import EVERYTHING, Model, data, model
from tests.random_graphs import Draft

__all__ = ["data", "model"]  # fixtures


class Chain(nn.Module):
    """Three layers in a row."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.third(self.second(self.first(x)))


class Tied(nn.Module):
    """A call reads the weight of another site."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(20, 6), nn.Linear(6, 6)

    def forward(self, x):
        return F.linear(self.linear(self.embedding(x)), self.embedding.weight)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.rnn, self.last = nn.Linear(6, 6), nn.LSTM(6, 5, 2), nn.Linear(5, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.linear(x), lengths, enforce_sorted=False)
        return self.last(pad_packed_sequence(self.rnn(packed)[0])[0])


class Shared(nn.Module):
    """A layer that runs twice, around another."""

    def __init__(self):
        super().__init__()
        self.twice, self.once = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, scale=2.0):
        return {"out": self.twice(self.once(torch.relu(self.twice(x))) * scale)}


class Writing(nn.Module):
    """A value that a later node writes into."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        y = self.first(x)
        z = self.second(y)
        y.add_(z)
        return y + z


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(self.first(x) + torch.rand_like(x)) + torch.rand_like(x)


class Counting(nn.Module):
    """A buffer that each call writes into."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.second(self.first(x)) + self.calls * 0


def encoder():
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(6, 3))


ROWS = [(torch.randn(3, 6),) for _ in range(3)]
EXACT = {
    "linears and a call": (Model, ROWS),
    "tied": (Tied, [(torch.randint(20, (3, 4)),) for _ in range(2)]),
    "packed": (Packed, [(torch.randn(4, 3, 6), torch.tensor([2, 4, 3])) for _ in range(2)]),
    "shared": (Shared, [*ROWS, {"x": torch.randn(2, 6)}, (torch.randn(2, 6), 3.0)]),
    "encoder": (encoder, [(torch.randn(2, 4, 6),) for _ in range(2)]),
    "one site": (lambda: nn.Linear(6, 4), ROWS),
}
INEXACT = {"writing": Writing, "noisy": Noisy, "counting": Counting}


def make(build, seed=0):
    torch.manual_seed(seed)
    return build().eval()


def measured(model, data, mapping=EVERYTHING):
    """Return what partial passes, if they are taken, and whole passes give."""
    trial = Trial(model, mapping, data, None)
    variants = variants_of(trial.forms)
    return trial, trial.measure_all(variants), {key: trial.measure(variant.forms) for key, variant in variants.items()}


@pytest.mark.parametrize("name", EXACT)
def test_partial_passes_give_the_bits_of_whole_ones(name):
    build, batches = EXACT[name]
    trial, parts, whole = measured(make(build), batches)
    assert trial.is_partial
    assert parts == whole
    assert parts["quantized"] > 0


@pytest.mark.parametrize("seed", range(40))
def test_partial_passes_of_random_graphs_give_the_bits_of_whole_ones(seed):
    torch.manual_seed(seed)
    model, args = Draft(seed).model()
    _, parts, whole = measured(model, [args])
    assert parts == pytest.approx(whole, abs=0, rel=0, nan_ok=True)


def converted_bytes(trial, model, chosen):
    """Return what the model takes that a mapping gives in which only these sites are quantized."""
    return byte_count(trial.convert(model, by_name(trial.prepared, record_of(trial.prepared), chosen)))


@pytest.mark.parametrize("seed", range(20))
def test_bytes_are_those_of_models_so_converted(seed):
    torch.manual_seed(seed)
    model, args = Draft(seed).model()
    trial = Trial(model, EVERYTHING, [args], None)
    for numbers in (list(trial.forms), list(trial.forms)[:1], list(trial.forms)[1:]):
        chosen = {i: trial.record.sites[i].qconfig for i in numbers}
        forms = {i: trial.forms[i] for i in numbers}
        assert trial.bytes_with(forms) == converted_bytes(trial, model, chosen)


@pytest.mark.parametrize("name", EXACT)
def test_bytes_of_tied_and_shared_sites_are_those_of_models_so_converted(name):
    build, batches = EXACT[name]
    model = make(build)
    trial = Trial(model, EVERYTHING, batches, None)
    for left in range(len(trial.forms) + 1):
        chosen = {i: trial.record.sites[i].qconfig for i in trial.forms if i != left}
        forms = {i: trial.forms[i] for i in chosen}
        assert trial.bytes_with(forms) == converted_bytes(trial, model, chosen)


def test_a_float_weight_that_a_site_shares_with_what_stays_float_counts_once():
    model, batches = make(Tied), EXACT["tied"][1]
    mapping = default_dynamic_qconfig_mapping().set_object_type(F.linear, None)
    trial = Trial(model, mapping, batches, None)
    assert trial.bytes_with({}) == byte_count(model)
    assert trial.bytes_with(trial.forms) == byte_count(trial.quantized)


@pytest.mark.parametrize("name", INEXACT)
def test_a_graph_with_state_or_random_numbers_runs_whole(name):
    trial, parts, whole = measured(make(INEXACT[name]), ROWS)
    assert not trial.is_partial
    assert parts == whole


def test_hooks_of_the_root_are_fired(model, data):
    model.register_forward_hook(lambda module, args, output: output * torch.arange(1.0, 5.0))
    trial, parts, whole = measured(model, data)
    assert not trial.is_partial
    assert parts == whole


def test_a_site_costs_what_follows_it():
    calls = []
    model = make(Chain)
    for name in ("first", "second", "third"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    trial = Trial(model, EVERYTHING, ROWS[:1], None)
    variants = {key: variant for key, variant in variants_of(trial.forms).items() if key.startswith("alone")}
    for form in trial.forms.values():
        form._forward_hooks.clear()
    calls.clear()
    trial.measure_all(variants)
    assert calls == ["first", "second", "third", "second", "third", "third"]


def test_a_call_that_stays_float_reads_the_float_weight_of_a_site_that_is_swapped():
    mapping = default_dynamic_qconfig_mapping().set_object_type(F.linear, None)
    model, batches = make(Tied), EXACT["tied"][1]
    found = sensitivity(model, mapping, batches)
    assert {row.path for row in found.rows} == {"embedding", "linear"}
    assert all(0 < row.alone < 0.05 for row in found.rows)


def test_float16_forms_are_swapped_like_any(model, data):
    trial, parts, whole = measured(model, data, default_dynamic_qconfig_mapping().set_global(float16_dynamic_qconfig))
    assert trial.is_partial
    assert parts == whole
