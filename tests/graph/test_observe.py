"""Observers stand on functionals' weights, and change nothing."""

import pytest
import torch
import torch.nn.functional as F

from fxquant import (
    MinMaxObserver,
    PerChannelMinMaxObserver,
    convert_fx,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    int4_dynamic_qconfig,
    per_tensor_dynamic_qconfig,
)
from fxquant.observers import Observer
from tests.samples import Call, WordLM, everything, lm_inputs, prepare


def observers(prepared):
    return {name: m for name, m in prepared.named_modules() if isinstance(m, Observer)}


def test_a_functionals_weight_is_observed_once():
    model = Call(F.linear, 4, 6)
    prepared = prepare(model, torch.randn(2, 6))
    assert list(observers(prepared)) == ["weight_observer"]
    observer = prepared.weight_observer
    assert type(observer) is PerChannelMinMaxObserver
    assert torch.equal(observer.max_val, model.weight.detach().amax(1))
    (node,) = [n for n in prepared.graph.nodes if n.target == "weight_observer"]
    assert [user.target for user in node.users] == [F.linear]


def test_the_observer_is_the_qconfigs():
    prepared = prepare(Call(F.linear, 4, 6), torch.randn(2, 6), mapping=everything(per_tensor_dynamic_qconfig))
    assert type(prepared.weight_observer) is MinMaxObserver


def test_float16_needs_no_observer():
    prepared = prepare(Call(F.linear, 4, 6), torch.randn(2, 6), mapping=everything(float16_dynamic_qconfig))
    assert observers(prepared) == {}
    assert convert_fx(prepared).weight_float16.dtype == torch.float16


def test_modules_need_no_observer():
    model = WordLM()
    assert observers(prepare(model, *lm_inputs(model))) == {}


def test_an_observer_does_not_take_a_name_of_the_users():
    class Model(Call):
        def __init__(self):
            super().__init__(F.linear, 4, 6)
            self.weight_observer = torch.nn.Identity()

        def forward(self, x):
            return self.weight_observer(super().forward(x))

    model, x = Model(), torch.randn(2, 6)
    prepared = prepare(model, x)
    assert list(observers(prepared)) == ["weight_observer_1"]
    assert torch.equal(prepared(x), model(x))


def test_observers_are_gone_after_convert():
    model, x = Call(F.linear, 4, 6), torch.randn(2, 6)
    quantized = convert_fx(prepare(model, x))
    assert observers(quantized) == {}
    assert not any(n.op == "call_module" for n in quantized.graph.nodes)


@pytest.mark.parametrize("function", [F.linear, torch.matmul], ids=["linear", "matmul"])
@pytest.mark.parametrize("qconfig", [default_dynamic_qconfig, per_tensor_dynamic_qconfig, int4_dynamic_qconfig])
def test_the_range_that_was_observed_is_the_one_that_convert_uses(function, qconfig):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return function(x, self.weight)

    x = torch.randn(2, 6)
    prepared = prepare(Model(), x, mapping=everything(qconfig))
    prepared(x)
    plain = convert_fx(prepared)
    for name in ("min_val", "max_val"):
        getattr(prepared.weight_observer, name).mul_(2)
    wide = convert_fx(prepared, check=False)
    assert torch.equal(wide.weight_scale, plain.weight_scale * 2)


def test_a_weight_is_measured_once_from_prepare_to_convert(monkeypatch):
    calls, measure = [], PerChannelMinMaxObserver.measure
    monkeypatch.setattr(PerChannelMinMaxObserver, "measure", lambda self, x: calls.append(x) or measure(self, x))
    convert_fx(prepare(Call(F.linear, 4, 6), torch.randn(2, 6)), check=False)
    assert len(calls) == 1


def test_a_weight_that_is_written_to_after_prepare_is_measured_anew():
    model, x = Call(F.linear, 4, 6), torch.randn(2, 6)
    prepared = prepare(model, x)
    plain = convert_fx(prepared)
    model.weight.data.mul_(4)
    assert torch.equal(convert_fx(prepared, check=False).weight_scale, plain.weight_scale * 4)
