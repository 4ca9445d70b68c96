"""What explain says of a model on a CUDA device; the device itself need not be there."""

import pytest
import torch
from torch import nn

from fxquant import (
    QConfigMapping,
    convert_fx,
    default_dynamic_qconfig,
    default_static_qconfig_mapping,
    explain,
    float16_dynamic_qconfig,
    prepare_fx,
)
from fxquant.debug import on_gpu
from fxquant.ops import gpu


@pytest.fixture
def on_cuda(monkeypatch):
    """Let models seem to be on a CUDA device that Triton runs on, or not, for the reason that is set here."""
    why = [""]
    monkeypatch.setattr(on_gpu, "device_of", lambda _: torch.device("cuda", 1))
    monkeypatch.setattr(gpu, "why_not", lambda _: why[0])
    monkeypatch.setattr(gpu, "version", lambda: "3.9.0")
    return why


def quantize(model, mapping, *inputs):
    prepared = prepare_fx(model.eval(), mapping, inputs)
    return convert_fx(prepared, data=[inputs] if explain(prepared).has_static else None)


def test_a_model_on_the_cpu_is_none_of_this():
    x = torch.randn(2, 8)
    quantized = quantize(nn.Sequential(nn.Linear(8, 8)), QConfigMapping().set_global(default_dynamic_qconfig), x)
    assert on_gpu.device_of(quantized) is None
    assert explain(quantized).on_gpu == ()


def test_what_has_no_kernel_is_named(on_cuda):
    mapping = QConfigMapping().set_global(default_dynamic_qconfig).set_module_name("1", float16_dynamic_qconfig)
    quantized = quantize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), mapping, torch.randn(2, 8))
    found = explain(quantized)
    assert found.on_gpu == (
        "runs on cuda:1: Triton 3.9.0",
        "runs on cuda:1: 1: float16 weights are torch's own float products",
    )
    assert found.on_gpu[0] in str(found)


def test_static_convolutions_of_other_kinds_are_named(on_cuda):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.ConvTranspose2d(4, 4, 1))
    quantized = quantize(model, default_static_qconfig_mapping(), torch.randn(1, 4, 3, 3))
    (_, line) = on_gpu.runs_on(quantized)
    assert line == f"runs on cuda:1: 1, 2: {on_gpu.PLAIN_KINDS[1].why}"


def test_without_triton_it_is_plain_torch(on_cuda):
    on_cuda[0] = "Triton is not installed"
    x = torch.randn(2, 8)
    quantized = quantize(nn.Sequential(nn.Linear(8, 8)), QConfigMapping().set_global(default_dynamic_qconfig), x)
    assert explain(quantized).on_gpu == ("runs on cuda:1: plain torch (Triton is not installed)",)


def test_times_of_processors_are_not_told_of_a_gpu(on_cuda, monkeypatch):
    asked = []
    monkeypatch.setattr("fxquant.debug.regressions.speed_table", lambda: asked.append(1))
    x = torch.randn(2, 8)
    explain(quantize(nn.Sequential(nn.Linear(8, 8)), QConfigMapping().set_global(default_dynamic_qconfig), x))
    assert not asked
