"""The quantized operators as functions: eager calls on plain tensors run at once, others by `torch.ops.fxquant`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxquant.ops import dispatch
from fxquant.ops.native import KernelInfo, kernel_info
from fxquant.ops.schema import LIBRARY, SCHEMAS

for _name in SCHEMAS:
    LIBRARY.impl(_name, getattr(dispatch, _name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

OVERLOADS = {name: getattr(torch.ops.fxquant, name).default for name in SCHEMAS}
"""The registered operators: what graphs, torch.compile and torch.export hold."""


def linear(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Call `torch.ops.fxquant.linear`, whose arguments `dispatch.linear` has."""
    run = dispatch.linear if dispatch.is_eager(x, weight) else OVERLOADS["linear"]
    return run(x, weight, *rest)


def lstm(
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    h0: torch.Tensor,
    c0: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call `torch.ops.fxquant.lstm`, whose arguments `dispatch.lstm` has."""
    is_eager = dispatch.is_eager(x, weights[0]) and dispatch.is_eager(h0, c0)
    run = dispatch.lstm if is_eager else OVERLOADS["lstm"]
    return run(x, batch_sizes, h0, c0, weights, *rest)


def rnn(
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    h0: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call `torch.ops.fxquant.rnn`, whose arguments `dispatch.rnn` has."""
    is_eager = dispatch.is_eager(x, weights[0]) and dispatch.is_eager(h0, weights[0])
    return (dispatch.rnn if is_eager else OVERLOADS["rnn"])(x, batch_sizes, h0, weights, *rest)


def embedding(indices: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Call `torch.ops.fxquant.embedding`, whose arguments `dispatch.embedding` has."""
    run = dispatch.embedding if dispatch.is_eager(indices, weight) else OVERLOADS["embedding"]
    return run(indices, weight, *rest)


def embedding_bag(indices: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Call `torch.ops.fxquant.embedding_bag`, whose arguments `dispatch.embedding_bag` has."""
    run = dispatch.embedding_bag if dispatch.is_eager(indices, weight) else OVERLOADS["embedding_bag"]
    return run(indices, weight, *rest)


__all__ = ["OVERLOADS", "KernelInfo", "embedding", "embedding_bag", "kernel_info", "linear", "lstm", "rnn"]
