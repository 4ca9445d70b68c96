"""The graph runs on the example inputs, and must do what the model does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import (
    ExampleInputsError,
    TraceError,
)
from tests.graph.trace.test_trace import HERE, Loop, Named, line_of
from tests.samples import WordLM, lm_inputs, prepare, same_bits


class Draws(nn.Module):
    def forward(self, x):
        return x + torch.rand(4)


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        before, self.last = self.last, x
        return x if before is None else x + before


@pytest.mark.parametrize(("kind", "call"), [(Draws, "first"), (Remembers, "second")])
def test_what_a_graph_cannot_hold_is_found_by_running_it(kind, call):
    with pytest.raises(TraceError, match=f"the graph's {call} call does not give what the model's does"):
        prepare(kind(), torch.randn(2, 3, 4))


@pytest.mark.parametrize("kind", [Draws, Remembers])
def test_a_submodule_that_a_graph_cannot_hold_is_called_as_it_is(kind):
    model, x = nn.Sequential(nn.Linear(4, 4), kind(), nn.ReLU()).eval(), torch.randn(2, 3, 4)
    prepared = prepare(model, x)
    assert list(prepared.record.untraced) == ["1"]
    assert "keeps state in Python attributes" in prepared.record.untraced["1"]
    twin = copy.deepcopy(model)
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = twin(x)
            torch.manual_seed(seed)
            assert torch.equal(prepared(x), expected)


@pytest.mark.parametrize("x", [torch.ones(3, 5), torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 4).double()])
def test_example_inputs_that_do_not_run_name_node_line_and_what_came(x):
    message = (
        rf"the model fails on example_inputs at 'net'.*{HERE}:{line_of('# the line that fails')}, "
        rf"which got \[\({', '.join(map(str, x.shape))}\) {x.dtype}\]"
    )
    with pytest.raises(ExampleInputsError, match=message):
        prepare(Named(), x)


def test_shapes_and_dtypes_of_every_node_are_recorded():
    model = WordLM()
    prepared = prepare(model, *lm_inputs(model, 5, 3))
    found = {n.name: n.meta["tensor_meta"] for n in prepared.graph.nodes if n.op == "call_module"}
    assert (found["encoder"].shape, found["encoder"].dtype) == ((5, 3, 12), torch.float32)
    assert found["rnn"][1][0].shape == (2, 3, 8)
    assert all("tensor_meta" in n.meta for n in prepared.graph.nodes if n.op not in ("output", "get_attr"))


class LoopsAndBranches(nn.Module):
    """Needs both: an argument to be fixed, and a part that does not trace."""

    def __init__(self):
        super().__init__()
        self.weight, self.part = nn.Parameter(torch.randn(6, 6) / 4), Loop()

    def forward(self, x, count=2):
        for _ in range(count):
            x = F.linear(x, self.weight)
        return self.part(x)


def test_a_model_that_needs_both_keeps_its_own_class_and_all_its_arguments():
    model, x = LoopsAndBranches().eval(), torch.randn(4, 3, 6)
    with pytest.warns(UserWarning, match="the model's own code runs on"):
        prepared = prepare(model, x)
    assert isinstance(prepared, LoopsAndBranches)
    for count in (2, 3):
        assert same_bits(prepared(x, count), model(x, count))
