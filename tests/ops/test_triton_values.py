"""Triton's kernels of integer values give the references' bits."""

import pytest
import torch

from tests.ops.kernels_on_gpu import USES_KERNELS, check, run_triton, triton_kernels  # noqa: F401

pytestmark = USES_KERNELS
ONE = torch.tensor(0.05), torch.tensor(120, dtype=torch.int32)
OTHER = torch.tensor(0.083), torch.tensor(17, dtype=torch.int32)
SUM = torch.tensor(0.11), torch.tensor(70, dtype=torch.int32)


def values(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_quantize(dtype):
    x = torch.randn(3, 50).to(dtype) * 9
    x[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.125])
    q = check("quantize", x, *ONE)
    assert q[0, :3].tolist() == [120, 255, 0]


@pytest.mark.parametrize("qmax", [255, 127, 15])
def test_quantize_rounds_half_to_even_and_clamps(qmax):
    halves = torch.arange(-300, 300) * 0.5 + 0.0
    check("quantize", halves, torch.tensor(1.0), torch.tensor(7, dtype=torch.int32), qmax)


def test_every_value_is_dequantized():
    check("dequantize", torch.arange(256, dtype=torch.uint8), *OTHER)


def test_more_than_a_block_and_nothing_at_all():
    check("quantize", torch.randn(1025), *ONE)
    check("quantize", torch.empty(0, 3), *ONE)


@pytest.mark.parametrize("lay", [
    lambda x: x.to(memory_format=torch.channels_last),
    lambda x: x.transpose(0, 3),
    lambda x: x[:, ::2],
    lambda x: x[:, :, :1].expand(-1, -1, 4, -1),
], ids=["channels_last", "transposed", "strided", "expanded"])  # fmt: skip
def test_results_lie_as_the_references(lay):
    x = lay(torch.randn(2, 6, 3, 5))
    q = lay(values(2, 6, 3, 5))
    check("quantize", x, *ONE)
    check("dequantize", q, *ONE)
    check("lookup", q, values(256))


def test_lookup():
    check("lookup", torch.arange(256, dtype=torch.uint8), values(256))


@pytest.mark.parametrize("alpha", [1.0, -1.0])
@pytest.mark.parametrize("bounds", [(None, None), (0.0, None), (-1.5, 2.5)])
def test_add_values(alpha, bounds):
    check("add_values", values(3, 70), *ONE, values(3, 70), *OTHER, *SUM, 255, alpha, *bounds)


@pytest.mark.parametrize("bounds", [(None, None), (0.0, 6.0)])
def test_mul_values(bounds):
    a = values(2, 3, 4, 5).to(memory_format=torch.channels_last)
    check("mul_values", a, *ONE, a.clone(), *OTHER, *SUM, 127, *bounds)


def test_pairs_that_lie_otherwise_are_the_references():
    a, b = values(2, 3, 4, 5), values(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert run_triton("add_values", a, *ONE, b, *OTHER, *SUM) is None
    assert run_triton("add_values", a, *ONE, a[:, :1], *OTHER, *SUM) is None


def test_a_scale_of_another_dtype_is_the_references():
    assert run_triton("dequantize", values(3), torch.tensor(0.5, dtype=torch.float64), ONE[1]) is None
