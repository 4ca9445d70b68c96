"""DynamicQuantizedLinear: near the float module by a derived bound, and its forms."""

import pytest
import torch
from torch import nn

from fxquant import (
    ShapeError,
    float16_dynamic_qconfig,
    int4_dynamic_qconfig,
    int16_dynamic_qconfig,
    per_tensor_dynamic_qconfig,
)
from fxquant.formats import INT4
from fxquant.nn import DynamicQuantizedLinear, DynamicQuantizedLinearReLU, LinearReLU
from fxquant.numerics import QuantizedTensor, dequantize
from tests.samples import linear_bound


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shift", [-4.0, 0.0, 4.0])
def test_it_is_near_the_float_module(bias, shift):
    module = nn.Linear(50, 30, bias=bias)
    x = torch.randn(8, 50) + shift
    error = (DynamicQuantizedLinear.from_float(module)(x).double() - module.double()(x.double())).abs()
    assert bool((error <= linear_bound(x, module.weight, module.bias)).all())


def test_relu_is_applied_after_the_bias():
    module = LinearReLU(20, 10)
    x = torch.randn(6, 20)
    plain = DynamicQuantizedLinear.from_float(module)(x)
    assert torch.equal(DynamicQuantizedLinearReLU.from_float(module)(x), plain.clamp(min=0))
    assert plain.min() < 0


def test_half_weights_are_much_nearer():
    module, x = nn.Linear(50, 30), torch.randn(8, 50)
    error = (DynamicQuantizedLinear.from_float(module, float16_dynamic_qconfig)(x) - module(x)).abs()
    assert bool((error <= 2**-11 * 1.1 * (x.abs() @ module.weight.abs().t())).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_of_another_dtype_converts(dtype):
    module, x = nn.Linear(20, 10).to(dtype), torch.randn(3, 20).to(dtype)
    quantized = DynamicQuantizedLinear.from_float(module)
    assert quantized(x).dtype == dtype
    assert quantized.weight_scale.dtype == torch.float32
    bound = linear_bound(x, module.weight, module.bias) + torch.finfo(dtype).eps * module.double()(x.double()).abs()
    assert bool(((quantized(x).double() - module.double()(x.double())).abs() <= bound).all())


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match=r"of 6 inputs takes x of shape \(..., 6\), got \(3, 5\)"):
        DynamicQuantizedLinear.from_float(nn.Linear(6, 4))(torch.randn(3, 5))


def test_per_tensor_lets_rows_share_a_scale():
    module, x = nn.Linear(20, 10), torch.randn(2, 20)
    x[1] *= 1000
    shared = DynamicQuantizedLinear.from_float(module, per_tensor_dynamic_qconfig)(x)
    alone = DynamicQuantizedLinear.from_float(module, per_tensor_dynamic_qconfig)(x[:1])
    assert not torch.equal(shared[:1], alone)


def test_repr_shows_sizes_and_scheme():
    module = DynamicQuantizedLinear.from_float(nn.Linear(6, 4, bias=False))
    assert repr(module) == (
        "DynamicQuantizedLinear(6, 4, bias=False, int8 symmetric per channel, activation uint8 affine per token)"
    )


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_near_the_float_module(group_size):
    module, x = nn.Linear(150, 30), torch.randn(8, 150)
    quantized = DynamicQuantizedLinear.from_float(module, int4_dynamic_qconfig.with_group_size(group_size))
    weight = QuantizedTensor(INT4, quantized.weight_int4, quantized.weight_scale, None, 150, group_size)
    real = dequantize(weight).double()
    step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)).double() / 255  # the activations' error: half of it or,
    bound = step * real.abs().sum(1) + 1e-5  # where the zero point's rounding clips an end, a whole one
    expected = x.double() @ real.t() + module.bias.double()
    assert bool(((quantized(x).double() - expected).abs() <= bound).all())
    largest = module.weight.abs().amax(1).double()
    assert bool(((real - module.weight.double()).abs() <= largest[:, None] / 8 * (1 + 8 * 2**-8)).all())


def test_int4_of_an_odd_number_of_inputs_knows_it():
    module = DynamicQuantizedLinear.from_float(nn.Linear(7, 4), int4_dynamic_qconfig)
    assert (module.in_features, module.weight_int4.shape, module(torch.randn(2, 7)).shape) == (7, (4, 4), (2, 4))
    with pytest.raises(ShapeError, match=r"of 7 inputs takes x of shape \(..., 7\), got \(2, 8\)"):
        module(torch.randn(2, 8))


def test_int4_keeps_its_dtypes_and_repr():
    module = DynamicQuantizedLinear.from_float(nn.Linear(100, 4), int4_dynamic_qconfig).double()
    assert (module.weight_int4.dtype, module.weight_scale.dtype) == (torch.uint8, torch.bfloat16)
    assert repr(module) == (
        "DynamicQuantizedLinear(100, 4, bias=True, int4 symmetric per group of 64, activation uint8 affine per token)"
    )


def test_int4_compiles_and_exports():
    model = nn.Sequential(DynamicQuantizedLinear.from_float(nn.Linear(100, 4), int4_dynamic_qconfig))
    x = torch.randn(3, 100)
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), model(x))
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("kind", [nn.Linear, LinearReLU])
def test_int16_is_near_the_float_module(kind):
    module, x = kind(150, 30), torch.randn(8, 150)
    form = DynamicQuantizedLinearReLU if kind is LinearReLU else DynamicQuantizedLinear
    got = form.from_float(module, int16_dynamic_qconfig)(x).double()
    x, weight = x.double(), module.weight.double()
    steps = x.abs().amax(1, keepdim=True) / 32767, weight.abs().amax(1) / 32767
    # half a step of each value, times the other's size, and float32's rounding of scales, sum, product and bias
    bound = 0.51 * (steps[0] * weight.abs().sum(1) + x.abs().sum(1, keepdim=True) * steps[1])
    bound = bound + 8 * 2**-24 * (x.abs() @ weight.abs().t() + 1)
    expected = x @ weight.t() + module.bias.double()
    assert bool(((got - (expected.clamp(min=0) if kind is LinearReLU else expected)).abs() <= bound).all())


def test_int16_keeps_its_dtypes_and_repr():
    module = DynamicQuantizedLinear.from_float(nn.Linear(100, 4), int16_dynamic_qconfig).double()
    assert (module.weight_int16.dtype, module.weight_scale.dtype) == (torch.int16, torch.float32)
    assert module(torch.randn(2, 100).double()).dtype == torch.float64
    assert repr(module) == (
        "DynamicQuantizedLinear(100, 4, bias=True, int16 symmetric per channel, activation int16 symmetric per token)"
    )


def test_int16_compiles_and_exports():
    model = nn.Sequential(DynamicQuantizedLinear.from_float(nn.Linear(100, 4), int16_dynamic_qconfig))
    x = torch.randn(3, 100)
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), model(x))
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
