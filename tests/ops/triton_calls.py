"""A call or more for each of Triton's kernels, of shapes that models have: those that are compiled ahead in tests."""

import torch


def _values(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def _qparams(scale, zero_point):
    return torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)


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
