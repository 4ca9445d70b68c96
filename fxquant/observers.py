"""Observers: modules that pass a tensor through unchanged and remember its range."""

from __future__ import annotations

import torch
from torch import nn

from fxquant.errors import QConfigError
from fxquant.numerics import QuantizedTensor, choose_qparams, quantize_with, weight_range
from fxquant.spec import TensorSpec

_PER_TENSOR = TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis="tensor")
_PER_CHANNEL = TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis="channel")
_PER_GROUP = TensorSpec(dtype="int4", qmin=-8, qmax=7, symmetric=True, axis="group", group_size=64)


class Observer(nn.Module):
    """A pass-through that measures. Subclasses say how a range is found; quantization follows from it.

    spec: how the tensor will become integers. min_val, max_val: (N,) float32, one an index of dimension 0 (equal ones
    for axis "tensor"), empty until something was observed. Observing the same tensor again changes nothing.
    """

    axis = "tensor"
    min_val: torch.Tensor
    max_val: torch.Tensor

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        if spec.axis != self.axis:
            raise QConfigError(f"{type(self).__name__} measures per {self.axis}, but its spec is '{spec}'")
        self.spec = spec
        self.register_buffer("min_val", torch.empty(0), persistent=False)
        self.register_buffer("max_val", torch.empty(0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x itself, its range remembered."""
        low, high = self.measure(x.detach().to(torch.float32))
        if self.min_val.shape == low.shape and self.min_val.device == low.device:
            low, high = torch.minimum(low, self.min_val), torch.maximum(high, self.max_val)
        self.min_val, self.max_val = low, high
        return x

    def measure(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range of x: (N, ...) float32 -> two (N,) float32. A subclass may clip it."""
        return weight_range(x, self.spec)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (scale, zero_point), each (N,) float32, for the range seen. QConfigError if nothing was seen."""
        if self.min_val.numel() == 0:
            raise QConfigError(f"{type(self).__name__} has seen no tensor yet; call it on one first")
        return choose_qparams(self.min_val, self.max_val, self.spec)

    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        """Return the weight as integers, by its own range."""
        weight = weight.detach().to(torch.float32)
        low, high = self.measure(weight)
        scale, zero_point = choose_qparams(low, high, self.spec)
        values = quantize_with(weight, scale, zero_point, self.spec)
        return QuantizedTensor(values, scale, None if self.spec.symmetric else zero_point)

    def extra_repr(self) -> str:
        """Return what print shows: the spec and the range seen."""
        seen = f", range [{self.min_val.min():.4g}, {self.max_val.max():.4g}]" if self.min_val.numel() else ""
        return f"{self.spec}{seen}"


class MinMaxObserver(Observer):
    """Measures one range for the whole tensor."""

    def __init__(self, spec: TensorSpec = _PER_TENSOR) -> None:
        super().__init__(spec)


class PerChannelMinMaxObserver(Observer):
    """Measures one range for each index of dimension 0: an output channel of a Linear, a row of an Embedding."""

    axis = "channel"

    def __init__(self, spec: TensorSpec = _PER_CHANNEL) -> None:
        super().__init__(spec)


class GroupMinMaxObserver(Observer):
    """Measures one range for each group of columns in each row of a matrix: min_val, max_val: (N, groups)."""

    axis = "group"

    def __init__(self, spec: TensorSpec = _PER_GROUP) -> None:
        super().__init__(spec)
