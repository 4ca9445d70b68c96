"""Suggested mappings: within the budget as measured on the model that they give, and no finer than need be."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import (
    QConfigError,
    QConfigMapping,
    convert_fx,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    prepare_fx,
    suggest_mapping,
)
from fxquant.graph.edit import byte_count
from fxquant.graph.module import record_of
from tests.debug.test_sensitivity import EVERYTHING, Branching, data, model, relative_rms

__all__ = ["data", "model"]  # fixtures


def quantize(model, mapping, data):
    return convert_fx(prepare_fx(model, mapping, data[0]))


def test_a_budget_that_all_sites_keep_is_kept_by_all(model, data):
    found = suggest_mapping(model, data, budget=1.0)
    assert found.mapping == EVERYTHING
    assert found.kept == ()
    assert [step.what for step in found.rows] == ["all sites quantized"]


def test_the_site_that_does_the_harm_is_kept_finer_and_no_other(model, data):
    without_first = (
        QConfigMapping().set_global(default_dynamic_qconfig).set_module_name("first", float16_dynamic_qconfig)
    )
    budget = relative_rms(model, quantize(model, without_first, data), data) * 1.001
    assert relative_rms(model, quantize(model, EVERYTHING, data), data) > budget
    found = suggest_mapping(model, data, budget=budget)
    assert found.kept == (("first", "float16"),)
    assert found.mapping == without_first


def test_what_it_states_is_measured_on_the_model_that_its_mapping_gives(model, data):
    everything = relative_rms(model, quantize(model, EVERYTHING, data), data)
    for share in (0.9, 0.5, 0.1, 0.0):
        found = suggest_mapping(model, data, budget=everything * share)
        quantized = quantize(model, found.mapping, data)
        assert found.metric == pytest.approx(relative_rms(model, quantized, data), rel=1e-9, abs=1e-12)
        assert found.metric <= everything * share
        assert found.is_within_budget
        assert found.bytes == byte_count(quantized) == byte_count(found.model)
        assert found.rows[-1].bytes >= min(step.bytes for step in found.rows)
        x = data[1][0]
        assert torch.equal(found.model(x), quantized(x))


def test_where_float16_is_not_fine_enough_sites_stay_float(model, data):
    found = suggest_mapping(model, data, budget=0.0)
    assert set(dict(found.kept).values()) == {"float"}
    assert len(found.kept) == 3
    assert found.metric == 0


def test_a_call_is_named_by_its_place():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(6, 6)) for _ in range(3))
            with torch.no_grad():
                self.b[:, 0] *= 1000  # of one size with the others' outputs only in the first column

        def forward(self, x):
            return F.linear(x, self.c) + F.linear(x * torch.tensor([1e-3, 1, 1, 1, 1, 1]), self.b) + F.linear(x, self.a)

    torch.manual_seed(0)
    model, data = Calls().eval(), [(torch.randn(3, 6),)]
    budgets = {}
    for index, name in enumerate(("c", "b", "a")):
        mapping = QConfigMapping().set_global(default_dynamic_qconfig)
        mapping.set_module_name_object_type_order("", F.linear, index, float16_dynamic_qconfig)
        budgets[name] = (relative_rms(model, quantize(model, mapping, data), data), mapping)
    best = min(budgets, key=lambda name: budgets[name][0])
    found = suggest_mapping(model, data, budget=budgets[best][0] * 1.0001)
    record = record_of(found.model)
    finer = {site.path for site in record.sites if site.qconfig == float16_dynamic_qconfig}
    assert finer == {name.split(" ")[0] for name, _ in found.kept}
    assert best in finer


def test_the_same_arguments_give_the_same_mapping(model, data):
    first, second = (suggest_mapping(model, data, budget=0.002) for _ in range(2))
    assert first.mapping == second.mapping
    assert first.rows == second.rows


def test_a_metric_whose_higher_values_are_better(model, data):
    everything = relative_rms(model, quantize(model, EVERYTHING, data), data)
    found = suggest_mapping(
        model,
        data,
        lambda candidate: -relative_rms(model, candidate, data),
        budget=everything / 2,
        higher_is_better=True,
    )
    assert -found.metric <= everything / 2
    assert found.kept


def test_the_fastest_model_keeps_sites_float(model, data):
    everything = relative_rms(model, quantize(model, EVERYTHING, data), data)
    found = suggest_mapping(model, data, budget=everything / 2, minimize="ms")
    assert found.is_within_budget
    assert set(dict(found.kept).values()) == {"float"}


def test_a_model_that_does_not_trace(data):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="the model's own code runs on"):
        found = suggest_mapping(Branching().eval(), data, budget=0.0)
    assert dict(found.kept) == {"first": "float", "second": "float"}
    assert found.model(data[0][0]).shape == (3, 5)


def test_a_budget_that_nothing_keeps_is_warned_of(model, data):
    with pytest.warns(UserWarning, match="outside of the budget of -1"):
        found = suggest_mapping(model, data, budget=-1.0)
    assert not found.is_within_budget
    assert "OUTSIDE OF" in str(found)


def test_a_metric_that_is_nan_is_not_within_any_budget(model, data):
    calls = []

    def metric(candidate):
        calls.append(candidate)
        return 0.0 if len(calls) == 1 else float("nan")

    with pytest.warns(UserWarning, match="nan, is outside"):
        assert not suggest_mapping(model, data, metric, budget=1e9).is_within_budget


def test_something_else_to_minimize_is_an_error(model, data):
    with pytest.raises(QConfigError, match="'bytes' or 'ms', got 'watts'"):
        suggest_mapping(model, data, budget=1.0, minimize="watts")


def test_it_prints_and_gives_plain_values(model, data):
    found = suggest_mapping(model, data, budget=0.0)
    assert "within the budget of 0" in str(found)
    assert "kept finer: first (float)" in str(found)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["model"] is None
    assert told["mapping"].startswith("QConfigMapping()")
    assert len(told["rows"]) == len(found.rows)


def test_the_curve_is_drawn(model, data):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = suggest_mapping(model, data, budget=0.0)
    axes = found.plot(pyplot.figure().subplots())
    assert len(axes.lines[0].get_xdata()) == len(found.rows)
    pyplot.close("all")
