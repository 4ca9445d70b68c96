"""A forward that writes into its own weights never reaches the user's: law 2."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import compare, convert_fx, explain, fuse_fx, int4_dynamic_qconfig, quantize_dynamic
from fxquant.graph.trace.writes import without_writes
from tests.samples import everything, prepare, same_bits, sqnr


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(32, 32), nn.Linear(32, 8)
        self.table, self.u = nn.Parameter(torch.randn(16, 32)), nn.Parameter(torch.randn(32))
        self.held = [self.inner.weight]


class Clamps(Writes):
    def forward(self, x):
        self.inner.weight.data.clamp_(-0.05, 0.05)
        return self.head(self.inner(x))


class ClampsWithoutGradients(Writes):
    def forward(self, x):
        with torch.no_grad():
            self.inner.weight.clamp_(-0.05, 0.05)
        return self.head(self.inner(x))


class ClampsAll(Writes):
    def forward(self, x):
        for parameter in self.parameters():
            parameter.data.clamp_(-0.05, 0.05)
        return self.head(self.inner(x))


class Renorms(Writes):
    def forward(self, x):
        return self.head(x + F.embedding(torch.arange(4, device=x.device), self.table, max_norm=0.5))


class Iterates(Writes):
    """Spectral norm, one step of the power iteration a call."""

    def forward(self, x):
        with torch.no_grad():
            self.u.copy_(F.normalize(self.inner.weight @ self.u, dim=0))
        return self.head(x @ (self.inner.weight / (self.inner.weight @ self.u).norm()))


class Counts(Writes):
    def forward(self, x):
        self.head.bias.data.add_(1)
        return self.head(self.inner(x))


class Halves(Writes):
    """What is not in the graph: the weights are found in a list."""

    def forward(self, x):
        self.held[0].data.mul_(0.5)
        return self.head(self.inner(x))


class Branches(Writes):
    """It does not trace."""

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        self.inner.weight.data.clamp_(-0.05, 0.05)
        return self.head(self.inner(x))


KINDS = [Clamps, ClampsWithoutGradients, ClampsAll, Renorms, Iterates, Counts, Halves, Branches]
ignores_traces = pytest.mark.filterwarnings("ignore:.*(does not trace|does not give what the model's does)")


@ignores_traces
@pytest.mark.parametrize("kind", KINDS)
def test_neither_preparing_nor_running_what_comes_of_it_reaches_the_model(kind):
    model, x = kind().eval(), torch.randn(4, 32)
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    prepared = prepare(model, x)
    with torch.no_grad():
        quantized = convert_fx(prepared)
        for _ in range(2):
            wanted = twin(x)
            assert same_bits(prepared(x), wanted)
            assert sqnr(wanted, quantized(x)) > 30
        compare(model, quantized, [(x,)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@ignores_traces
def test_running_the_example_leaves_the_prepared_model_as_the_float_one_is():
    model, x = Counts().eval(), torch.randn(4, 32)
    prepared = prepare(model, x)
    assert torch.equal(prepared.head.bias, model.head.bias)
    assert prepared.inner.weight.data_ptr() == model.inner.weight.data_ptr()  # which nothing writes into


@pytest.mark.parametrize(("kind", "path"), [(Clamps, "inner"), (Counts, "head"), (ClampsAll, "inner")])
def test_a_weight_that_forward_writes_into_stays_float(kind, path):
    explained = explain(prepare(kind().eval(), torch.randn(4, 32)))
    decisions = {row.path: row.decision for row in explained.rows}
    assert decisions[path] == "float: forward writes into its weight or bias as it runs"


def test_fuse_fx_runs_the_example_too():
    model, x = Clamps().eval(), torch.randn(4, 32)
    before = model.inner.weight.detach().clone()
    fuse_fx(model, x)
    assert torch.equal(model.inner.weight, before)


def test_rounding_with_data_runs_a_model_that_was_never_run():
    model, x = Branches().eval(), torch.randn(4, 32)
    before = model.inner.weight.detach().clone()
    quantize_dynamic(model, everything(int4_dynamic_qconfig), data=iter([(x,), (x,)]))
    assert torch.equal(model.inner.weight, before)


def test_a_model_that_writes_nothing_shares_all_and_is_run_once():
    model, runs = nn.Linear(4, 4), []
    given, written = without_writes(model, lambda written: runs.append(written) or model(torch.randn(2, 4)).shape)
    assert (given, written, len(runs)) == ((2, 4), frozenset(), 1)


def test_an_error_of_the_users_passes():
    def run(_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        without_writes(nn.Linear(4, 4), run)
