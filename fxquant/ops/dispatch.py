"""The one place that decides which implementation a call runs: the native kernels where they can, else plain torch.

`torch.ops.fxquant.*` runs these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from fxquant.errors import ModelStateError
from fxquant.ops import native, reference, reference_products, reference_recurrent
from fxquant.ops.schema import (
    attention_shape,
    check_groups,
    check_indices,
    check_linear,
    check_recurrent,
    product_shape,
    rnn_kind,
)

T = TypeVar("T")


def _run(run: Callable[..., T], weights: Sequence[torch.Tensor], x: torch.Tensor, *operands: Any) -> T:
    """Return run(x, *operands), or raise ModelStateError where memory was given back: untyped_storage().resize_(0)."""
    try:
        return run(x, *operands)
    except Exception:
        for name, tensor in (("input", x), *(("weight", weight) for weight in weights)):
            if tensor.layout is torch.strided and tensor.numel() and not tensor.untyped_storage().nbytes():
                told = f"the {name} of a quantized operator has no memory: its storage was freed"
                raise ModelStateError(told) from None
        raise


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    relu: bool = False,
    per_row: bool = True,
    qmax: int = 255,
    group_size: int = 0,
    in_features: int = 0,
) -> torch.Tensor:
    """Run `reference.linear` or its native kernel; both say what the arguments are."""
    check_linear(x, weight, in_features, qmax)
    if group_size:
        check_groups(weight, scale, group_size, in_features)
    run = native.linear if native.takes(x, [weight]) else reference.linear
    return _run(run, [weight], x, weight, scale, bias, relu, per_row, qmax, group_size, in_features)


def lstm(
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    h0: torch.Tensor,
    c0: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    bidirectional: bool = False,
    per_row: bool = True,
    qmax: int = 255,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run `reference_recurrent.lstm` or its native kernels."""
    check_recurrent("LSTM", x, batch_sizes, (h0, c0), weights, scales, biases, (), bidirectional, qmax)
    run = native.lstm if native.takes(x, weights) else reference_recurrent.lstm
    return _run(run, weights, x, batch_sizes, h0, c0, weights, scales, biases, bidirectional, per_row, qmax)


def rnn(
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    h0: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    hidden_biases: Sequence[torch.Tensor],
    mode: str,
    bidirectional: bool = False,
    per_row: bool = True,
    qmax: int = 255,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `reference_recurrent.rnn` or its native kernels."""
    parts = (weights, scales, biases, hidden_biases)
    check_recurrent(rnn_kind(mode), x, batch_sizes, (h0,), *parts, bidirectional, qmax)
    run = native.rnn if native.takes(x, weights) else reference_recurrent.rnn
    return _run(run, weights, x, batch_sizes, h0, *parts, mode, bidirectional, per_row, qmax)


def embedding(indices: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Run `reference.embedding` or its native kernel."""
    check_indices(indices, "embedding")
    run = native.embedding if native.takes(indices, [weight]) else reference.embedding
    return _run(run, [weight], indices, weight, *rest)


def embedding_bag(indices: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Run `reference.embedding_bag` or its native kernel."""
    check_indices(indices, "embedding bag")
    run = native.embedding_bag if native.takes(indices, [weight]) else reference.embedding_bag
    return _run(run, [weight], indices, weight, *rest)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Run `reference_products.matmul` or its native kernel."""
    product_shape(a, b)
    run = native.matmul if native.takes(a, [b]) and a.dtype != torch.float64 else reference_products.matmul
    return _run(run, [b], a, b)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Run `reference_products.attention` or its native kernel."""
    attention_shape(query, key, value, mask)
    others = [key, value] if mask is None else [key, value, mask]
    run = native.attention if native.takes(query, others) else reference_products.attention
    return _run(run, others, query, key, value, mask, is_causal, scale)
