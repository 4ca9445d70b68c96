"""graph_diff: what changed between any two stages."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import (
    ArgumentError,
    ModelStateError,
    QConfigMapping,
    compare,
    convert_fx,
    fuse_fx,
    graph_diff,
    profile,
)
from fxquant.debug import DiffRow
from fxquant.graph.edit import byte_count
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


@pytest.mark.parametrize("before", ["float", "fused", "prepared", "quantized"])
@pytest.mark.parametrize("after", ["float", "fused", "prepared", "quantized"])
def test_any_two_stages(before, after):
    model = WordLM().eval()
    made = stages(model, *lm_inputs(model))
    diff = graph_diff(made[before], made[after])
    for text in (str(diff), diff._repr_html_(), diff.to_html()):
        assert diff.total in text
    assert diff.total.partition(";")[0] in diff.to_svg()  # whose lines are broken
    assert (diff.bytes_before, diff.bytes_after) == (byte_count(made[before]), byte_count(made[after]))
    assert {row.sign for row in diff.rows} == (
        {" "} if (before == "quantized") == (after == "quantized") else {" ", "~"}
    )


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


class Blocks(nn.Module):
    """Layers one after another, with one of another kind before and after them."""

    def __init__(self, count):
        super().__init__()
        self.first, self.last = nn.LayerNorm(4), nn.Linear(4, 2)
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)]) for _ in range(count))

    def forward(self, x):
        x = self.first(x)
        for linear, norm in self.layers:
            x = norm(x + torch.tanh(linear(x)))
        return self.last(x)


def test_colours_say_what_the_signs_say():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh()).eval(), torch.randn(2, 4)
    quantized = quantize(model, x)
    text, plain = (str(graph_diff(model, quantized, color=color)) for color in (True, False))
    assert "\x1b[33m~\x1b[0m" in text
    assert "\x1b[31mnn.Linear\x1b[0m" in text
    assert "\x1b[32mDynamicQuantizedLinearReLU\x1b[0m" in text
    assert "\x1b[31m-\x1b[0m" in text
    assert [line for line in text.splitlines() if "Tanh" in line] == [li for li in plain.splitlines() if "Tanh" in li]
    assert re.sub(r"\x1b\[\d+m", "", text) == plain


def test_what_is_printed_elsewhere_than_on_a_terminal_has_no_colours(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    diff = graph_diff(model, quantize(model, torch.randn(2, 4)))
    assert "\x1b" not in str(diff)
    monkeypatch.setattr("fxquant.debug.diff.diff.wants_color", lambda: True)
    assert "\x1b" in str(diff)


def test_to_dict_is_json_with_all_rows():
    model = WordLM().eval()
    diff = graph_diff(model, quantize(model, *lm_inputs(model)), only_changed=True)
    plain = json.loads(json.dumps(diff.to_dict()))
    assert plain.keys() == {"rows", "bytes_before", "bytes_after", "quantized", "candidates", "stages", "remark"}
    reads = ("inputs_before", "inputs_after")
    rows = [DiffRow(**{**row, **{name: tuple(row[name]) for name in reads}}) for row in plain["rows"]]
    assert rows == list(diff.rows)
    assert (plain["bytes_before"], plain["quantized"]) == (byte_count(model), 3)


def linear(qconfig, x, model):
    return quantize(model, x, mapping=QConfigMapping().set_global(qconfig))


class Branching(nn.Module):
    """Does not trace."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


@pytest.mark.filterwarnings("ignore:.*does not trace")
def test_a_model_that_does_not_trace_says_so_in_every_view():
    model, x = Branching().eval(), torch.randn(2, 4)
    diff = graph_diff(model, quantize(model, x))
    assert signs(diff) == {"a": "~", "b": "~"}
    for text in (str(diff), diff._repr_html_(), diff.to_html(), diff.to_svg(), diff.to_json()):
        assert "module by module: the model does not trace" in text


def test_float_models_that_do_not_trace_are_told_module_by_module():
    model, other = Branching().eval(), Branching().eval()
    other.b = nn.LayerNorm(4)
    diff = graph_diff(model, other)
    assert signs(diff) == {"a": " ", "b": "~"}
    assert "module by module: the model does not trace" in str(diff)


def test_side_by_side_has_both_graphs():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh()).eval(), torch.randn(2, 4)
    lines = str(graph_diff(model, quantize(model, x), layout="side_by_side")).splitlines()
    assert [re.split(r"\s{2,}", line.strip()) for line in lines[2:8]] == [
        ["input_1: placeholder", "input_1: placeholder"],
        ["_0: nn.Linear", "80 B", "~", "_0: DynamicQuantizedLinearReLU", lines[3].split("ReLU")[1].strip()],
        ["default_dynamic_qconfig"],
        ["_1: nn.ReLU", "-", "fused into 0"],
        ["_2: nn.Tanh", "_2: nn.Tanh"],
        ["output: output", "output: output"],
    ]


def test_another_layout_is_an_error():
    model = nn.Sequential(nn.Tanh()).eval()
    with pytest.raises(ArgumentError, match="takes layout='unified' or 'side_by_side', got 'sideways'"):
        graph_diff(model, model, layout="sideways")


@pytest.mark.parametrize("context", [-1, "2", 1.5])
def test_context_that_is_no_number_of_rows_is_an_error(context):
    model = nn.Sequential(nn.Tanh()).eval()
    with pytest.raises(ArgumentError, match=rf"takes context=the number of lines .*, 0 or more, got {context!r}"):
        graph_diff(model, model, context=context)


def measured():
    model, x = Blocks(3).eval(), torch.randn(3, 4)
    quantized = quantize(model, x)
    return model, quantized, compare(model, quantized, [x]), profile(quantized, x, float_model=model, rounds=1)


def test_errors_kernels_and_milliseconds_stand_beside_their_nodes():
    model, quantized, errors, times = measured()
    diff = graph_diff(model, quantized, errors=errors, times=times)
    wanted = {row.path: row.sqnr_db for row in errors.rows}
    assert {row.path: row.sqnr_db for row in diff.rows if row.sqnr_db is not None} == wanted
    ran = {row.path: (row.kernel, row.ms, row.float_ms) for row in times.rows if row.path != "elsewhere"}
    assert {row.path: (row.kernel, row.ms, row.float_ms) for row in diff.rows if row.ms is not None} == ran
    (line,) = [line for line in str(diff).splitlines() if line.startswith("~   last")]
    assert f"{wanted['last']:.1f} dB" in line
    assert f"{ran['last'][2]:.3f}" in line
    (times_row,) = [row for row in diff.shown if row.sign == "×"]
    layers = [f"layers.{i}.0" for i in range(3)]
    assert times_row.sqnr_db == min(wanted[path] for path in layers)
    assert times_row.ms == pytest.approx(sum(ran[path][1] for path in layers))


def test_without_measurements_there_are_no_columns_for_them():
    model, quantized, errors, _ = measured()
    assert str(graph_diff(model, quantized)).splitlines()[0].split() == ["node", "before", "after", "size"]
    header = str(graph_diff(model, quantized, errors=errors)).splitlines()[0]
    assert header.split() == ["node", "before", "after", "size", "SQNR"]


def test_a_functional_has_its_measurements_by_its_call():
    model, x = Call(F.linear, 4, 6).eval(), torch.randn(2, 6)
    quantized = quantize(model, x)
    errors = compare(model, quantized, [x])
    rows = {row.name: row.sqnr_db for row in graph_diff(model, quantized, errors=errors).rows}
    assert rows["linear"] == errors.rows[0].sqnr_db
    assert rows["x"] is None


def test_what_was_never_called_says_so():
    model, x = Branching().eval(), torch.ones(2, 4)
    with pytest.warns(UserWarning, match="does not trace"):
        quantized = quantize(model, x)
    times = profile(quantized, x, rounds=1)
    rows = {row.name: row for row in graph_diff(model, quantized, times=times).rows}
    assert (rows["b"].kernel, rows["b"].ms) == ("never called", None)
    assert rows["a"].kernel.startswith("linear (")


def test_a_report_of_another_kind_or_of_other_models_is_an_error():
    model, quantized, errors, times = measured()
    with pytest.raises(ArgumentError, match="takes errors=the result of compare, got Profile"):
        graph_diff(model, quantized, errors=times)
    with pytest.raises(ArgumentError, match="takes times=the result of profile, got Comparison"):
        graph_diff(model, quantized, times=errors)
    other = nn.Sequential(nn.Linear(4, 4)).eval()
    with pytest.raises(
        ModelStateError, match=r"errors is a report of other models: none of its sites \(.*last.*\) is in"
    ):
        graph_diff(other, other, errors=errors)


def test_stages_are_named_where_they_differ():
    model = WordLM().eval()
    made = stages(model, *lm_inputs(model))
    assert graph_diff(model, made["quantized"]).stages == ("float", "quantized")
    assert graph_diff(made["prepared"], made["quantized"]).stages == ("prepared", "quantized")
    assert graph_diff(made["quantized"], made["quantized"]).stages == ("before", "after")
    assert graph_diff(model, model).stages == ("before", "after")


def test_a_notebook_colours_what_changed():
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    html = graph_diff(model, quantize(model, x))._repr_html_()
    assert re.search(r'<span style="background:rgba\(218[^"]*">nn.Linear</span>', html)
    assert re.search(r'<span style="background:rgba\(46[^"]*">DynamicQuantizedLinear</span>', html)
    assert re.search(r'<span style="[^"]*">~</span>', html)
