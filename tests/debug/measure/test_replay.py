"""Partial passes give the bits of whole ones, and are taken only where they do."""

import pytest
import torch
from torch import nn

from fxquant import default_dynamic_qconfig_mapping, float16_dynamic_qconfig
from fxquant.debug.measure.sensitivity import variants_of
from fxquant.debug.measure.trial import Trial
from tests.debug.measure.test_sensitivity import EVERYTHING, data, model
from tests.debug.measure.test_trial import EXACT, ROWS, make
from tests.random_graphs import Draft

__all__ = ["data", "model"]  # fixtures


class Chain(nn.Module):
    """Three layers in a row."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.third(self.second(self.first(x)))


class Writing(nn.Module):
    """A value that a later node writes into."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        y = self.first(x)
        z = self.second(y)
        y.add_(z)
        return y + z


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(self.first(x) + torch.rand_like(x)) + torch.rand_like(x)


class Counting(nn.Module):
    """A buffer that each call writes into."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.second(self.first(x)) + self.calls * 0


INEXACT = {"writing": Writing, "noisy": Noisy, "counting": Counting}


def measured(model, data, mapping=EVERYTHING):
    """Return what partial passes, if they are taken, and whole passes give."""
    trial = Trial(model, mapping, data, None)
    variants = variants_of(trial.forms)
    return trial, trial.measure_all(variants), {key: trial.measure(variant.forms) for key, variant in variants.items()}


@pytest.mark.parametrize("name", EXACT)
def test_partial_passes_give_the_bits_of_whole_ones(name):
    build, batches = EXACT[name]
    trial, parts, whole = measured(make(build), batches)
    assert trial.is_partial
    assert parts == whole
    assert parts["quantized"] > 0


@pytest.mark.parametrize("seed", range(40))
def test_partial_passes_of_random_graphs_give_the_bits_of_whole_ones(seed):
    torch.manual_seed(seed)
    model, args = Draft(seed).model()
    _, parts, whole = measured(model, [args])
    assert parts == pytest.approx(whole, abs=0, rel=0, nan_ok=True)


@pytest.mark.parametrize("name", INEXACT)
def test_a_graph_with_state_or_random_numbers_runs_whole(name):
    trial, parts, whole = measured(make(INEXACT[name]), ROWS)
    assert not trial.is_partial
    assert parts == whole


def test_hooks_of_the_root_are_fired(model, data):
    model.register_forward_hook(lambda module, args, output: output * torch.arange(1.0, 5.0))
    trial, parts, whole = measured(model, data)
    assert not trial.is_partial
    assert parts == whole


def test_a_site_costs_what_follows_it():
    calls = []
    model = make(Chain)
    for name in ("first", "second", "third"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    trial = Trial(model, EVERYTHING, ROWS[:1], None)
    variants = {key: variant for key, variant in variants_of(trial.forms).items() if key.startswith("alone")}
    for form in trial.forms.values():
        form._forward_hooks.clear()
    calls.clear()
    trial.measure_all(variants)
    assert calls == ["first", "second", "third", "second", "third", "third"]


def test_float16_forms_are_swapped_like_any(model, data):
    trial, parts, whole = measured(model, data, default_dynamic_qconfig_mapping().set_global(float16_dynamic_qconfig))
    assert trial.is_partial
    assert parts == whole
