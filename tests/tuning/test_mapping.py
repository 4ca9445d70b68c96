"""Mappings that decide as the search did."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import (
    QConfigMapping,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    int4_dynamic_qconfig,
    suggest_mapping,
)
from fxquant.graph.record import record_of
from tests.debug.measure.test_sensitivity import data, model, relative_rms
from tests.tuning.test_suggest import quantize, words_and_data

__all__ = ["data", "model"]  # fixtures


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


@pytest.mark.parametrize("minimize", ["bytes", "ms"])
@pytest.mark.parametrize("budget", [0.01, 0.1])
@pytest.mark.parametrize("own", [None, float16_dynamic_qconfig, int4_dynamic_qconfig])
def test_a_mapping_may_name_weights(own, budget, minimize):
    model, data = words_and_data()
    mapping = QConfigMapping().set_global(default_dynamic_qconfig).set_module_name("rnn.weight_ih_l0", own)
    found = suggest_mapping(model, data, budget=budget, qconfig_mapping=mapping, minimize=minimize)
    assert found.is_within_budget
    record = record_of(found.model)  # none where float is the fastest
    lstms = [site.qconfig for site in (record.sites if record else ()) if site.path == "rnn"]
    assert own is not None or all(qconfig.of("weight_ih_l0") is None for qconfig in lstms)
    # by the triangle inequality as near as a graph's float products are to the model's, relative to the outputs: 1e-7
    assert found.metric == pytest.approx(relative_rms(model, found.model, data), rel=0, abs=1e-6)
