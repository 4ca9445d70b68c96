"""Published convolutional architectures in quantization-aware training: the converted model does what was trained."""

import pytest
import torch

import fxquant
from fxquant import convert_fx, prepare_qat_fx
from tests.architectures.convolutional import CONVOLUTIONAL, make
from tests.samples import leaves, sqnr, steps_apart


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_it_trains_and_converts(name):
    model, data = make(name)
    prepared = prepare_qat_fx(model.train(), fxquant.default_qat_qconfig_mapping(), data[0])
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
    for batch in data[:2]:
        optimizer.zero_grad()
        sum(leaf.square().mean() for leaf in leaves(prepared(*batch))).backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    prepared.eval()
    with torch.no_grad():
        quantized = convert_fx(prepared)
        for expected, got in zip(leaves(prepared(*data[0])), leaves(quantized(*data[0])), strict=True):
            assert sqnr(expected, got) > 30
    apart = dict(steps_apart(prepared, quantized, *data[0]))
    assert apart
    assert max(apart.values()) < 1.01, apart
