"""DynamicQuantizedPointwiseConv: a Linear over the channels, each position a row of its own."""

import pytest
import torch
from torch import nn

from fxquant import DTypeError, ShapeError
from fxquant.nn import ConvReLU1d, DynamicQuantizedLinear, DynamicQuantizedPointwiseConv
from fxquant.nn import DynamicQuantizedPointwiseConvReLU as WithReLU
from tests.samples import linear_bound

CASES = [
    (nn.Conv1d(24, 12, 1), (3, 24, 7)),
    (nn.Conv1d(24, 12, 1), (24, 7)),
    (nn.Conv2d(24, 12, 1, bias=False), (3, 24, 5, 7)),
    (nn.Conv2d(24, 12, 1), (24, 5, 7)),
]


@pytest.mark.parametrize(("module", "shape"), CASES, ids=str)
def test_it_is_near_the_float_module_and_as_contiguous(module, shape):
    x = torch.randn(shape)
    channels = -1 - len(module.kernel_size)
    expected, got = module(x), DynamicQuantizedPointwiseConv.from_float(module)(x)
    assert got.shape == expected.shape
    assert got.is_contiguous()
    error = (got - expected).detach().movedim(channels, -1).abs()
    assert bool((error <= linear_bound(x.movedim(channels, -1), module.weight.flatten(1), module.bias)).all())


@pytest.mark.parametrize("shape", [(3, 24, 5, 7), (1, 24, 5, 1), (3, 24, 1, 1)], ids=str)
def test_channels_last_stay_last(shape):
    module, x = nn.Conv2d(24, 12, 1), torch.randn(shape).to(memory_format=torch.channels_last)
    quantized = DynamicQuantizedPointwiseConv.from_float(module)
    got = quantized(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert got.permute(0, 2, 3, 1).view(-1, 12).shape == module(x).permute(0, 2, 3, 1).view(-1, 12).shape
    assert torch.equal(got, quantized(x.contiguous()))


@pytest.mark.parametrize(("module", "shape"), CASES, ids=str)
def test_each_position_gives_a_linears_bits(module, shape):
    quantized = DynamicQuantizedPointwiseConv.from_float(module)
    linear = nn.Linear(24, 12, module.bias is not None)
    linear.weight, linear.bias = nn.Parameter(module.weight.flatten(1)), module.bias
    channels = -1 - len(module.kernel_size)
    x = torch.randn(shape)
    y = quantized(x).movedim(channels, -1).reshape(-1, 12)
    for row, out in zip(x.movedim(channels, -1).reshape(-1, 24), y, strict=True):
        assert torch.equal(DynamicQuantizedLinear.from_float(linear)(row), out)


def test_channels_last_gives_the_same_bits():
    module, x = DynamicQuantizedPointwiseConv.from_float(nn.Conv2d(24, 12, 1)), torch.randn(2, 24, 3, 5)
    assert torch.equal(module(x.to(memory_format=torch.channels_last)), module(x))


def test_relu_is_applied_after_the_bias():
    module, x = ConvReLU1d(24, 12, 1), torch.randn(3, 24, 7)
    plain = DynamicQuantizedPointwiseConv.from_float(module)(x)
    assert torch.equal(WithReLU.from_float(module)(x), plain.clamp(min=0))
    assert plain.min() < 0


@pytest.mark.parametrize("shape", [(24,), (3, 7, 24), (23, 7), (1, 3, 24, 7)])
def test_another_shape_is_refused(shape):
    module = DynamicQuantizedPointwiseConv.from_float(nn.Conv1d(24, 12, 1))
    with pytest.raises(ShapeError, match="Conv1d of 24 channels takes 2-D or 3-D input with 24 in dimension -2, got"):
        module(torch.randn(shape))


def test_integers_are_refused():
    module = DynamicQuantizedPointwiseConv.from_float(nn.Conv1d(24, 12, 1))
    with pytest.raises(DTypeError, match=r"takes a float tensor, got torch\.int64"):
        module(torch.zeros(24, 7, dtype=torch.int64))
