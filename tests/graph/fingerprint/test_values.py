"""What a model's Python values come to: other values make another model, what only describes it does not."""

import enum
import logging
import random
import threading
import time
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.fingerprint.architecture import describe, differences
from fxquant.graph.trace.trace import trace
from fxquant.operators import OPERATORS


class Plain:
    def __init__(self, factor):
        self.factor, self.made, self.lock = factor, time.perf_counter(), threading.Lock()
        self.itself = self


@dataclass
class Config:
    factor: float
    unread: float = 0.0


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


class Holds(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.linear, self.value, self.other = nn.Linear(2, 2), value, nn.Linear(2, 2)
        self.made, self.log, self.random = time.perf_counter(), logging.getLogger("a"), random.Random()

    def forward(self, x):
        return self.linear(x) * self.value.factor + self.other(x)


class Buffers(Holds):
    def __init__(self, theta):
        super().__init__(None)
        self.register_buffer("inv_freq", theta ** -torch.arange(4.0), persistent=False)

    def forward(self, x):
        return x * self.inv_freq


class Cached(Buffers):
    def forward(self, x):
        self.inv_freq[0] = x.sum()
        return x * self.inv_freq


class OfLayers(Holds):
    def __init__(self, turned):
        super().__init__(None)
        self.value = [self.linear, self.other][:: -1 if turned else 1]


class Constant(Holds):
    FACTOR = 2.0

    def forward(self, x):
        return x * self.FACTOR


def scaled(by, default=1.0):
    def inner(x, default=default):
        return x * by * default

    return inner


def told(old, new):
    return differences(describe(old.eval()), describe(new.eval()))[0]


PAIRS = {
    "a plain object": lambda n: Holds(Plain(n)),
    "a namespace": lambda n: Holds(types.SimpleNamespace(factor=n)),
    "a dataclass": lambda n: Holds(Config(n)),
    "an object in an object": lambda n: Holds(types.SimpleNamespace(factor=Plain(n))),
    "an Enum": lambda n: Holds(Kind(n)),
    "a dtype": lambda n: Holds([torch.float16, torch.float32][n - 1]),
    "a slice": lambda n: Holds(slice(0, n)),
    "a NumPy number": lambda n: Holds(np.float32(n)),
    "a NumPy array": lambda n: Holds(np.arange(4) * n),
    "a tensor": lambda n: Holds(torch.arange(4) * n),
    "a buffer": lambda n: Buffers(10.0 * n),
    "a closure": lambda n: Holds(scaled(n)),
    "a default": lambda n: Holds(scaled(1, n)),
    "an order of layers": lambda n: OfLayers(n == 2),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_that_count(name):
    assert told(PAIRS[name](1), PAIRS[name](1)) == []
    assert len(told(PAIRS[name](1), PAIRS[name](2))) == 1


def test_a_constant_of_the_class_counts(monkeypatch):
    old = describe(Constant(None))
    monkeypatch.setattr(Constant, "FACTOR", 3.0)
    assert len(differences(old, describe(Constant(None)))[0]) == 1


FACTOR = 2.0


class Global(Holds):
    def forward(self, x):
        return x * FACTOR


def test_a_global_number_counts(monkeypatch):
    old = describe(Global(None))
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert len(differences(old, describe(Global(None)))[0]) == 1


def test_what_the_code_does_not_read_or_writes_itself_does_not_count():
    assert told(Holds(Config(1.0, 2.0)), Holds(Config(1.0, 3.0))) == []
    assert told(Cached(10.0), Cached(20.0)) == []


def test_a_buffer_counts_but_for_rounding_and_on_meta():
    old, near, meta = Buffers(10.0), Buffers(10.0), Buffers(10.0).to("meta")
    near.inv_freq *= 1 + 1e-6
    assert told(old, near) == []
    assert told(old, meta) == []


@pytest.mark.parametrize("is_traced", [True, False])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (lambda: nn.RNN(4, 4, nonlinearity="tanh"), lambda: nn.RNN(4, 4, nonlinearity="relu")),
        (lambda: nn.AvgPool1d(3, 1, 1), lambda: nn.AvgPool1d(3, 1, 1, count_include_pad=False)),
        (
            lambda: nn.Upsample(scale_factor=2, mode="linear"),
            lambda: nn.Upsample(scale_factor=2, mode="linear", align_corners=True),
        ),
    ],
    ids=["RNN", "AvgPool1d", "Upsample"],
)
def test_options_that_no_repr_has_count(old, new, is_traced):
    def of(make):
        model = nn.Sequential(make()).eval()
        return describe(trace(model, OPERATORS).module if is_traced else model)

    assert differences(of(old), of(old))[0] == []
    assert len(differences(of(old), of(new))[0]) == 1


def with_hook(hook):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(hook)
    return model


def test_hooks_that_compute_count():
    double, again, treble = (
        with_hook(h) for h in (lambda m, i, o: o * 2.0, lambda m, i, o: o * 2.0, lambda m, i, o: o * 3.0)
    )
    assert told(double, again) == []
    assert len(told(double, treble)) == 1
    assert len(told(double, nn.Sequential(nn.Linear(2, 2)))) == 1


def test_hooks_that_look_on_do_not_count():
    kept = []

    def look(module, args, output):
        kept.append(F.relu(output))

    assert told(with_hook(look), nn.Sequential(nn.Linear(2, 2))) == []
