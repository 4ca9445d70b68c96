"""What torch.fx traces through, what it calls, and what is refused."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    OPERATORS,
    convert_fx,
)
from fxquant.graph.trace.trace import trace
from tests.graph.trace.test_trace import Named, line_of
from tests.samples import WordLM, lm_inputs, prepare, quantize, same_bits


def test_nodes_have_stack_traces_of_the_users_lines():
    model = WordLM()
    quantized = convert_fx(prepare(model, *lm_inputs(model)))
    for node in quantized.graph.nodes:
        if node.op == "call_module":
            assert re.search(r'samples\.py", line \d+, in forward', node.stack_trace)


def test_leaves_are_the_tables_modules_and_torchs_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return torch.tanh(self.inner(x))

    graph = trace(nn.Sequential(Own(), nn.LayerNorm(2)).eval(), OPERATORS).module.graph
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["0.inner", "1"]


def test_a_users_subclass_with_a_forward_of_its_own_is_traced_through():
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight) * 2

    model, x = nn.Sequential(Scaled(4, 4)), torch.randn(3, 4)
    prepared = prepare(model, x)
    assert [site.path for site in prepared.record.sites] == ["0.weight"]
    assert torch.equal(prepared(x), model(x))


@pytest.mark.parametrize("name", ["a|b", "3", "a b", "é", "a-b"])
def test_odd_submodule_names(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.Linear(4, 4))
            self.inner = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4), nn.ReLU())})

        def forward(self, x):
            x = F.linear(getattr(self, name)(x), getattr(self, name).weight)
            return self.inner[name](x)

    model, x = Model(), torch.randn(3, 4)
    prepared = prepare(model, x)
    assert torch.equal(prepared(x), model(x))
    assert len(prepared.record.sites) == 3
    quantized = convert_fx(prepared)
    assert (quantized(x) - model(x)).norm() < 0.1 * model(x).norm()


class Autocast(Named):
    def __init__(self, enabled):
        super().__init__()
        self.enabled = enabled

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            return self.net(x)  # under autocast


def test_autocast_inside_forward_is_left_to_the_models_own_code():
    model, x = Autocast(True).eval(), torch.randn(2, 4)
    with pytest.warns(
        UserWarning, match=rf"enters torch.autocast, which a graph.*{line_of('# under autocast', __file__)}"
    ):
        prepared = prepare(model, x)
    assert same_bits(prepared(x), model(x))


def test_autocast_that_changes_nothing_is_none():
    model, x = Autocast(False).eval(), torch.randn(2, 4)
    assert torch.equal(prepare(model, x)(x), model(x))


def test_autocast_around_the_call_is_in_force():
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prepared = prepare(model, x)
        assert same_bits(prepared(x), model(x))


class WritesIntoFresh(Named):
    def forward(self, x):
        total = torch.zeros(2, 4)
        total += self.net(x)  # written into
        return total


def test_writing_into_a_tensor_made_in_forward_is_left_to_the_models_own_code():
    model, x = WritesIntoFresh().eval(), torch.randn(2, 4)
    with pytest.warns(UserWarning, match=rf"a tensor that it makes itself.*{line_of('# written into', __file__)}"):
        prepared = prepare(model, x)
    for _ in range(2):
        assert torch.equal(prepared(x), model(x))


def test_writing_into_a_tensor_made_from_an_input_is_fine():
    class Model(Named):
        def forward(self, x):
            total = x.new_zeros(2, 4)
            total += self.net(x)
            return total.add_(torch.ones(4))

    model, x = Model().eval(), torch.randn(2, 4)
    prepared = prepare(model, x)
    for _ in range(2):
        assert torch.equal(prepared(x), model(x))


class Masked(nn.Module):
    """Scores masked with the least number of their dtype, as transformers do."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(8, 8)

    def forward(self, x, mask):
        scores = self.scores(x)
        steps = torch.iinfo(mask.dtype).bits // 8
        return scores.masked_fill(mask == steps, torch.finfo(scores.dtype).min).softmax(-1)


def test_the_limits_of_a_dtype_are_calls_in_the_graph(tmp_path):
    model, x, mask = Masked().eval(), torch.randn(3, 8), torch.randint(9, (3, 8))
    prepared = prepare(model, x, mask)
    assert same_bits(prepared(x, mask), model(x, mask))
    assert same_bits(prepared.double()(x.double(), mask), copy.deepcopy(model).double()(x.double(), mask))
    quantized = quantize(model, x, mask)
    fxquant.save(quantized, tmp_path / "q")
    for twin in (
        copy.deepcopy(quantized),
        pickle.loads(pickle.dumps(quantized)),
        fxquant.load(model, tmp_path / "q"),
        torch.compile(quantized, fullgraph=True, backend="aot_eager"),
    ):
        with torch.no_grad():
            assert same_bits(twin(x, mask), quantized(x, mask))
    assert torch.finfo.__module__ == torch.iinfo.__module__ == "torch"
    assert isinstance(torch.finfo(torch.half), torch.finfo)  # nothing of the trace stays


PARTS = {
    "torch.split": lambda x: torch.split(x, [2, 4], 1),
    ".split()": lambda x: x.split([2, 4], dim=1),
    "by name": lambda x: torch.split(x, split_size_or_sections=[2, 4], dim=1),
    "torch.chunk": lambda x: torch.chunk(x, 2, 1),
    ".chunk()": lambda x: x.chunk(chunks=2, dim=1),
}


@pytest.mark.parametrize("name", PARTS)
def test_loops_over_the_parts_of_a_split_are_traced(name):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv1d(part.shape[1], 3, 1) for part in PARTS[name](torch.ones(2, 6, 5)))

        def forward(self, x):
            return torch.cat([conv(part) for part, conv in zip(PARTS[name](x), self.convs, strict=True)], 1)

    model, x = Mixed().eval(), torch.randn(2, 6, 5)
    graph = trace(model, OPERATORS).module
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["convs.0", "convs.1"]
    assert torch.equal(graph(x), model(x))


def test_loops_over_an_unknown_number_of_parts_are_not():
    class Unknown(nn.Module):
        def forward(self, x):
            return sum(torch.split(x, 2, 1))

    with pytest.raises(fxquant.TraceError):
        trace(Unknown().eval(), OPERATORS)
