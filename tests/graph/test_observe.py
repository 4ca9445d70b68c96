"""Observers stand on functionals' weights, and change nothing."""

import torch
import torch.nn.functional as F

from fxquant import (
    MinMaxObserver,
    PerChannelMinMaxObserver,
    convert_fx,
    float16_dynamic_qconfig,
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
