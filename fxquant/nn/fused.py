"""Float modules that stand for a fused chain: they compute exactly what the chain did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function


class LinearReLU(nn.Linear):
    """relu(linear(x)), as one float module. x: (..., I) -> (..., O)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return relu(input @ weight.T + bias)."""
        return F.relu(super().forward(input))


class ConvReLU1d(nn.Conv1d):
    """relu(conv1d(x)), as one float module."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return relu of the convolution."""
        return F.relu(super().forward(input))


class ConvReLU2d(nn.Conv2d):
    """relu(conv2d(x)), as one float module."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return relu of the convolution."""
        return F.relu(super().forward(input))


class ConvReLU3d(nn.Conv3d):
    """relu(conv3d(x)), as one float module."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return relu of the convolution."""
        return F.relu(super().forward(input))


WITH_RELU: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LinearReLU,
    nn.Conv1d: ConvReLU1d,
    nn.Conv2d: ConvReLU2d,
    nn.Conv3d: ConvReLU3d,
}
"""A float module type and the one that has a ReLU fused to it."""

FLOAT_TYPES: dict[type[nn.Module], type[nn.Module]] = {fused: plain for plain, fused in WITH_RELU.items()}
"""A fused type and the plain one that the user wrote, whose mapping entries decide for it."""


def expanded_bmm(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return torch.bmm of (B, M, K) with one (K, N) for the whole batch: x @ other, as programs say it."""
    operands = (input, other)
    if has_torch_function(operands):
        return handle_torch_function(expanded_bmm, operands, *operands)
    return torch.bmm(input, other.expand(input.shape[0], *other.shape))


def linear_relu(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return relu(F.linear(input, weight, bias)): the fused functional, one node in a graph."""
    operands = (input, weight, bias)
    if has_torch_function(operands):
        return handle_torch_function(linear_relu, operands, *operands)
    return F.relu(F.linear(input, weight, bias))


SPELT: dict[Any, Callable[..., Any]] = {linear_relu: F.linear, expanded_bmm: torch.bmm}
"""A function of ours and the one that the user's model calls, whose mapping entries decide for it."""
