"""Differences that a little noise explains are not the fault of quantization."""

import dataclasses
import random
import warnings

import pytest
import torch
from torch import nn

import fxquant
from fxquant import convert_fx, prepare_fx
from tests.graph.check.test_check import Untraced, X, prepared, unwarned
from tests.samples import everything, prepare

__all__ = ["prepared"]  # fixtures


def test_the_worst_sites_are_named_with_their_sqnr():
    coarse = everything(fxquant.int4_dynamic_qconfig)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    with torch.no_grad():
        model[1].weight[:, 0] = 1e4  # int4 has no step for the others
        model[1].weight[:, 1:] *= 1e-2
        model[0].weight[0] = 0
        model[0].bias[0] = 0
        model[1].bias.zero_()
    x = torch.randn(6, 32)
    with pytest.warns(UserWarning, match=r"the output has an SQNR of .*; the worst sites: 1 \(nn.Linear\) ") as told:
        quantized = convert_fx(prepare(model, x, mapping=coarse))
    row = {row.path: row for row in fxquant.compare(model, quantized, [x]).rows}["1"]
    assert f"1 (nn.Linear) {row.sqnr_db:.1f} dB" in str(told[0].message)


def test_functional_sites_are_named_too():
    class Weight(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 32) * 1e-2)

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    model = Weight()
    with torch.no_grad():
        model.weight[:, 0] = 1e4
    x = torch.randn(6, 32)
    x[:, 0] = 0
    with pytest.warns(UserWarning, match=r"the worst sites: weight \(linear\) \(F.linear\) "):
        convert_fx(prepare(model, x, mapping=everything(fxquant.int4_dynamic_qconfig)))


@pytest.mark.parametrize("draw", [random.SystemRandom().random, random.random, lambda: float(torch.rand(()))])
def test_random_outputs_are_no_fault(draw):
    class Random(Untraced):
        def run(self, x):
            return self.head(self.body(x)) + 100 * draw()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* does not trace.*")
        prepared = prepare_fx(Random().eval(), fxquant.default_dynamic_qconfig_mapping(), X)
    states = random.getstate(), torch.get_rng_state()
    convert_fx(prepared)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def selecting(select, seeds):
    """Return models whose output is chosen by values."""

    class Selecting(Untraced):
        def run(self, x):
            return select(self.head(self.body(x)))

    for seed in range(seeds):
        torch.manual_seed(seed)
        yield Selecting().eval()


@pytest.mark.parametrize(
    "select",
    [
        lambda y: y[y > 0],
        lambda y: y[y[:, 0] > 0],
        lambda y: torch.randn(8, 500, generator=torch.Generator().manual_seed(0))[y.argmax(-1)],
    ],
    ids=["mask", "rows", "argmax"],
)
def test_what_is_selected_by_values_is_no_fault(select):
    x, changed = torch.randn(200, 32, generator=torch.Generator().manual_seed(3)), 0
    for model in selecting(select, 3):
        quantized = unwarned(model, x)
        changed += quantized(x).shape != model(x).shape or not torch.allclose(quantized(x), model(x), atol=0.1)
    assert changed


def test_static_sites_that_give_integers_are_among_the_worst_with_their_true_figures():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, n) for n in (16, 16, 4))

        def forward(self, x):
            x = torch.relu(self.a(x))
            return torch.relu(self.c(torch.relu(self.b(x) + x)))

    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(30, 16)
    static = fxquant.default_static_qconfig
    coarse = dataclasses.replace(static, activation=dataclasses.replace(static.activation, qmax=1))
    with pytest.warns(UserWarning, match=r"SQNR of .* fxquant.sensitivity which of them to leave float") as caught:
        quantized = convert_fx(prepare(model, x, mapping=everything(coarse)), data=[(x,)])
    rows = fxquant.compare(model, quantized, [(x,)]).rows  # worst first, measured in another way
    assert [row.path for row in rows] != ["c"]
    worst = ", ".join(f"{row.path} (nn.Linear) {row.sqnr_db:.1f} dB" for row in rows)
    assert f"the worst sites: {worst}. " in str(caught[-1].message)
