"""The law of quantization-aware training over random networks in which static, dynamic, learned and float mix."""

import copy
import dataclasses
import random

import pytest
import torch
from torch import nn

import fxquant
from fxquant import FakeQuantize, convert_fx, default_dynamic_qconfig, default_qat_qconfig, prepare_qat_fx
from fxquant.ranges import Learned
from tests.samples import sqnr, steps_apart
from tests.test_static_graphs import Random

COUNT = 16
LEARNED = dataclasses.replace(
    default_qat_qconfig,
    activation=dataclasses.replace(default_qat_qconfig.activation, range=Learned()),
    weight=dataclasses.replace(default_qat_qconfig.weight, range=Learned()),
)
COARSE = dataclasses.replace(
    default_qat_qconfig, activation=dataclasses.replace(default_qat_qconfig.activation, qmax=15)
)


def mapping_of(draw, model):
    mapping = fxquant.default_qat_qconfig_mapping()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and draw.random() < 0.4:
            choices = (None, LEARNED, COARSE, default_dynamic_qconfig if isinstance(module, nn.Linear) else LEARNED)
            mapping.set_module_name(name, draw.choice(choices))
    return mapping


def train(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 7, 9)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("seed", range(COUNT))
def test_the_converted_model_does_what_the_trained_one_does(seed, tmp_path):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Random(draw).train()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(4, 3, 7, 9)
    prepared = prepare_qat_fx(model, mapping_of(draw, model), (x,))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert dict(model.named_parameters()).keys() <= dict(prepared.named_parameters()).keys()

    # a checkpoint resumes in a copy
    train(prepared, 2)
    twin = prepare_qat_fx(model, prepared.record.mapping, (x,))
    twin.load_state_dict(prepared.state_dict())
    for each in (prepared, twin):
        torch.manual_seed(seed)
        train(each, 1)
        each.eval()
    with torch.no_grad():
        y = prepared(x)
        assert torch.equal(twin(x), y)

        # but for the order of sums, the quantized model gives what the trained one does
        quantized = convert_fx(prepared)
        z = quantized(x)
        assert sqnr(y, z) > 30
        assert all(steps < 1.01 for _, steps in steps_apart(prepared, quantized, x))
        fxquant.save(quantized, tmp_path / "q")
        assert torch.equal(fxquant.load(Random(random.Random(seed)).eval(), tmp_path / "q")(x), z)

        # without rounding it is the float model that was trained
        model.load_state_dict({name: prepared.state_dict()[name] for name in before})
        prepared.apply(fxquant.disable_fake_quant)
        assert torch.allclose(prepared(x), model.eval()(x), rtol=1e-3, atol=1e-3)
    ranges = [m for m in prepared.modules() if isinstance(m, FakeQuantize)]
    assert len(ranges) == len({edge.scale_of for edge in prepared.record.values.edges})
