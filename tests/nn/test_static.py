"""The static Linear and convolutions by themselves."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant import ops
from fxquant.nn.static import StaticQuantizedConv, StaticQuantizedLinear

SCALE, ZERO = torch.tensor(1 / 64), torch.tensor(128, dtype=torch.int32)


def x_of(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(12, 7), (3, 12)),
        (lambda: nn.Linear(12, 7, bias=False), (2, 3, 12)),
        (lambda: nn.Conv1d(4, 6, 3, 2, 1, 2), (2, 4, 11)),
        (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=(1, 2)), (2, 4, 5, 6)),
        (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="replicate"), (2, 4, 5, 6)),
        (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"), (2, 4, 5, 6)),
        (lambda: nn.Conv3d(2, 3, 2, bias=False), (1, 2, 3, 4, 3)),
        (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), (2, 4, 5)),
        (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), (2, 4, 5)),
        (lambda: nn.ConvTranspose2d(6, 6, (3, 2), (2, 1), groups=6, bias=False), (2, 6, 5, 3)),
        (lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), (1, 0), dilation=(1, 2)), (2, 4, 5, 3)),
    ],
)
@torch.no_grad()
def test_outputs_are_those_of_a_float_module_with_the_weights_that_are_stored(make, shape):
    torch.manual_seed(0)
    module, x = make(), x_of(*shape)
    kind = StaticQuantizedLinear if isinstance(module, nn.Linear) else StaticQuantizedConv
    quantized = kind.from_float(module)
    twin = make().double()
    stored = quantized.dequantize("weight").double()
    twin.weight.copy_(stored)
    if module.bias is not None:
        twin.bias.copy_(module.bias)
    got, expected = quantized(x, SCALE, ZERO), twin(ops.dequantize(x, SCALE, ZERO).double())
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), expected, rtol=1e-6, atol=1e-6)
    integers = quantized(x, SCALE, ZERO, SCALE, ZERO)
    assert torch.equal(integers, ops.quantize(got, SCALE, ZERO))


@torch.no_grad()
def test_code_beside_the_graph_calls_it_with_floats():
    torch.manual_seed(0)
    for make, shape in (
        (lambda: nn.Linear(12, 7), (3, 12)),
        (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=(1, 2), groups=2), (2, 4, 5, 6)),
        (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 5, 6)),
        (lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), (1, 0), dilation=(1, 2)), (2, 4, 5, 3)),
        (lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), groups=2), (2, 4, 5, 3)),
    ):
        module, twin, x = make(), make(), torch.randn(shape)
        kind = StaticQuantizedLinear if isinstance(module, nn.Linear) else StaticQuantizedConv
        quantized = kind.from_float(module)
        twin.weight.copy_(quantized.dequantize("weight"))
        twin.bias.copy_(module.bias)
        assert torch.allclose(quantized(x), twin(x), rtol=1e-5, atol=1e-6)
        assert quantized(x.double()).dtype == torch.float64


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "stride", "groups"), [(2, 2, 1), (4, 2, 1), (3, 3, 1), (2, 2, 4)])
def test_a_transposed_convolution_with_a_stride_is_corrected_by_the_taps_that_an_output_meets(kernel, stride, groups):
    torch.manual_seed(0)
    module, twin = (nn.ConvTranspose2d(16, 8, kernel, stride, groups=groups) for _ in range(2))
    quantized = StaticQuantizedConv.from_float(module)
    quantized.correct_bias(module.weight, torch.ones(16).double())
    twin.weight.copy_(quantized.dequantize("weight"))
    twin.bias.copy_(quantized.bias)
    x = torch.ones(1, 16, 9, 9)
    inner = (..., *[slice(2 * kernel, -2 * kernel)] * 2)
    assert (twin(x) - module(x))[inner].mean((0, 2, 3)).abs().max() < 1e-6


@torch.no_grad()
def test_a_constant_input_is_what_a_bias_is_corrected_by():
    torch.manual_seed(0)
    module = nn.ConvTranspose2d(4, 6, 1)
    quantized = StaticQuantizedConv.from_float(module)
    quantized.correct_bias(module.weight, torch.ones(4).double())
    lost = (module.weight - quantized.dequantize("weight")).sum((0, 2, 3))
    assert torch.allclose(quantized.bias, module.bias + lost, atol=1e-6)


def test_print_tells_the_sizes():
    assert "12, 7" in repr(StaticQuantizedLinear.from_float(nn.Linear(12, 7)))
    assert "kernel_size=(3, 3)" in repr(StaticQuantizedConv.from_float(nn.Conv2d(2, 3, 3)))


def test_weights_lie_as_the_kernels_read_them_after_loading_too(tmp_path):
    def model():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4)).eval()

    x = torch.randn(1, 3, 8, 8)
    prepared = fxquant.prepare_fx(model(), fxquant.default_static_qconfig_mapping(), (x,))
    quantized = fxquant.convert_fx(prepared, data=[(x,)])
    strides = [quantized.get_submodule(name).weight_int8.stride() for name in "01"]
    assert strides == [(27, 1, 9, 3), (1, 36, 12, 4)]  # a place's inputs, or depthwise its outputs, beside each other
    fxquant.save(quantized, tmp_path / "q")
    loaded = fxquant.load(model(), tmp_path / "q")
    assert [loaded.get_submodule(name).weight_int8.stride() for name in "01"] == strides
    assert torch.equal(loaded(x), quantized(x))
