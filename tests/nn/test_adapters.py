"""Gradients pass through quantized products, straight through their dequantized weights, and adapters train on them."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import ModelStateError, QConfigMapping, convert_fx, prepare_fx, quantize_dynamic
from fxquant.nn import DynamicQuantizedConv, DynamicQuantizedLinear
from fxquant.numerics import QuantizedTensor, dequantize
from tests.samples import Call, CallWithBias, quantize

SCHEMES = {
    "int8": fxquant.default_dynamic_qconfig,
    "int16": fxquant.int16_dynamic_qconfig,
    "int4": fxquant.int4_dynamic_qconfig,
    "float16": fxquant.float16_dynamic_qconfig,
}


def real_weight(layer, weight="weight"):
    """Return the float weight that a quantized product computes with, from the buffers."""
    own = {name: tensor for name, tensor in layer._buffers.items() if name.startswith(weight)}
    scale, zero_point = own.pop(f"{weight}_scale"), own.pop(f"{weight}_zero_point", None)
    (values,) = own.values()
    spec, columns = layer.qconfig.weight, layer._stored[weight].columns
    return dequantize(QuantizedTensor(spec.format, values, scale, zero_point, columns, spec.group_size or 0))


def gradients(function, *operands):
    """Return the operands' gradients for a loss that weighs each output otherwise."""
    operands = [operand.detach().requires_grad_() for operand in operands]
    y = function(*operands)
    (y * torch.arange(1, y.numel() + 1).reshape(y.shape) / y.numel()).sum().backward()
    return [operand.grad for operand in operands]


def close(got, expected, sums):
    """Assert that two gradients differ by no more than the rounding of so many additions."""
    assert got.dtype == expected.dtype
    torch.testing.assert_close(
        got, expected, rtol=0, atol=sums * torch.finfo(got.dtype).eps * expected.abs().max().item()
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("has_relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_gradient_is_that_of_a_float_layer_of_the_dequantized_weight(scheme, has_relu, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 24), *[nn.ReLU()] * has_relu).eval()
    x = torch.randn(2, 5, 48).to(dtype)
    quantized = convert_fx(prepare_fx(model, QConfigMapping().set_global(SCHEMES[scheme]), x.float()))
    layer = quantized.get_submodule("0")
    weight, bias = real_weight(layer).to(dtype), layer.bias.detach().to(dtype)
    layer.bias.data = bias
    mask = (quantized(x) > 0).to(dtype) if has_relu else 1  # of the rounded sums, as the layer's own outputs are
    (expected,) = gradients(lambda x: F.linear(x, weight, bias) * mask, x)
    (got,) = gradients(quantized, x)
    close(got, expected, sums=24)


def test_an_odd_number_of_int4_columns_has_its_gradient():
    layer = DynamicQuantizedLinear.from_float(nn.Linear(7, 6), SCHEMES["int4"])
    weight = real_weight(layer)
    assert weight.shape == (6, 7)
    x = torch.randn(3, 7)
    (expected,), (got,) = gradients(lambda x: F.linear(x, weight), x), gradients(layer, x)
    close(got, expected, sums=6)


def test_a_gradient_in_bfloat16_is_rounded_once():
    layer, x = DynamicQuantizedLinear.from_float(nn.Linear(48, 24, bias=False)), torch.randn(40, 48).bfloat16()
    grad = torch.randn(40, 24).bfloat16()
    x.requires_grad_()
    layer(x).backward(grad)
    expected = grad.double() @ real_weight(layer).double()
    bound = torch.finfo(torch.bfloat16).eps / 2 * expected.abs() + 24 * torch.finfo(torch.float32).eps * (
        grad.double().abs() @ real_weight(layer).double().abs()
    )
    assert ((x.grad.double() - expected).abs() <= bound).all()


def test_a_bias_that_trains_alone_dequantizes_nothing(monkeypatch):
    layer = quantize_dynamic(nn.Sequential(nn.Linear(8, 3)).eval())[0]
    layer.bias.requires_grad_()
    monkeypatch.setattr(importlib.import_module("fxquant.ops.linear"), "dequantize", None)
    layer(torch.randn(4, 8)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((3,), 4.0))


def test_a_bias_may_train_and_is_frozen_by_itself():
    layer = quantize_dynamic(nn.Sequential(nn.Linear(8, 3)).eval())[0]
    x = torch.randn(4, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.bias.grad is None
    layer.bias.requires_grad_()
    layer(torch.randn(4, 8)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((3,), 4.0))
    layer.bias.grad = None
    layer(torch.randn(8)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.ones(3))


@pytest.mark.parametrize("form", [F.linear, torch.matmul, torch.addmm], ids=lambda form: form.__name__)
def test_calls_hand_the_gradient_on(form):
    torch.manual_seed(0)
    x = torch.randn(5, 16)
    model = (
        CallWithBias(form, 16, 8) if form is torch.addmm else Call(form, *((8, 16) if form is F.linear else (16, 8)))
    )
    quantized = quantize(model, x)
    scale = next(t for name, t in quantized.named_buffers() if name.endswith("_scale"))
    values = next(t for name, t in quantized.named_buffers() if name.endswith("_int8"))
    (got,) = gradients(quantized, x)
    (expected,) = gradients(lambda x: x @ (values * scale[:, None]).t(), x)
    close(got, expected, sums=8)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "channels_last"])
def test_a_convolution_hands_the_gradient_on(kind):
    torch.manual_seed(0)
    options = {"padding": 2, "padding_mode": "circular"}
    if kind == "conv1d":
        model, x = nn.Conv1d(32, 96, 25, **options).eval(), torch.randn(2, 32, 30)
    else:
        model, x = nn.Conv2d(32, 96, 5, stride=2, **options).eval(), torch.randn(2, 32, 9, 8)
    x = x.contiguous(memory_format=torch.channels_last) if kind == "channels_last" else x
    quantized = quantize_dynamic(nn.Sequential(model))[0]
    assert isinstance(quantized, DynamicQuantizedConv)
    twin = copy.deepcopy(model)
    windows = real_weight(quantized).view(96, *reversed(model.kernel_size), 32)
    twin.weight.data = windows.transpose(1, -1)
    (expected,), (got,) = gradients(twin, x), gradients(quantized, x)
    close(got, expected, sums=96 * 25)


def test_attention_hands_the_gradient_on():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    quantized = quantize_dynamic(nn.Sequential(model))[0]
    twin, x = copy.deepcopy(model), torch.randn(2, 6, 32)
    twin.in_proj_weight.data = real_weight(quantized, "in_proj_weight")
    twin.out_proj.weight.data = real_weight(quantized.out_proj)
    (expected,), (got,) = gradients(lambda x: twin(x, x, x)[0], x), gradients(lambda x: quantized(x, x, x)[0], x)
    # softmax(Q Kᵀ) V is computed from rounded activations, of 1/255 of a row's range each.
    assert (got - expected).norm() <= 0.02 * expected.norm()


def test_gradients_pass_a_whole_graph_to_adapters_before_and_beside():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    torch.manual_seed(0)
    base = quantize_dynamic(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).eval())
    model, x = nn.Sequential(Adapted(base[0]), base[1], Adapted(base[2])), torch.randn(64, 16)
    wanted, before = torch.randn(64, 16) * 0.1, copy.deepcopy(base.state_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, 0.01), []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(F.mse_loss(model(x), wanted))
        losses[-1].backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
    assert len(trained) == 4
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_compiler_sees_the_gradient():
    layer, x = quantize_dynamic(nn.Sequential(nn.Linear(8, 3)).eval()), torch.randn(4, 8)
    compiled = torch.compile(layer, backend="aot_eager")
    (expected,), (got,) = gradients(layer, x), gradients(compiled, x)
    assert torch.equal(got, expected)


def test_a_quantized_linear_is_a_linear_to_who_asks():
    layer = quantize_dynamic(nn.Sequential(nn.Linear(8, 3)).eval())[0]
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (8, 3)
    assert not isinstance(quantize_dynamic(nn.Sequential(nn.Conv1d(64, 64, 65)).eval())[0], nn.Linear)
    with pytest.raises(
        ModelStateError, match="weights of a quantized DynamicQuantizedLinear cannot be reset; initialize the float"
    ):
        layer.reset_parameters()


@pytest.mark.parametrize("scheme", ["int8", "float16"])
def test_who_would_train_the_integers_is_told(scheme):
    layer = DynamicQuantizedLinear.from_float(nn.Linear(8, 3), SCHEMES[scheme])
    values, scale = getattr(layer, f"weight_{scheme}"), layer.weight_scale
    (values if scale is None else scale).requires_grad_()
    with pytest.raises(ModelStateError, match="a gradient came back to the weight of a quantized linear: integers and"):
        layer(torch.randn(2, 8, requires_grad=True)).sum().backward()
