"""torch.ao's modules for models that were written for its eager mode. On the graph none of them is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class QuantStub(nn.Identity):
    """A pass-through: mapping and graph say where integers begin. A qconfig that it is given is ignored."""


class DeQuantStub(QuantStub):
    """A pass-through, as QuantStub is."""


class QuantWrapper(nn.Module):
    """A module between two stubs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.quant, self.module, self.dequant = QuantStub(), module, DeQuantStub()
        self.train(module.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the module gives."""
        y: torch.Tensor = self.dequant(self.module(self.quant(x)))
        return y


class FloatFunctional(nn.Module):
    """Sums, products and joins as methods. On the graph plain functions and operators such as `+` do as well."""

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        """Raise RuntimeError: it is used by its methods."""
        raise RuntimeError("FloatFunctional is used by its methods, self.functional.add(x, y) say, not called")

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return x + y."""
        return torch.add(x, y)

    def add_scalar(self, x: torch.Tensor, y: float) -> torch.Tensor:
        """Return x + y."""
        return torch.add(x, y)

    def add_relu(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return relu(x + y)."""
        return F.relu(torch.add(x, y))

    def mul(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return x * y."""
        return torch.mul(x, y)

    def mul_scalar(self, x: torch.Tensor, y: float) -> torch.Tensor:
        """Return x * y."""
        return torch.mul(x, y)

    def cat(self, x: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        """Return the tensors joined along a dimension."""
        return torch.cat(list(x), dim)

    def matmul(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return x @ y."""
        return torch.matmul(x, y)
