"""graph_diff: what changed between any two stages."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import OPERATORS, convert_fx, fuse_fx, graph_diff
from fxquant.graph.edit import byte_count
from fxquant.graph.trace import trace
from tests.samples import Call, WordLM, everything, lm_inputs, prepare, quantize


def stages(model, *inputs, mapping=None):
    prepared = prepare(model, *inputs, mapping=mapping)
    return {"float": model, "fused": fuse_fx(model), "prepared": prepared, "quantized": convert_fx(prepared)}


def signs(diff):
    return {row.name: row.sign for row in diff.rows}


def test_modules_are_changed_in_place_and_the_rest_kept():
    model = WordLM().eval()
    diff = graph_diff(model, quantize(model, *lm_inputs(model)))
    assert {name for name, sign in signs(diff).items() if sign == "~"} == {"encoder", "rnn", "decoder"}
    assert {sign for name, sign in signs(diff).items() if name not in ("encoder", "rnn", "decoder")} == {" "}
    changed = {row.name: (row.before, row.after, row.note) for row in diff.rows if row.sign == "~"}
    assert changed["rnn"] == ("nn.LSTM", "DynamicQuantizedLSTM", "default_dynamic_qconfig")


def test_bytes_are_those_of_the_models():
    model = WordLM().eval()
    quantized = quantize(model, *lm_inputs(model))
    diff = graph_diff(model, quantized)
    assert (diff.bytes_before, diff.bytes_after) == (byte_count(model), byte_count(quantized))
    assert sum(row.bytes_before for row in diff.rows) == byte_count(model)
    assert sum(row.bytes_after for row in diff.rows) == byte_count(quantized)


def test_the_total_line():
    model = WordLM(ntoken=3000, ninp=64, nhid=64).eval()
    diff = graph_diff(model, quantize(model, *lm_inputs(model)))
    weights = 4 * (2 * 3000 * 64 + 2 * 2 * 4 * 64 * 64)  # encoder and decoder; two layers of input and hidden weights
    told = rf"3 of 3 candidates, {weights:,} of {weights:,} weight bytes quantized \(100.0 %\)"
    match = re.fullmatch(rf"([\d.]+) MB → ([\d.]+) MB, ([\d.]+)×; {told}", diff.total)
    assert match
    assert float(match[3]) == pytest.approx(diff.bytes_before / diff.bytes_after, abs=0.005)
    assert str(diff).endswith(diff.total)


def test_what_was_left_float_is_counted_and_says_why():
    model = WordLM().eval()
    quantized = quantize(model, *lm_inputs(model), mapping=everything().set_module_name("decoder", None))
    diff = graph_diff(model, quantized)
    assert (diff.quantized, diff.candidates) == (2, 3)
    (row,) = [row for row in diff.rows if row.name == "decoder"]
    assert row.sign == " "
    assert row.note == "float: the mapping says float"


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


@pytest.mark.parametrize("before", ["float", "fused", "prepared", "quantized"])
@pytest.mark.parametrize("after", ["float", "fused", "prepared", "quantized"])
def test_any_two_stages(before, after):
    model = WordLM().eval()
    made = stages(model, *lm_inputs(model))
    diff = graph_diff(made[before], made[after])
    assert (diff.bytes_before, diff.bytes_after) == (byte_count(made[before]), byte_count(made[after]))
    assert {row.sign for row in diff.rows} == (
        {" "} if (before == "quantized") == (after == "quantized") else {" ", "~"}
    )


def test_nodes_stay_in_the_order_of_both_graphs():
    model, x = Call(F.linear, 4, 6).eval(), torch.randn(2, 6)
    quantized = quantize(model, x)
    names = [row.name for row in graph_diff(model, quantized).rows]
    for module in (trace(model, OPERATORS).module, quantized):
        own = [node.name for node in module.graph.nodes]
        assert [name for name in names if name in own] == own


def test_it_fits_100_columns_with_long_names():
    inner: nn.Module = nn.Linear(4, 4)
    for _ in range(6):
        inner = nn.ModuleDict({"a_rather_long_name": inner})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = inner

        def forward(self, x):
            module = self.deep
            while isinstance(module, nn.ModuleDict):
                module = module["a_rather_long_name"]
            return torch.tanh(module(x))

    model, x = Model().eval(), torch.randn(2, 4)
    for mapping in (everything(), everything(None)):
        text = str(graph_diff(model, quantize(model, x, mapping=mapping)))
        assert max(map(len, text.splitlines())) <= 100


def test_a_notebook_gets_html_without_markup_of_the_models():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("<b>", nn.Linear(4, 4))

        def forward(self, x):
            return getattr(self, "<b>")(x)

    model, x = Model().eval(), torch.randn(2, 4)
    html = graph_diff(model, quantize(model, x))._repr_html_()
    assert "<table>" in html
    assert "<b>" not in html


def test_a_plain_graph_module_will_do():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    diff = graph_diff(model, torch.fx.symbolic_trace(model))
    assert {row.sign for row in diff.rows} == {" "}
    assert diff.total.endswith("1.00×")
