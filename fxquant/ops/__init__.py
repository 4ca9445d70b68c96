"""The quantized operators as functions.

Each operator has a file of its own: its schema, reference, checks and what it needs of the native library. `register`
decides where a call runs.
"""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from fxquant.ops import library
from fxquant.ops.activations import add_product, attention, einsum, float_linear, matmul
from fxquant.ops.embedding import embedding, embedding_bag
from fxquant.ops.library import KernelInfo, kernel_info
from fxquant.ops.linear import linear
from fxquant.ops.pools import adaptive_pool_value, max_pool_value, mean_value, pool_value
from fxquant.ops.recurrent import lstm, rnn
from fxquant.ops.register import KERNELS, OVERLOADS
from fxquant.ops.resize import resize_value
from fxquant.ops.static import static_convolution, static_linear
from fxquant.ops.values import add_values, dequantize, lookup, lookup_channels, mul_values, pad_value, quantize

_native_transpose = library.function("transpose")


def transpose(x: torch.Tensor) -> torch.Tensor:
    """Return x.transpose(1, 2) of (B, M, N), contiguous: by the native library in a fraction of torch's time."""
    out: torch.Tensor | None = None if _native_transpose is None or is_compiling() else _native_transpose(True, x)
    return x.transpose(1, 2).contiguous() if out is None else out


_native_histogram = library.function("histogram")
_COUNTED = 1 << 24  # at once: float32 holds such numbers


def histogram(x: torch.Tensor, inverse: float, offset: float) -> torch.Tensor:
    """Return how many values of x * inverse + offset have each whole part from 0 to 2047: (2048,) float64.

    x: float32. Both operations are float32 ones; what is not finite or outside is not counted.
    """
    parts = torch.split(x.detach().contiguous().flatten(), _COUNTED)
    return torch.stack([_count(part, inverse, offset) for part in parts]).sum(0, dtype=torch.float64)


def _count(x: torch.Tensor, inverse: float, offset: float) -> torch.Tensor:
    out: torch.Tensor | None = None if _native_histogram is None else _native_histogram(x, inverse, offset)
    if out is not None:
        return out
    place = x.cpu().mul(inverse).add_(offset)
    return torch.bincount(place[(place >= 0) & (place < 2048)].to(torch.int32), minlength=2048)


__all__ = [
    "KERNELS",
    "OVERLOADS",
    "KernelInfo",
    "adaptive_pool_value",
    "add_product",
    "add_values",
    "attention",
    "dequantize",
    "einsum",
    "embedding",
    "embedding_bag",
    "float_linear",
    "histogram",
    "kernel_info",
    "linear",
    "lookup",
    "lookup_channels",
    "lstm",
    "matmul",
    "max_pool_value",
    "mean_value",
    "mul_values",
    "pad_value",
    "pool_value",
    "quantize",
    "resize_value",
    "rnn",
    "static_convolution",
    "static_linear",
    "transpose",
]
