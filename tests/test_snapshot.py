"""A compiled step's backward reads what its forward read, of buffers that forward has changed since."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import fxquant
from fxquant import FakeQuantize, QConfigMapping, default_qat_qconfig, prepare_qat_fx
from fxquant.ranges import Learned, MovingAverage
from fxquant.snapshot import snapshot

PARTITIONED = "aot_eager_decomp_partition"  # Inductor's way to compute values anew in backward, without its code


def compiled(module):
    torch.compiler.reset()
    return torch.compile(module, backend=PARTITIONED, fullgraph=True)


def test_a_range_that_moves_clips_forward_and_backward_alike():
    activation = dataclasses.replace(default_qat_qconfig.activation, range=MovingAverage(0.5))
    plain, results = FakeQuantize(activation, "'x'"), []
    plain(torch.tensor([-1.0, 1.0]))
    twin, x = copy.deepcopy(plain), torch.linspace(-3, 3, 61)
    for module in (plain, compiled(twin)):
        leaf = x.clone().requires_grad_()
        module(leaf).sum().backward()
        results.append(leaf.grad)
    assert torch.equal(*results)
    assert results[0].sum() == 40  # in [-2, 2), where the range moved; moved twice it would be [-2.5, 2.5)


@pytest.mark.parametrize("weight", [fxquant.default_qat_qconfig.weight, fxquant.per_tensor_dynamic_qconfig.weight])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")  # torch itself does
def test_a_weight_is_folded_with_the_same_statistics(weight, learns):
    torch.manual_seed(0)
    weight = dataclasses.replace(weight, range=Learned()) if learns else weight
    mapping = QConfigMapping().set_global(dataclasses.replace(default_qat_qconfig, weight=weight))
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)).train(), torch.randn(2, 2, 6, 6)
    plain = prepare_qat_fx(model, mapping, (x,))
    plain(x)
    twin = copy.deepcopy(plain)
    for each in (plain, compiled(twin)):
        each(3 * x).pow(3).mean().backward()
    for (name, one), other in zip(plain.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6), name


def test_eager_steps_copy_nothing():
    x = torch.ones(3)
    assert snapshot(x) is x
