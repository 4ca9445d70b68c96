"""What a diff says about each node."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    OPERATORS,
    convert_fx,
    default_dynamic_qconfig,
    graph_diff,
    int4_dynamic_qconfig,
)
from fxquant.graph.edit import byte_count
from fxquant.graph.trace.trace import trace
from tests.debug.diff.test_diff import Branching, linear, signs
from tests.samples import Call, prepare, quantize


def test_a_functional_gets_new_nodes_and_keeps_its_name():
    model, x = Call(F.linear, 4, 6).eval(), torch.randn(2, 6)
    prepared = prepare(model, x)
    to_prepared, to_quantized = graph_diff(model, prepared), graph_diff(prepared, convert_fx(prepared))
    assert {n for n, s in signs(to_prepared).items() if s == "+"} == {"weight_observer"}
    assert signs(to_quantized)["weight_observer"] == "-"
    assert signs(to_quantized)["linear"] == "~"
    assert [row.after for row in to_quantized.rows if row.name == "linear"] == ["fxquant.linear"]


def test_fused_away_nodes_say_where_they_went():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    rows = {row.name: row for row in graph_diff(model, quantize(model, x)).rows}
    assert (rows["_1"].sign, rows["_1"].note) == ("-", "fused into 0")
    assert rows["_0"].after == "DynamicQuantizedLinearReLU"


def test_nodes_stay_in_the_order_of_both_graphs():
    model, x = Call(F.linear, 4, 6).eval(), torch.randn(2, 6)
    quantized = quantize(model, x)
    names = [row.name for row in graph_diff(model, quantized).rows]
    for module in (trace(model, OPERATORS).module, quantized):
        own = [node.name for node in module.graph.nodes]
        assert [name for name in names if name in own] == own


def test_two_graphs_that_are_not_ours():
    class Before(nn.Module):
        def forward(self, x):
            return torch.tanh(x) + 1

    class After(nn.Module):
        def forward(self, x):
            return torch.sin(torch.tanh(x)) + 1

    diff = graph_diff(torch.fx.symbolic_trace(Before()), torch.fx.symbolic_trace(After()))
    assert [(row.sign, row.name) for row in diff.rows] == [
        (" ", "x"), (" ", "tanh"), ("+", "sin"), (" ", "add"), (" ", "output"),
    ]  # fmt: skip
    assert diff.total == "0 B → 0 B"


def test_exported_graphs():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    before, after = (torch.export.export(m, (x,)).module() for m in (model, quantize(model, x)))
    rows = {row.name: (row.sign, row.before, row.after) for row in graph_diff(before, after).rows}
    assert rows["linear"] == ("~", "aten.linear", "fxquant.linear")
    assert rows["relu"] == ("-", "aten.relu", "")


def test_where_only_the_scheme_changed_it_alone_is_coloured():
    model, x = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(2, 64)
    diff = graph_diff(linear(default_dynamic_qconfig, x, model), linear(int4_dynamic_qconfig, x, model), color=True)
    (row,) = [row for row in diff.rows if row.name == "_0"]
    assert (row.sign, row.before, row.after) == ("~", "DynamicQuantizedLinear", "DynamicQuantizedLinear")
    assert (row.note_before, row.note) == ("default_dynamic_qconfig", "int4_dynamic_qconfig")
    text = str(diff)
    assert "\x1b[31mdefault_dynamic_qconfig" in text
    assert "\x1b[32mint4_dynamic_qconfig" in text
    assert not re.search(r"\x1b\[\d+mDynamicQuantizedLinear", text)


def test_where_only_the_dtype_or_an_option_changed_that_is_told():
    small, large = (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, eps=e)) for e in (1e-5, 1e-3))
    diff = graph_diff(*map(torch.fx.symbolic_trace, (small, large.half())))
    told = {row.name: (row.sign, row.before, row.note_before, row.note) for row in diff.rows if row.sign != " "}
    assert told == {
        "_0": ("~", "nn.Linear", "float32", "float16"),
        "_1": ("~", "nn.LayerNorm", "eps=1e-05, float32", "eps=0.001, float16"),
    }


def test_where_only_an_argument_changed_that_is_told():
    class Softmax(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.dim = dim

        def forward(self, x):
            return torch.softmax(x, dim=self.dim).clamp(0, 1)

    diff = graph_diff(*(torch.fx.symbolic_trace(Softmax(dim)) for dim in (0, 1)))
    assert [(row.name, row.note_before, row.note) for row in diff.rows if row.sign != " "] == [
        ("softmax", "dim=0", "dim=1")
    ]


class Around(nn.Module):
    """Traces, but for a module inside it."""

    def __init__(self):
        super().__init__()
        self.first, self.branching = nn.Linear(4, 4), Branching()

    def forward(self, x):
        return self.branching(self.first(x))


@pytest.mark.filterwarnings("ignore:.*does not trace")
def test_what_is_quantized_inside_an_untraced_module_is_told():
    model, x = Around().eval(), torch.randn(2, 4)
    quantized = quantize(model, x)
    diff = graph_diff(model, quantized)
    assert {row.name: row.sign for row in diff.rows} == {
        "x": " ", "first": "~", "branching": " ", "branching.a": "~", "branching.b": "~", "output": " ",
    }  # fmt: skip
    assert sum(row.bytes_before for row in diff.rows) == byte_count(model)
    assert sum(row.bytes_after for row in diff.rows) == byte_count(quantized)


def test_an_input_named_as_a_module_is_only_an_input():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.act = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, words, act):
            return self.act(self.words(words)) + act

    model, inputs = Encoder().eval(), (torch.tensor([1, 2]), torch.ones(4))
    quantized = fxquant.prepare_fx(model, {"": fxquant.default_dynamic_qconfig, "module_name": [("act", None)]}, inputs)
    notes = {row.name: row.note for row in graph_diff(model, quantized).rows}
    assert notes["words"] == notes["act"] == ""
    assert notes["act_1"].startswith("float: ")
