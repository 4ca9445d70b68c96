"""Partial passes give the bits of whole ones, and are taken only where they do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fxquant import default_dynamic_qconfig_mapping, sensitivity
from fxquant.debug.measure.trial import Trial
from fxquant.graph.edit import byte_count
from fxquant.graph.record import record_of
from fxquant.tuning.mapping import by_name
from tests.debug.measure.test_sensitivity import EVERYTHING, Model, data, model
from tests.random_graphs import Draft

__all__ = ["data", "model"]  # fixtures


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


def make(build, seed=0):
    torch.manual_seed(seed)
    return build().eval()


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


def test_a_call_that_stays_float_reads_the_float_weight_of_a_site_that_is_swapped():
    mapping = default_dynamic_qconfig_mapping().set_object_type(F.linear, None)
    model, batches = make(Tied), EXACT["tied"][1]
    found = sensitivity(model, mapping, batches)
    assert {row.path for row in found.rows} == {"embedding", "linear"}
    assert all(0 < row.alone < 0.05 for row in found.rows)
