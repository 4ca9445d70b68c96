"""The search: what is measured, how often, and how tied weights are decided."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import (
    QConfigMapping,
    default_dynamic_qconfig,
    default_dynamic_qconfig_mapping,
    float16_dynamic_qconfig,
    int4_dynamic_qconfig,
    suggest_mapping,
)
from fxquant.debug.measure import trial
from fxquant.gptq import round_with_gptq
from fxquant.graph import calibrate
from fxquant.graph.edit import byte_count
from fxquant.graph.record import record_of
from fxquant.tuning import search
from fxquant.tuning.ladder import scheme_name
from tests.debug.measure.test_sensitivity import EVERYTHING, data, model, relative_rms
from tests.tuning.test_suggest import measure, quantize

__all__ = ["data", "model"]  # fixtures


def test_data_is_run_for_its_hessians_once_in_a_search(model, data, monkeypatch):
    counts = []
    monkeypatch.setattr(trial, "gather", lambda *args: counts.append(1) or calibrate.gather(*args))
    suggest_mapping(model, data, budget=0.01)
    assert counts == [1]


def test_each_int4_weight_is_rounded_once_a_scheme(model, data, monkeypatch):
    rounded = []
    count = lambda *args: rounded.append(args[0].shape) or round_with_gptq(*args)  # noqa: E731
    monkeypatch.setattr(calibrate, "round_with_gptq", count)
    suggest_mapping(model, data, budget=0.01, schemes=("int4", "float"))
    assert len(rounded) == 3  # first, second and the call's, in all mixtures and in the result


def test_without_int4_nothing_is_gathered(model, data, monkeypatch):
    monkeypatch.setattr(trial, "gather", None)
    assert not suggest_mapping(model, data, budget=1.0, schemes=("int8", "float")).has_feedback


def test_the_fastest_model_is_the_one_whose_sites_take_the_least_time(model, data, monkeypatch):
    times = {"int4": 4.0, "int4 of 32": 5.0, "int8": 1.0, "int16": 2.5, "float16": 3.0, "float": 2.0}

    def timed(quantized, inputs, float_model=None):
        sites = record_of(quantized).sites
        rows = [
            SimpleNamespace(path=s.path, call=s.call or "", ms=times[scheme_name(s.qconfig)], float_ms=2.0)
            for s in sites
        ]
        return SimpleNamespace(rows=[*rows, SimpleNamespace(path="elsewhere", call="", ms=0.5, float_ms=0.5)])

    monkeypatch.setattr(search, "profile", timed)
    everything = relative_rms(model, quantize(model, EVERYTHING, data), data)
    found = suggest_mapping(model, data, budget=everything / 2, minimize="ms", schemes=tuple(times))
    assert found.is_within_budget
    assert found.kept == (("first", "float"),)
    assert found.coarser == ()
    (chosen,) = [row for row in found.rows if row.is_chosen]
    assert chosen.ms == 0.5 + 2.0 + 1.0 + 1.0
    assert chosen.ms == min(row.ms for row in found.rows if row.is_within)


class Tied(nn.Module):
    """One weight stands in an embedding and at the end, as a module or a call; a layer lies between."""

    def __init__(self, end="module"):
        super().__init__()
        self.e, self.middle, self.d = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40, bias=False)
        self.d.weight, self.end = self.e.weight, end

    def forward(self, x):
        x = torch.tanh(self.middle(self.e(x)))
        if self.end == "module":
            return self.d(x)
        return F.linear(x, self.e.weight) if self.end == "linear" else x @ self.e.weight.t()


ENDS = {"module": "d", "linear": "e.weight (linear)", "matmul": "e.weight (matmul)"}


def tied(end):
    torch.manual_seed(0)
    return Tied(end).eval(), [torch.randint(40, (4, 6)) for _ in range(2)]


@functools.cache
def all_tied_mixtures(end):
    """Return (bytes, metric) of every mixture of `tied(end)`, and of all int8."""
    model, data = tied(end)
    finer = [default_dynamic_qconfig, float16_dynamic_qconfig, None]
    mappings = [
        QConfigMapping().set_global(last).set_module_name("middle", middle).set_module_name("e", rows)
        for rows, middle, last in itertools.product(finer, [int4_dynamic_qconfig, *finer], finer)
        if (rows, middle, last) != (None, None, None)
    ]
    pairs = [(batch,) for batch in data]
    return measure(model, mappings, pairs, data), *measure(model, [EVERYTHING], pairs, data)


@pytest.mark.parametrize("share", [20.0, 1.0, 0.5, 0.05])
@pytest.mark.parametrize("end", ENDS)
def test_tied_weights_are_as_small_as_the_best_of_all_mixtures(end, share):
    model, data = tied(end)
    mixtures, (int8_bytes, metric) = all_tied_mixtures(end)
    budget = metric * share
    best = min(size for size, error in [(byte_count(model), 0.0), *mixtures] if error <= budget)
    found = suggest_mapping(model, data, budget=budget, schemes=("int4", "int8", "float16", "float"))
    assert found.bytes == best
    assert found.is_within_budget
    assert [row.bytes for row in found.rows if row.is_chosen] == [best]  # and so are those that were not chosen:
    assert {row.bytes for row in found.rows if row.what == "all int8"} == {int8_bytes}


@pytest.mark.parametrize("end", ENDS)
def test_tied_weights_are_decided_together(end):
    model, data = tied(end)
    found = suggest_mapping(model, data, budget=0.005)
    schemes = {f"{site.path} {site.call}": scheme_name(site.qconfig) for site in record_of(found.model).sites}
    assert len(schemes) == 3
    assert set(dict(found.kept).items()) >= {("e", "float16"), (ENDS[end], "float16")}
    assert any(row.what.startswith(f"e+{ENDS[end]} float16, middle ") for row in found.rows)
    assert f"e float16; e+{ENDS[end]} alone worsens the metric by 0." in str(found)


def test_where_time_is_minimized_tied_weights_are_decided_apart(monkeypatch):
    model, data = tied("module")

    def timed(quantized, inputs, float_model=None):
        rows = [
            SimpleNamespace(path=s.path, call="", float_ms=1.0, ms=2.0 if s.path == "e" else 0.5)
            for s in record_of(quantized).sites
        ]
        return SimpleNamespace(rows=[*rows, SimpleNamespace(path="elsewhere", call="", ms=0.5, float_ms=0.5)])

    monkeypatch.setattr(search, "profile", timed)
    found = suggest_mapping(model, data, budget=1.0, minimize="ms", schemes=("int8", "float"))
    assert found.kept == (("e", "float"),)


class Twins(nn.Module):
    """Two LSTMs of one recurrent matrix."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.LSTM(32, 32), nn.LSTM(32, 32)
        self.b.weight_hh_l0 = self.a.weight_hh_l0

    def forward(self, x):
        return self.b(self.a(x)[0])[0]


def twins():
    torch.manual_seed(0)
    return Twins().eval(), [(torch.randn(5, 2, 32),)]


def test_tied_matrices_of_recurrent_layers_count_once_in_a_mixture_too():
    model, data = twins()
    found = suggest_mapping(model, data, budget=0.01)
    (chosen,) = [row for row in found.rows if row.is_chosen]
    assert chosen.what == "a.weight_ih_l0 int8, a.weight_hh_l0+b.weight_hh_l0 int4, b.weight_ih_l0 int4"
    assert chosen.bytes == found.bytes == byte_count(quantize(model, found.mapping, data))


def test_tied_weights_that_take_no_scheme_in_common_are_decided_apart():
    model, data = twins()
    mapping = default_dynamic_qconfig_mapping().set_module_name("a.weight_hh_l0", None)
    found = suggest_mapping(model, data, budget=1.0, schemes=("int8",), qconfig_mapping=mapping)
    assert found.mapping == mapping
    assert found.bytes == byte_count(quantize(model, mapping, data))
