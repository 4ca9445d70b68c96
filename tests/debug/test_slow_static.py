"""Static layers that are slower than float are named, by the kernels in use."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fxquant import convert_fx, default_static_qconfig_mapping, explain, prepare_fx
from fxquant.debug.slow_static import SLOW_KINDS, slow_static

PLAIN, GROUPS = (kind.why for kind in SLOW_KINDS)


@pytest.fixture(scope="module")
def stages():
    layers = {
        "plain": nn.Conv2d(4, 16, 1),
        "wide_groups": nn.Conv2d(16, 32, 1, groups=2),
        "groups": nn.Conv2d(32, 16, 1, groups=4),
        "multiplied": nn.Conv2d(16, 32, 1, groups=16),
        "depthwise": nn.Conv2d(32, 32, 1, groups=32),
        "transposed": nn.ConvTranspose2d(32, 4, 1),
        "flat": nn.Flatten(),
        "linear": nn.Linear(16, 4),
    }
    model, x = nn.Sequential(), torch.randn(2, 4, 2, 2)
    for name, layer in layers.items():
        model.add_module(name, layer)
    prepared = prepare_fx(model.eval(), default_static_qconfig_mapping(), (x,))
    return prepared, convert_fx(prepared, data=[(x,)])


def found(monkeypatch, model, isa):
    monkeypatch.setattr("fxquant.debug.slow_static.kernel_info", lambda: SimpleNamespace(isa=isa))
    return {why: paths for paths, why in slow_static(model)}


@pytest.mark.parametrize("isa", ["amx", "avx512_vnni", "avx_vnni", "avx2", "neon_dot", "portable"])
def test_what_leaves_registers_empty_is_slow(stages, monkeypatch, isa):
    assert found(monkeypatch, stages[1], isa) == {GROUPS: ["groups", "multiplied"]}


def test_without_the_library_everything_is_slow_for_one_reason(stages, monkeypatch):
    every = ["plain", "wide_groups", "groups", "multiplied", "depthwise", "transposed", "linear"]
    assert found(monkeypatch, stages[1], None) == {PLAIN: every}


def test_explain_says_so_before_and_after_convert(stages, monkeypatch):
    found(monkeypatch, stages[1], "amx")
    before, after = (explain(stage) for stage in stages)
    assert before.slow_static == after.slow_static
    assert after.slow_static == (f"groups, multiplied: {GROUPS}",)
    assert f"slow: groups, multiplied: {GROUPS}" in " ".join(" ".join(after.footer).split())


def test_a_dynamic_layer_is_none_of_these(monkeypatch):
    assert found(monkeypatch, nn.Sequential(nn.Linear(4, 4)), None) == {}
