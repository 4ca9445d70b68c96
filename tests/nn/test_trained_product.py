import pytest
import torch
from torch import nn

import fxquant
from fxquant.nn.trained_product import train_product

LAYERS = [
    nn.Linear(6, 4), nn.Conv1d(6, 4, 3), nn.Conv2d(6, 4, 3, groups=2, bias=False), nn.Conv3d(6, 4, 1),
    nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose1d(6, 4, 3, 2),
    nn.ConvTranspose2d(6, 4, 3, 2, output_padding=1, bias=False), nn.ConvTranspose3d(6, 4, 2),
    nn.ConvTranspose2d(6, 4, 3, groups=2),
]  # fmt: skip
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
QCONFIG = fxquant.default_qat_qconfig


def example(layer):
    rank = layer.weight.dim() - 2
    return torch.randn(5, 6, *[7] * max(rank, 0), generator=torch.Generator().manual_seed(0))


def norm_of(y):
    norm = NORMS[y.dim()](4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.7, -1.3, 0.0, 2.0]))
        norm.bias.uniform_(-1, 1)
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_it_computes_with_the_integers_of_its_weight(layer):
    trained, x = train_product(layer, QCONFIG), example(layer)
    rounded = fxquant.numerics.dequantize(QCONFIG.quantize_weight(trained._turned(layer.weight).contiguous()))
    float_module = trained.to_float()
    assert type(float_module) is type(layer)
    assert float_module.weight is layer.weight is trained.weight
    with torch.no_grad():
        y = trained(x)
        float_module.weight = nn.Parameter(trained._turned(rounded))
        assert torch.allclose(y, float_module(x), atol=1e-6)
        assert not torch.equal(y, layer(x))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_eval_rounds_the_weight_that_is_folded(layer):
    """A BatchNorm weight of 0 among them, for which a predecessor gave NaN."""
    trained, x = train_product(layer, QCONFIG).eval(), example(layer)
    norm = norm_of(layer(x)).eval()
    trained.norm_eps = norm.eps
    with torch.no_grad():
        y = norm(trained(x, norm.weight, norm.running_var))
        folded = trained.folded(norm)
        expected = train_product(folded, QCONFIG)(x)
        assert torch.allclose(y, expected, atol=1e-5)
        assert not torch.allclose(y, norm(layer(x)), atol=1e-5)
        assert torch.allclose(folded(x), norm(layer(x)), atol=1e-5)


@pytest.mark.parametrize("qconfig", [QCONFIG, fxquant.per_tensor_dynamic_qconfig, fxquant.int4_dynamic_qconfig])
def test_everything_learns_beside_a_normalization_weight_of_0(qconfig):
    layer = nn.Linear(64, 4)
    trained, x = train_product(layer, qconfig).train(), torch.randn(8, 64)
    norm = norm_of(layer(x)).train()
    trained.norm_eps = norm.eps
    y = norm(trained(x, norm.weight, norm.running_var))
    y.pow(3).sum().backward()
    assert y.isfinite().all()
    for parameter in (layer.weight, norm.weight, norm.bias):
        assert parameter.grad.isfinite().all(), parameter
        assert parameter.grad.any(), parameter
    assert norm.weight.grad[2] != 0  # so that a dead channel can come back
    assert not layer.weight.grad[2].any()
    assert layer.weight.grad[0].any()


def test_training_and_eval_round_alike_where_scales_are_one_a_channel():
    layer = nn.Conv2d(3, 4, 3)
    trained, norm = train_product(layer, QCONFIG), norm_of(torch.zeros(1, 4, 1, 1))
    trained.norm_eps = norm.eps
    with torch.no_grad():
        plain, folded = (trained.train(mode).rounded(norm.weight, norm.running_var) for mode in (True, False))
    assert torch.allclose(plain, folded, rtol=1e-5, atol=0)


def test_switched_off_it_is_the_float_layer():
    layer = nn.Conv2d(6, 4, 3)
    trained, x = train_product(layer, QCONFIG), example(layer)
    trained.apply(fxquant.disable_fake_quant)
    assert torch.equal(trained(x), layer(x))
