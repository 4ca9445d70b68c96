"""Float modules that stand for a fused chain: they compute exactly what the chain did."""

from __future__ import annotations

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


def linear_relu(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return relu(F.linear(input, weight, bias)): the fused functional, one node in a graph."""
    operands = (input, weight, bias)
    if has_torch_function(operands):
        return handle_torch_function(linear_relu, operands, *operands)
    return F.relu(F.linear(input, weight, bias))
