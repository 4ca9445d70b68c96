"""Runs on the example inputs leave no trace."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fxquant
from fxquant import convert_fx, prepare_fx
from tests.graph.check.test_check import Untraced, X, prepared, unwarned
from tests.samples import prepare

__all__ = ["prepared"]  # fixtures


def test_calls_of_forward_itself_count():
    class Direct(Untraced):
        def run(self, x):
            return self.head.forward(self.body.forward(x))

    assert fxquant.explain(unwarned(Direct())).coverage.share == 1


class Stateful(Untraced):
    """Counts its calls, keeps a cache and writes into a buffer."""

    def set_up(self):
        self.calls, self.cache = 0, []
        self.register_buffer("sum", torch.zeros(8))

    def run(self, x):
        y = self.head(self.body(x))
        self.calls += 1
        self.cache.append(y)
        self.sum += y.sum(0)
        return y


@pytest.mark.parametrize("check", [True, False])
def test_the_check_leaves_no_trace(check):
    model = Stateful()
    quantized = unwarned(model, check=check)
    for left in (model, quantized):
        assert (left.calls, left.cache, left.sum.abs().max()) == (0, [], 0)


def test_a_forward_that_writes_into_its_weights_leaves_no_trace():
    class Writing(Untraced):
        def run(self, x):
            self.body.bias.data[0] += 1
            self.body.weight.data.add_(1)
            return self.head(self.body(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(Writing().eval(), fxquant.default_dynamic_qconfig_mapping(), X)
    before = copy.deepcopy(prepared.state_dict())
    quantized = convert_fx(prepared)
    assert all(torch.equal(before[name], tensor) for name, tensor in prepared.state_dict().items())
    assert all(torch.equal(quantized.state_dict()[name], before[name]) for name in ("body.bias", "body.weight"))
    assert isinstance(quantized.head, fxquant.nn.DynamicQuantizedLinear)


def test_hooks_are_not_fired():
    model = nn.Sequential(nn.Linear(32, 8)).eval()
    fired = []
    model[0].register_forward_hook(lambda *_: fired.append(1))
    convert_fx(prepare(model, X))
    assert fired == []


@pytest.mark.parametrize(
    "answer",
    [lambda y: (part for part in y), lambda y: {"label": y.argmax(-1)}, lambda y: [y[:0], {"n": 3}], lambda y: None],
    ids=["generator", "labels", "empty", "nothing"],
)
def test_every_kind_of_output_is_taken(answer):
    class Other(Untraced):
        def run(self, x):
            return answer(self.head(self.body(x)))

    assert fxquant.explain(unwarned(Other())).coverage.share == 1
