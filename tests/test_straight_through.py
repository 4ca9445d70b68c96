import pytest
import torch

import fxquant
from fxquant.numerics import choose_value_qparams, dequantize, dequantize_value, quantize_tokens, quantize_value
from fxquant.qconfig import BEST, per_channel_dynamic_qconfig, per_tensor_dynamic_qconfig
from fxquant.straight_through import (
    _OnDevice,
    _traced_value,
    fake_quantize_numbers,
    fake_quantize_tokens,
    fake_quantize_value,
)

RANGES = [(-1.0, 2.0), (0.0, 3.0), (-2.5, 0.0), (-1e-3, 1e-3), (0.0, 0.0)]


def qparams(low, high, qmax=255):
    return choose_value_qparams(torch.tensor(low), torch.tensor(high), qmax)


@pytest.mark.parametrize("bounds", RANGES)
@pytest.mark.parametrize("qmax", [3, 15, 255])
@pytest.mark.parametrize("function", [fake_quantize_value, _traced_value])
def test_a_value_has_the_bits_of_its_integers(bounds, qmax, function):
    x = 3 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    scale, zero = qparams(*bounds, qmax)
    ties = torch.cat([x, (torch.arange(-3, 9) + 0.5) * scale])
    expected = dequantize_value(quantize_value(ties, scale, zero, qmax), scale, zero)
    assert torch.equal(function(ties, scale, zero, qmax), expected)


@pytest.mark.parametrize("function", [fake_quantize_value, _traced_value])
def test_the_gradient_passes_in_the_range_alone(function):
    scale, zero = qparams(-1.0, 1.55)  # 0.01 a step
    x = torch.tensor([-1.02, -1.004, -0.3, 0.0, 1.0, 1.554, 1.57], requires_grad=True)
    function(x, scale, zero, 255).backward(torch.arange(1.0, 8.0))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]


@pytest.mark.parametrize("bounds", RANGES)
def test_other_devices_round_alike(bounds):
    """By the same operations in the same order: what other devices run, run here."""
    scale, zero = qparams(*bounds)
    ends = torch.stack([(end - zero) * scale for end in (-0.5, 255.5)])  # as of a batch whose ends are -m and m
    x = torch.cat([3 * torch.randn(1000, generator=torch.Generator().manual_seed(0)), ends])
    expected = None
    for function in (fake_quantize_value, _OnDevice.apply, _traced_value):
        leaf = x.clone().requires_grad_()
        y = function(leaf, scale, zero, 255)
        y.sum().backward()
        expected = expected or (y, leaf.grad)
        assert torch.equal(y, expected[0])
        assert torch.equal(leaf.grad, expected[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_bits_of_the_cpu():
    scale, zero = qparams(-1.0, 2.0)
    x = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    on_gpu = fake_quantize_value(x.cuda(), scale.cuda(), zero.cuda(), 255)
    assert torch.equal(on_gpu.cpu(), fake_quantize_value(x, scale, zero, 255))


@pytest.mark.parametrize("zero_point", [0, 7])
def test_a_relu_before_it_may_be_its_clamp(zero_point):
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    scale, inverse = 2.0**-6, 2.0**6
    y = fake_quantize_numbers(one, scale, inverse, zero_point, 100, rectifies=True)
    z = fake_quantize_numbers(other.relu(), scale, inverse, zero_point, 100)
    y.sum().backward()
    z.sum().backward()
    assert torch.equal(y, z)
    assert torch.equal(one.grad, other.grad)


def test_half_precision_comes_out_as_it_went_in():
    x = torch.randn(10).bfloat16().requires_grad_()
    y = fake_quantize_value(x, *qparams(-1.0, 1.0), 255)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16


def test_tokens_have_the_bits_of_their_integers_and_pass_all_gradients():
    spec, x = fxquant.default_dynamic_qconfig.activation, torch.randn(2, 5, 8, requires_grad=True)
    q, scale, zero = quantize_tokens(x.detach().flatten(0, 1), 255)
    y = fake_quantize_tokens(x, spec)
    assert torch.equal(y.detach().flatten(0, 1), (q - zero) * scale)
    y.sum().backward()
    assert (x.grad == 1).all()


@pytest.mark.parametrize("qconfig", [*BEST.values(), per_channel_dynamic_qconfig, per_tensor_dynamic_qconfig])
def test_a_weight_has_the_bits_of_its_integers(qconfig):
    weight = torch.randn(6, 70, requires_grad=True)
    rounded = fxquant.rounding.FakeQuantizeWeight(qconfig)(weight)
    assert torch.equal(rounded, dequantize(qconfig.quantize_weight(weight)))
    rounded.sum().backward()
    assert weight.grad.mean() > 0.9


def test_a_weight_beyond_its_integers_has_no_gradient():
    weight = torch.tensor([[-8.0, 7.4, 7.9, 1.0] * 8], requires_grad=True)  # scale 1: -8 to 7
    fxquant.rounding.FakeQuantizeWeight(fxquant.int4_dynamic_qconfig.with_group_size(32))(weight).sum().backward()
    assert weight.grad[0, :4].tolist() == [1, 1, 0, 1]
