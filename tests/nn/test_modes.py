import copy
import io

import pytest
import torch
from torch import nn

import fxquant
from fxquant.nn.modes import ByMode


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3)])
def test_frozen_statistics_rest_whatever_the_mode(norm):
    x = torch.randn(4, 3, *[2] * int(type(norm).__name__[-2]))
    model = nn.Sequential(copy.deepcopy(norm)).train()
    model.apply(fxquant.freeze_bn_stats)
    model.train()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        assert torch.equal(each(x), copy.deepcopy(norm).eval()(x))
        assert each[0].num_batches_tracked == 0
    model.apply(fxquant.update_bn_stats)
    model(x)
    assert model[0].num_batches_tracked == 1
    assert type(model[0]) is type(norm)


def test_a_frozen_one_still_learns_and_goes_into_files():
    norm = nn.BatchNorm1d(3)
    norm.apply(fxquant.freeze_bn_stats)
    norm(torch.randn(4, 3)).square().sum().backward()
    assert norm.weight.grad.any()
    assert norm.state_dict().keys() == nn.BatchNorm1d(3).state_dict().keys()
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    assert not torch.load(file, weights_only=False).train().training


def test_a_constant_follows_the_mode():
    module = ByMode(0.5, 0.0)
    assert (module.train()(), module.eval()()) == (0.5, 0.0)
