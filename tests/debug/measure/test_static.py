"""Views of static models: each value's error, the sites by themselves, and where integers begin and end."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import convert_fx, ops, prepare_fx
from tests.samples import sqnr


class Net(nn.Module):
    """A shared convolution, a residual with a ReLU, a softmax that stays float."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.conv(x) + x)
        return self.last(self.conv(F.softmax(x, 1)))


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    model, data = Net().eval(), [(torch.randn(4, 3, 6, 6),) for _ in range(3)]
    prepared = prepare_fx(model, fxquant.default_static_qconfig_mapping(), data[0])
    return model, convert_fx(prepared, data=data), data


@torch.no_grad()
def test_compare_dequantizes_what_a_site_gives_where_it_ends(models):
    model, quantized, data = models
    comparison = fxquant.compare(model, quantized, data)
    rows = {row.path: row for row in comparison.rows}
    assert {path: row.calls for path, row in rows.items()} == {"stem": 3, "conv": 6, "last": 3}
    assert all(row.unpaired == 0 for row in comparison.rows)
    # the first site, by hand: its input quantized, its output dequantized
    nodes = {node.name: node for node in quantized.graph.nodes}
    scale, zero = (quantized.get_buffer(f"stem_{part}") for part in ("scale", "zero_point"))
    assert nodes["stem"].kwargs["scale"].target == "stem_scale"
    x = torch.cat([x for (x,) in data])
    stem = quantized.stem(
        ops.quantize(x, quantized.x_scale, quantized.x_zero_point), quantized.x_scale, quantized.x_zero_point
    )
    got = ops.dequantize(ops.quantize(stem, scale, zero), scale, zero)
    assert rows["stem"].sqnr_db == pytest.approx(sqnr(model.stem(x), got), abs=1e-3)
    assert rows["stem"].local_sqnr_db == pytest.approx(rows["stem"].sqnr_db)
    assert comparison.output_sqnr_db == pytest.approx(
        sqnr(torch.cat([model(x) for (x,) in data]), torch.cat([quantized(x) for (x,) in data])), abs=1e-3
    )


def test_comparing_changes_neither_model(models):
    model, quantized, data = models
    before = [node.name for node in quantized.graph.nodes]
    fxquant.compare(model, quantized, data)
    assert [node.name for node in quantized.graph.nodes] == before
    assert not [name for name, _ in quantized.named_modules() if "end" in name]


def test_sensitivity_tries_each_site_between_floats(models):
    model, _, data = models
    found = fxquant.sensitivity(model, fxquant.default_static_qconfig_mapping(), data)
    assert {row.path for row in found.rows} == {"stem", "conv", "last"}
    assert all(0 < row.alone < 0.1 for row in found.rows)
    assert max(row.alone for row in found.rows) < found.quantized_metric < 0.1


def test_profile_times_static_sites(models):
    model, quantized, data = models
    rows = {row.path: row for row in fxquant.profile(quantized, data[0], float_model=model, rounds=1).rows}
    assert {"stem", "conv", "last"} <= rows.keys()
    assert rows["conv"].calls == 2
    assert "static_convolution" in rows["conv"].kernel


def test_explain_lists_the_values_that_stay_float_and_says_where_there_are_no_kernels(models, monkeypatch):
    explanation = fxquant.explain(models[1])
    (value,) = explanation.floats
    assert value.startswith("F.softmax (softmax at ")
    assert value.endswith("): it has no integer form")
    assert explanation.slow_static == () or fxquant.kernel_info().isa is None
    monkeypatch.setattr("fxquant.debug.slow_static.kernel_info", lambda: SimpleNamespace(isa=None))
    line = "stem, conv, last: without the native library static layers run in plain torch, slower than float"
    assert fxquant.explain(models[1]).slow_static == (line,)
    assert line in " ".join(" ".join(fxquant.explain(models[1]).footer).split())
    dynamic = fxquant.quantize_dynamic(nn.Sequential(nn.Linear(64, 64)).eval())
    assert fxquant.explain(dynamic).floats == ()
    assert not any("static" in line for line in fxquant.explain(dynamic).footer)


def test_a_diff_shows_where_integers_begin_and_their_scales(models):
    model, quantized, _ = models
    rows = {row.name: row for row in fxquant.graph_diff(model, quantized).rows}
    assert rows["quantize"].note == f"uint8, scale {float(quantized.x_scale):.3g}"
    assert rows["stem"].note.endswith(f"; uint8, scale {float(quantized.stem_scale):.3g}")
    assert "uint8" not in rows["last"].note  # which gives floats


def test_a_diff_says_what_does_the_addition_and_the_clamp_that_are_gone(models):
    model, quantized, _ = models
    diff = fxquant.graph_diff(model, quantized)
    rows = {row.name: row for row in diff.rows}
    assert [(rows[name].sign, rows[name].note, rows[name].fused_into) for name in ("add", "relu")] == [
        ("-", "done by conv", "conv"),
        ("-", "done by conv", "conv"),
    ]
    assert "done by conv" in str(diff)
    prepared = prepare_fx(model, fxquant.default_static_qconfig_mapping(), models[2][0])
    assert not [row for row in fxquant.graph_diff(model, prepared).rows if row.fused_into]  # nothing is gone yet


def test_files_keep_what_was_decided_about_values(models, tmp_path):
    _, quantized, _ = models
    fxquant.save(quantized, tmp_path / "q")
    loaded = fxquant.load(Net().eval(), tmp_path / "q")
    assert loaded.record.values == quantized.record.values
