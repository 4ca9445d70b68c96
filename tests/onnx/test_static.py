"""Static models as QDQ: what ONNX Runtime fuses, and how far integers are from fxquant's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import ops
from tests.onnx.runtime import Exported

MAPPING = fxquant.default_static_qconfig_mapping()


class Block(nn.Module):
    """A residual block as networks have it, its head, and tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.tokens, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.first(x))
        y = F.relu(self.second(x) + x[:, :4])
        return self.head(F.relu(self.tokens(y.mean((2, 3)))))


class Operators(nn.Module):
    """Each operator on values, called by itself: of two values, two tokens' weights and two images'."""

    def __init__(self):
        super().__init__()
        numbers = {"a": (0.04, 131), "b": (0.05, 120), "out": (0.07, 126), "half": (0.09, 40)}
        for name, (scale, zero_point) in numbers.items():
            self.register_buffer(f"{name}_scale", torch.tensor(scale))
            self.register_buffer(f"{name}_zero", torch.tensor(zero_point, dtype=torch.int32))
        for name, shape in WEIGHTS.items():
            self.register_buffer(name, torch.randint(-127, 128, shape, dtype=torch.int8))
            self.register_buffer(f"{name}_scale", 0.0006 + 0.0004 * torch.rand(8))
        self.register_buffer("table", torch.randperm(256).to(torch.uint8))
        self.register_buffer("tables", torch.randint(256, (8, 256), dtype=torch.uint8))
        self.register_buffer("bias", torch.randn(8))

    def of(self, *names):
        return [part for name in names for part in (getattr(self, f"{name}_scale"), getattr(self, f"{name}_zero"))]

    def forward(self, x, y):
        a, b = ops.quantize(x, *self.of("a")), ops.quantize(y, *self.of("b"), 127)
        pair = (a, *self.of("a"), b, *self.of("b"), *self.of("out"))
        one = (a, *self.of("a"), *self.of("out"))
        line = a.flatten(2)
        moved = {
            "quantize": a,
            "lookup": ops.lookup(a, self.table),
            "lookup_channels": ops.lookup_channels(a, self.tables),
            "pad_value": ops.pad_value(a, self.a_zero, [1, 0, 2, 1]),
            "max_pool_value": ops.max_pool_value(a, [3, 3], [2, 2], [1, 1], [1, 1], True),
        }
        computed = {
            "add_values": ops.add_values(*pair, low=0.0, high=6.0),
            "add_values, -": ops.add_values(*pair, alpha=-1.0, qmax=127),
            "mul_values": ops.mul_values(*pair),
            "mean_value": ops.mean_value(*one, [2, 3]),
            "mean_value, 1": ops.mean_value(*one, [1], True),
            "pool_value": ops.pool_value(*one, [3, 3], [2, 2], [1, 1], True, False),
            "pool_value, divisor": ops.pool_value(*one, [2, 2], [2, 2], [0, 0], divisor=3),
            "adaptive_pool_value": ops.adaptive_pool_value(*one, [3, 2]),
            "resize_value": ops.resize_value(a, [9, 8]),
            "resize_value, corners": ops.resize_value(a, [9, 8], align_corners=True),
            "resize_value, factors": ops.resize_value(line, factors=[2.0]),
            **self.products(a, b),
        }
        real = {"dequantize": ops.dequantize(a, *self.of("a")), **self.floats(a, b)}
        return moved, computed, real

    def products(self, a, b):
        """Return products that give integers."""
        out, tokens = self.of("out"), a.movedim(1, -1)
        more = {"addend": b, **dict(zip(("addend_scale", "addend_zero_point"), self.of("b"), strict=True))}
        square = ([1, 1], [1, 1, 1, 1], [1, 1])
        return {
            "static_linear": ops.static_linear(tokens, *self.of("a"), self.tokens, self.tokens_scale, self.bias, *out),
            "static_convolution": self.convolution(a, "dense", out, *square, low=0.0),
            "static_convolution, depthwise": self.convolution(a, "depthwise", out, [2, 1], [0, 1, 1, 0], [1, 2], 8),
            "static_convolution, transposed": self.convolution(a, "dense", out, [2, 2], [1, 1, 0, 0], [1, 1], 1, True),
            "static_convolution, in groups": self.convolution(a, "halves", out, [2, 2], [1, 1, 1, 1], [1, 1], 2, True),
            "static_convolution, added": self.convolution(a, "dense", self.of("half"), *square, low=0.0, **more),
            "static_convolution, bent": self.convolution(a, "dense", out, *square, curve="hardswish"),
            "static_convolution, bent and added": self.convolution(a, "dense", out, *square, curve="silu", **more),
            "static_convolution, bent and transposed": self.convolution(
                a, "dense", out, [2, 2], [1, 1, 0, 0], [1, 1], 1, True, curve="leaky_relu", slope=0.3
            ),
            "static_linear, bent": ops.static_linear(
                tokens, *self.of("a"), self.tokens, self.tokens_scale, self.bias, *out, curve="leaky_relu", slope=-0.5
            ),
        }

    def floats(self, a, b):
        """Return products that give floats."""
        more = dict(zip(("addend", "addend_scale", "addend_zero_point"), (b, *self.of("b")), strict=True))
        square = ([1, 1], [1, 1, 1, 1], [1, 1])
        return {
            "linear": ops.static_linear(a.movedim(1, -1), *self.of("a"), self.tokens, self.tokens_scale, self.bias),
            "convolution": self.convolution(a, "dense", (None, None), *square, low=-1.0, high=1.0, **more),
            "bent": self.convolution(a, "dense", (None, None), *square, curve="hardswish"),
            "leaky": self.convolution(a, "dense", (None, None), *square, curve="leaky_relu", slope=0.3, **more),
        }

    def convolution(self, x, name, out, stride, padding, dilation, groups=1, is_transposed=False, **more):
        weight, scale = getattr(self, name), getattr(self, f"{name}_scale")
        shape = (stride, padding, dilation, groups, is_transposed, [0, 0] if is_transposed else [])
        return ops.static_convolution(x, *self.of("a"), weight, scale, self.bias, *out, *shape, **more)


WEIGHTS = {"tokens": (8, 8), "dense": (8, 8, 3, 3), "depthwise": (8, 1, 3, 3), "halves": (8, 4, 3, 3)}


def export(model, shape, folder, **options):
    torch.manual_seed(0)
    model, data = model.eval(), [(torch.randn(4, *shape),) for _ in range(3)]
    quantized = fxquant.convert_fx(fxquant.prepare_fx(model, MAPPING, data[0]), data=data)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    options = dict.fromkeys(options, data)
    return model, data, Exported(quantized, data[0], folder / "static.onnx", dynamic_shapes=(batch,), **options)


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    torch.manual_seed(0)
    model, data = Block().eval(), [(torch.randn(4, 4, 12, 12),) for _ in range(3)]
    quantized = fxquant.convert_fx(fxquant.prepare_fx(model, MAPPING, data[0]), data=data)
    batch, path = {0: torch.export.Dim("batch", min=1, max=64)}, tmp_path_factory.mktemp("onnx") / "block.onnx"
    return model, data, Exported(quantized, data[0], path, dynamic_shapes=(batch,), data=data)


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    torch.manual_seed(0)
    model, batch = Operators().eval(), {0: torch.export.Dim("batch", min=1, max=64)}
    path = tmp_path_factory.mktemp("onnx") / "operators.onnx"
    return Exported(model, values(2), path, dynamic_shapes=(batch, batch))


def values(batch):
    return torch.randn(batch, 8, 12, 10), torch.randn(batch, 8, 12, 10)


def test_the_runtime_fuses_every_product_and_sum(block):
    names = block[2].operators(optimized=True)
    assert sum("QLinearConv" in name for name in names) == 2
    assert sum("QLinearAdd" in name for name in names) == 1
    assert sum("QGemm" in name for name in names) == 1
    assert not {"Conv", "Gemm"} & set(names)


def test_the_file_is_as_near_to_float_as_the_model(block):
    model, data, exported = block
    with torch.no_grad():
        expected = model(*data[1])
    (ours, theirs), *_ = exported.both(*data[1])
    noise = [float((y - expected).square().mean()) for y in (ours, theirs)]
    assert noise[1] < 2 * noise[0]  # the product that something is added to is rounded once more


def test_every_operator_on_values_agrees(operators):
    x = values(3)
    moved, computed, real = operators.quantized(*x)
    names = [*moved, *computed, *real]
    results = dict(zip(names, (got for _, got in operators.both(*x)), strict=True))
    for name, expected in (moved | real).items():
        assert torch.equal(expected, results[name]), name
    for name, expected in computed.items():  # a bias is rounded to a step of the sums; x / s is not x (1 / s)
        difference = (expected.int() - results[name].int()).abs()
        most = 2 if "added" in name or "bent" in name else 1  # the product is rounded before
        assert int(difference.max()) <= most, name
        assert most == 2 or float((difference > 0).float().mean()) < 0.05, name


class Bent(nn.Module):
    """Layers with each curve after them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.tokens, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.hardswish(self.first(x))
        x = F.silu(self.second(x))
        return self.head(F.leaky_relu(self.tokens(x.mean((2, 3))), 0.2))


def test_products_with_a_curve_stay_integer_and_are_near_the_model(tmp_path):
    torch.manual_seed(0)
    model, data, exported = export(Bent(), (4, 12, 12), tmp_path, data=True)
    names = exported.operators(optimized=True)
    assert sum("QLinearConv" in name for name in names) == 2
    assert sum("QGemm" in name for name in names) == 1
    assert not {"Conv", "Gemm", "Gather"} & set(names)
    with torch.no_grad():
        expected = model(*data[1])
    (ours, theirs), *_ = exported.both(*data[1])
    noise = [float((y - expected).square().mean()) for y in (ours, theirs)]
    assert noise[1] < 6 * noise[0]  # one more rounding each, of a wider range
