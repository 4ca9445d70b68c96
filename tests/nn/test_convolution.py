"""DynamicQuantizedConv: a Linear of windows, each of them a row of its own."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import DTypeError, ShapeError, ops, per_tensor_dynamic_qconfig
from fxquant.nn import ConvReLU1d, ConvReLU2d, DynamicQuantizedConv
from fxquant.nn import DynamicQuantizedConvReLU as WithReLU
from fxquant.ops import library
from tests.native.cases import kernels
from tests.ops import reference

CONV2D = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "bias": False},
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "padding": (2, 1), "stride": (1, 2)},
    {"kernel_size": (1, 4), "padding": (0, 3), "stride": (3, 1)},
    {"kernel_size": (4, 1), "dilation": (2, 3), "padding": 3},
    {"kernel_size": 2, "dilation": 2, "stride": 2},
    {"kernel_size": (2, 3), "padding": "same"},
    {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "valid"},
    *({"kernel_size": 3, "padding": (1, 2), "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
]
CONV1D = [
    {name: given if isinstance(given, str | bool) else (given if isinstance(given, int) else given[1])
     for name, given in options.items()}
    for options in CONV2D
]  # fmt: skip
CASES = [(nn.Conv1d, options, (3, 6, 11)) for options in CONV1D] + [
    (nn.Conv2d, options, (3, 6, 9, 11)) for options in CONV2D
]
ignores_copies = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def expect(module, x, relu=False):
    """Return the convolution of x (B, I, H, W) by docs/numerics.md, from torch's own windows, in its own order."""
    mode = {"zeros": "constant"}.get(module.padding_mode, module.padding_mode)
    if isinstance(module.padding, str):
        sides = [
            (size - 1) * (step if module.padding == "same" else 0)
            for size, step in zip(module.kernel_size, module.dilation, strict=True)
        ]
        pads = [part for side in reversed(sides) for part in (side // 2, side - side // 2)]
    else:
        pads = [side for side in reversed(module.padding) for _ in range(2)]
    padded = F.pad(x, pads, mode)
    spans = [(size - 1) * step + 1 for size, step in zip(module.kernel_size, module.dilation, strict=True)]
    height, width = ((padded.shape[2 + i] - spans[i]) // module.stride[i] + 1 for i in range(2))
    columns = F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)  # (B, I kh kw, positions)
    low, high = columns.amin(1, True).clamp(max=0), columns.amax(1, True).clamp(min=0)
    scale = (high * 0.5 - low * 0.5) / 127.5
    scale = torch.where(scale == 0, 1.0, scale)  # a window of padding alone
    zero = (-low * (1 / scale)).round().clamp(0, 255)
    q = ((columns * (1 / scale)).round() + zero).clamp(0, 255)
    weight = module.weight.detach().flatten(1)
    steps = weight.abs().amax(1, True) / 127
    sums = (weight * (1 / steps)).round().clamp(-127, 127).double() @ (q - zero).double()
    y = sums.float() * (scale * steps) + (0 if module.bias is None else module.bias.detach()[:, None])
    return (y.clamp(min=0) if relu else y).unflatten(-1, (height, width))


def as_2d(module, x):
    """Return a Conv1d and its input as a Conv2d of height 1."""
    if len(module.kernel_size) == 2:
        return module, x
    wide = nn.Conv2d(1, 1, 1, padding_mode=module.padding_mode)
    wide.weight, wide.bias = nn.Parameter(module.weight.unsqueeze(2)), module.bias
    for name, alone in (("kernel_size", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
        given = getattr(module, name)
        setattr(wide, name, given if isinstance(given, str) else (alone, *given))
    return wide, x.unsqueeze(2)


@ignores_copies
@pytest.mark.parametrize(("kind", "options", "shape"), CASES, ids=str)
def test_it_gives_the_bits_of_the_equations(kind, options, shape):
    module, x = kind(6, 5, **options), torch.randn(shape)
    got = DynamicQuantizedConv.from_float(module)(x)
    expected = expect(*as_2d(module, x))
    assert torch.equal(got, expected.squeeze(2) if kind is nn.Conv1d else expected)


@ignores_copies
@pytest.mark.parametrize(("kind", "options", "shape"), CASES, ids=str)
def test_shapes_and_layout_are_the_float_modules(kind, options, shape):
    module = kind(6, 5, **options)
    quantized = DynamicQuantizedConv.from_float(module)
    for x in (torch.randn(shape), torch.randn(shape)[:0]):
        got, expected = quantized(x), module(x)
        assert got.shape == expected.shape
        assert got.is_contiguous()
    alone = torch.randn(shape[1:])
    assert torch.equal(quantized(alone), quantized(alone.unsqueeze(0))[0])


@pytest.mark.parametrize("shape", [(3, 24, 5, 7), (1, 24, 5, 1), (3, 24, 1, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"kernel_size": 3, "padding": 1}])
def test_channels_last_stay_last(shape, options):
    module = nn.Conv2d(24, 12, **{"kernel_size": 1, **options})
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    quantized = DynamicQuantizedConv.from_float(module)
    got = quantized(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert got.permute(0, 2, 3, 1).view(-1, 12).shape == module(x).permute(0, 2, 3, 1).view(-1, 12).shape
    assert torch.equal(got, quantized(x.contiguous()))


@pytest.mark.parametrize("options", [{"kernel_size": 3}, {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 2}])
def test_a_position_depends_on_its_window_alone(options):
    module = nn.Conv2d(6, 5, **options)
    quantized, x = DynamicQuantizedConv.from_float(module), torch.randn(2, 6, 9, 11)
    y = quantized(x)
    for row, column in itertools.product(range(0, 9, 4), range(0, 11, 5)):
        other = x.clone()
        other[0, :, row, column] = 1e6 * torch.randn(6)
        sees = F.conv2d((other != x).float(), torch.ones_like(module.weight), None, *quantized_how(module))[0, 0] > 0
        changed = (quantized(other) != y).any(1)
        assert torch.equal(changed[0], sees)
        assert not changed[1].any()


def quantized_how(module):
    return module.stride, module.padding, module.dilation


def test_windows_along_the_width_take_no_memory():
    module, x = DynamicQuantizedConv.from_float(nn.Conv1d(6, 5, 9)), torch.randn(2, 6, 40)
    windows = module._windows(x)
    assert windows.shape == (2, 32, 54)
    assert windows.untyped_storage().nbytes() == x.nbytes
    images = DynamicQuantizedConv.from_float(nn.Conv2d(6, 5, (3, 9)))._windows(torch.randn(2, 6, 12, 40))
    assert images.untyped_storage().nbytes() == 3 * 2 * 6 * 10 * 40 * 4


@pytest.mark.skipif(not library.available(), reason="no native library")
def test_the_library_reads_windows_as_they_lie():
    module = DynamicQuantizedConv.from_float(nn.Conv1d(6, 5, 9))
    windows = module._windows(torch.randn(2, 6, 40))
    given = module.own(("weight_int8", "weight_scale", "bias"))
    got = library._library.linear(True, windows, *given, False, True, 255, "int8", 0, 0)
    assert torch.equal(got, reference.linear(windows, *given))


def test_channels_last_input_is_not_copied():
    module = DynamicQuantizedConv.from_float(nn.Conv1d(6, 5, 9))
    x = torch.randn(2, 40, 6)
    assert module._windows(x.transpose(1, 2)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize(("kind", "shape"), [(ConvReLU1d, (3, 24, 7)), (ConvReLU2d, (3, 24, 7, 6))])
def test_relu_is_applied_after_the_bias(kind, shape):
    module, x = kind(24, 12, 3), torch.randn(shape)
    plain = DynamicQuantizedConv.from_float(module)(x)
    assert torch.equal(WithReLU.from_float(module)(x), plain.clamp(min=0))
    assert plain.min() < 0


def test_one_scale_a_tensor_measures_it_whole():
    module, x = nn.Conv1d(6, 5, 3), torch.randn(2, 6, 9)
    quantized = DynamicQuantizedConv.from_float(module, per_tensor_dynamic_qconfig)
    other = x.clone()
    other[1, 0, 8] = 1e6
    assert not torch.equal(quantized(other)[0], quantized(x)[0])
    error = (quantized(x) - module(x)).detach().norm()
    assert error <= 0.03 * module(x).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_output_has_the_inputs_dtype(dtype):
    quantized = DynamicQuantizedConv.from_float(nn.Conv1d(6, 5, 3))
    x = torch.randn(2, 6, 9).to(dtype)
    assert torch.equal(quantized(x), quantized(x.float()).to(dtype))


def test_a_convolution_recognizes_as_the_float_one():
    """Signal over error of a small network: three layers whose 8-bit steps give some 40 dB each."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 8, 5)
    )
    quantized = nn.Sequential(*(DynamicQuantizedConv.from_float(m) if isinstance(m, nn.Conv2d) else m for m in model))
    x = torch.randn(4, 3, 20, 20)
    expected = model(x)
    assert 10 * torch.log10(expected.square().sum() / (quantized(x) - expected).square().sum()) > 33


@pytest.mark.parametrize("shape", [(24,), (3, 7, 24), (23, 7), (1, 3, 24, 7)])
def test_another_shape_is_refused(shape):
    module = DynamicQuantizedConv.from_float(nn.Conv1d(24, 12, 1))
    with pytest.raises(ShapeError, match="Conv1d of 24 channels takes 2-D or 3-D input with 24 in dimension -2, got"):
        module(torch.randn(shape))


@pytest.mark.parametrize(
    ("module", "shape", "told"),
    [
        (nn.Conv1d(4, 3, 3, dilation=2, padding=1), (2, 4, 2), r"spans \(5,\) .* got \(2, 4, 2\), padded to \(4,\)"),
        (nn.Conv2d(4, 3, (3, 1)), (4, 2, 9), r"spans \(3, 1\) .* got \(1, 4, 2, 9\), padded to \(2, 9\)"),
    ],
)
def test_an_input_smaller_than_the_kernel_is_refused(module, shape, told):
    with pytest.raises(ShapeError, match=told):
        DynamicQuantizedConv.from_float(module)(torch.randn(shape))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        module(torch.randn(shape))


def test_integers_are_refused():
    module = DynamicQuantizedConv.from_float(nn.Conv1d(24, 12, 1))
    with pytest.raises(DTypeError, match=r"takes a float tensor, got torch\.int64"):
        module(torch.zeros(24, 7, dtype=torch.int64))


def test_it_prints_what_it_is():
    module = DynamicQuantizedConv.from_float(nn.Conv2d(24, 12, (3, 5), padding="same"))
    assert str(module) == (
        "DynamicQuantizedConv(24, 12, kernel_size=(3, 5), stride=(1, 1), padding=(2, 2, 1, 1), dilation=(1, 1), "
        "padding_mode=zeros, bias=True, int8 symmetric per channel, activation uint8 affine per token)"
    )


@pytest.mark.skipif(not library.available(), reason="no native library")
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 40, 70), (2, 33, 31), (1, 100, 64), (0, 20, 20), (1, 257, 16)])
def test_the_library_swaps_rows_and_columns(shape):
    x = torch.randn(shape)
    for threads in (1, 3):
        with kernels(library.kernel_info().isa, threads):
            got = library._library.transpose(True, x)
        assert torch.equal(got, x.transpose(1, 2))
        assert got.is_contiguous()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :15],
        lambda x: x.double(),
        lambda x: x[0],
        lambda x: x.transpose(1, 2),
        lambda x: x.requires_grad_(),
    ],
)
def test_what_the_library_does_not_swap_torch_does(change):
    x = change(torch.randn(2, 20, 30))
    if library.available():
        assert library._library.transpose(True, x) is None
    if x.dim() == 3:
        assert torch.equal(ops.transpose(x), x.transpose(1, 2))
        assert ops.transpose(x).is_contiguous()


@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, (9,)), (nn.Conv2d, (8, 9))])
def test_it_exports_with_a_dynamic_batch(kind, size):
    quantized = DynamicQuantizedConv.from_float(kind(4, 6, 3, padding=1))
    x = torch.randn(2, 4, *size)
    exported = torch.export.export(quantized, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    x = torch.randn(5, 4, *size)
    assert torch.equal(exported(x), quantized(x))


def test_the_output_of_a_permuted_image_can_be_viewed_as_floats():
    module = nn.Conv2d(3, 6, 3)
    image = torch.randn(8, 9, 3).permute(2, 0, 1).unsqueeze(0)
    quantized = DynamicQuantizedConv.from_float(module)(image)
    assert quantized.is_contiguous() == module(image).is_contiguous()


@pytest.mark.parametrize(("change", "told"), [(torch.Tensor.to_sparse, "sparse"), (torch.Tensor.tolist, "list")])
def test_it_refuses_what_is_no_dense_tensor(change, told):
    with pytest.raises(DTypeError, match=f"a quantized Conv1d takes a .*{told}"):
        DynamicQuantizedConv.from_float(nn.Conv1d(4, 6, 3))(change(torch.randn(2, 4, 9)))


@pytest.mark.parametrize(("mode", "least"), [("reflect", "(3, 4)"), ("circular", "(2, 3)"), ("replicate", "(1, 1)")])
def test_padding_wider_than_the_input_is_an_error_in_the_layers_words(mode, least):
    conv = nn.Conv2d(4, 8, 3, padding=(2, 3), padding_mode=mode)
    quantized = DynamicQuantizedConv.from_float(conv)
    height, width = map(int, least.strip("()").split(", "))
    assert quantized(torch.randn(2, 4, height, width)).shape == conv(torch.randn(2, 4, height, width)).shape
    for shape in ((2, 4, height - 1, width), (4, height, width - 1)):
        with pytest.raises(
            ShapeError, match=rf"'{mode}' and a padding of \(\(2, 2\), \(3, 3\)\).* {re.escape(least)} positions, got"
        ):
            quantized(torch.randn(shape))
        with pytest.raises(RuntimeError):  # as torch does
            conv(torch.randn(shape))
