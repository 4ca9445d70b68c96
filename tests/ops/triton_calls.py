"""A call or more for each of Triton's kernels, of shapes that models have: those that are compiled ahead in tests."""

import torch

from fxquant.formats import format_of
from tests.ops.operands import recurrent_call


def _values(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def _qparams(scale, zero_point):
    return torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)


def product(weight_format, outputs, columns, group_size=0):
    """Return (weight, scale), random ones, and (format, group_size, in_features)."""
    low, high = weight_format.limits
    weight = weight_format.pack(torch.randint(low, high + 1, (outputs, columns)).to(torch.int16))
    weight = weight.to(weight_format.storage)
    scale = torch.randn(weight_format.scale_shape(outputs, columns, group_size)).to(weight_format.scale) * 0.1
    return (weight, scale), (weight_format.name, group_size, columns)


def calls():
    """Yield (operator, its arguments)."""
    one, other, total = _qparams(0.05, 120), _qparams(0.08, 17), _qparams(0.11, 70)
    yield "quantize", (torch.randn(3, 50), *one)
    yield "quantize", (torch.randn(3, 50).half(), *one)
    yield "dequantize", (_values(3, 50), *one)
    yield "lookup", (_values(3, 50), _values(256))
    yield "add_values", (_values(3, 50), *one, _values(3, 50), *other, *total)
    yield "add_values", (_values(3, 50), *one, _values(3, 50), *other, *total, 255, -1.0, 0.0, 6.0)
    yield "mul_values", (_values(3, 50), *one, _values(3, 50), *other, *total)
    for name, tokens, group_size in (
        ("int8", 1, 0),
        ("int8", 256, 0),
        ("int4", 1, 128),
        ("int4", 256, 64),
        ("int3", 9, 64),
        ("int16", 9, 0),
    ):
        operands, end = product(format_of(name), 512, 1024, group_size)
        yield "linear", (torch.randn(tokens, 1024), *operands, torch.randn(512), True, True, 255, *end)
    operands, end = product(format_of("int8"), 512, 1000)
    yield "linear", (torch.randn(3, 1000).bfloat16(), *operands, None, False, False, 127, *end)  # one scale for all
    weight, scales = torch.randint(-127, 128, (64, 128, 3, 3), dtype=torch.int8), torch.rand(64) / 99
    image = _values(1, 128, 14, 14).to(memory_format=torch.channels_last)
    same = ([1, 1], [1] * 4, [1, 1])

    ending = (1, False, [], None, None, None, 255, None, None, "silu")
    yield "static_convolution", (image, *one, weight, scales, torch.randn(64), *total, *same, *ending)
    yield "static_linear", (_values(3, 128), *one, weight[:, :, 0, 0].contiguous(), scales)
    table = (torch.randint(16, (20, 96), dtype=torch.uint8), torch.rand(20), torch.rand(20))
    yield "embedding", (torch.randint(20, (3, 2)), *table, 192, "uint4")
    yield "embedding_bag", (torch.randint(20, (3, 2)), *table, 192, None, "mean", None, False, None, "uint4")
    bags, weights = torch.tensor([0, 2, 5], dtype=torch.int32), torch.rand(6)
    yield "embedding_bag", (torch.randint(20, (6,)), *table, 192, bags, "sum", weights, True, 3, "uint4")
    yield "embedding_bag", (torch.randint(20, (6,)), *table, 192, bags, "max", None, False, None, "uint4")


def recurrent_calls():
    """Yield calls of recurrent layers: each kind and format, batches that are packed, large, and projected."""

    def call(*args, **kwargs):
        name, *arguments = recurrent_call(*args, **kwargs)
        return name, arguments

    yield call("lstm", hidden=256, steps=3)
    yield call("lstm", hidden=256, steps=3, batch=256)
    yield call("lstm", ("int8", "int8", "int4"), hidden=256, proj=128, both=True, packed=[3, 2])
    yield call("gru", hidden=256, steps=1)
    for kind, name in (("gru", "int16"), ("rnn_tanh", "int3"), ("rnn_relu", "int4")):
        yield call(kind, ("int8", name), hidden=128, packed=[3, 2])
