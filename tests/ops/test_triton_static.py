"""Triton's kernel of the static products gives the references' bits."""

import pytest
import torch

from fxquant.ops.elementwise import CURVES
from tests.ops.kernels_on_gpu import USES_KERNELS, check, run_triton, triton_kernels  # noqa: F401
from tests.ops.operands import random_int8

pytestmark = USES_KERNELS
IN = torch.tensor(0.021), torch.tensor(120, dtype=torch.int32)
OUT = torch.tensor(0.6), torch.tensor(101, dtype=torch.int32)
ADDEND = torch.tensor(0.31), torch.tensor(17, dtype=torch.int32)
FLOAT = (None, None)
ENDINGS = {
    "float": {},
    "uint8": {"scale": OUT[0], "zero_point": OUT[1]},
    "7 bits, ReLU6": {"scale": OUT[0], "zero_point": OUT[1], "qmax": 127, "low": 0.0, "high": 6.0},
    "float, ReLU": {"low": 0.0},
    "leaky ReLU": {"scale": OUT[0], "zero_point": OUT[1], "curve": "leaky_relu", "slope": 0.01},
    "hardswish": {"curve": "hardswish"},
    "SiLU": {"curve": "silu"},
    "SiLU, uint8": {"scale": OUT[0], "zero_point": OUT[1], "curve": "silu"},
}


def values(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def scales(outputs):
    return torch.rand(outputs) / 99


@pytest.mark.parametrize(("tokens", "outputs", "columns"), [(1, 1, 1), (3, 37, 70), (33, 20, 128)])
def test_linear(tokens, outputs, columns):
    operands = values(tokens, columns), *IN, random_int8(outputs, columns), scales(outputs)
    check("static_linear", *operands, torch.randn(outputs), *OUT)
    check("static_linear", *operands)


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("has_addend", [False, True])
def test_endings(ending, has_addend):
    x, weight = values(2, 3, 40), random_int8(20, 40)
    addend = dict(zip(("addend", "addend_scale", "addend_zero_point"), (values(2, 3, 20), *ADDEND), strict=True))
    check("static_linear", x, *IN, weight, scales(20), torch.randn(20), **ending, **(addend if has_addend else {}))


def test_nan_in_a_bias():
    bias = torch.tensor([torch.nan, 1.0, torch.inf, -torch.inf])
    operands = values(2, 8), *IN, random_int8(4, 8), scales(4), bias
    check("static_linear", *operands, *OUT, low=0.0)
    check("static_linear", *operands, low=-1.0, high=1.0)
    for curve in CURVES:
        check("static_linear", *operands, curve=curve, slope=0.1)


def test_sums_at_the_ends_of_their_range():
    for q, z in ((0, 255), (255, 0)):
        x, zero_point = torch.full((1, 384), q, dtype=torch.uint8), torch.tensor(z, dtype=torch.int32)
        weight = torch.tensor([-128, 127], dtype=torch.int8).unsqueeze(1).expand(2, 384)
        check("static_linear", x, IN[0], zero_point, weight, scales(2))


WINDOWS = [  # channels, outputs, (height, width), kernel, stride, padding before and after, dilation
    (3, 5, (7, 6), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    (64, 20, (5, 4), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    (16, 33, (6, 8), (3, 2), (1, 2), (0, 1, 2, 0), (2, 3)),
    (70, 7, (4, 4), (4, 4), (1, 1), (0, 0, 0, 0), (1, 1)),
]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_convolution(window, memory_format):
    channels, outputs, size, kernel, stride, padding, dilation = window
    x = values(2, channels, *size).to(memory_format=memory_format)
    weight = random_int8(outputs, channels, *kernel)
    options = (list(stride), list(padding), list(dilation))
    check("static_convolution", x, *IN, weight, scales(outputs), torch.randn(outputs), *OUT, *options)


def test_convolution_with_an_addend():
    x, weight = values(1, 8, 5, 5), random_int8(6, 8, 3, 3).to(memory_format=torch.channels_last)
    same = ([1, 1], [1] * 4, [1, 1])
    operands = (x, *IN, weight, scales(6), None, *OUT, *same)
    check("static_convolution", *operands, addend=values(1, 6, 5, 5), addend_scale=ADDEND[0],
          addend_zero_point=ADDEND[1], low=0.0)  # fmt: skip


def test_what_is_the_references():
    x, weight, same = values(1, 8, 5, 5), random_int8(8, 4, 3, 3), ([1, 1], [1] * 4, [1, 1])
    assert run_triton("static_convolution", x, *IN, weight, scales(8), None, *OUT, *same, 2) is None
    whole = random_int8(8, 8, 3, 3)
    assert run_triton("static_convolution", x, *IN, whole, scales(8), None, *OUT, *same, 1, True, [0, 0]) is None
    line = values(1, 8, 5)
    assert run_triton("static_convolution", line, *IN, whole[..., 0], scales(8), None, *OUT, [1], [1, 1], [1]) is None
    double = torch.tensor(0.5, dtype=torch.float64), IN[1]
    assert run_triton("static_linear", values(2, 8), *double, random_int8(4, 8), scales(4)) is None
