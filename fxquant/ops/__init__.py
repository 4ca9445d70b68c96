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
from fxquant.ops.static import static_convolution, static_linear
from fxquant.ops.values import add_values, dequantize, lookup, mul_values, pad_value, quantize

_native_transpose = library.function("transpose")


def transpose(x: torch.Tensor) -> torch.Tensor:
    """Return x.transpose(1, 2) of (B, M, N), contiguous: by the native library in a fraction of torch's time."""
    out: torch.Tensor | None = None if _native_transpose is None or is_compiling() else _native_transpose(True, x)
    return x.transpose(1, 2).contiguous() if out is None else out


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
    "kernel_info",
    "linear",
    "lookup",
    "lstm",
    "matmul",
    "max_pool_value",
    "mean_value",
    "mul_values",
    "pad_value",
    "pool_value",
    "quantize",
    "rnn",
    "static_convolution",
    "static_linear",
    "transpose",
]
