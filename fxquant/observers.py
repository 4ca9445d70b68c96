"""Observers: modules that pass a tensor through unchanged and remember its range."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxquant.errors import QConfigError, ShapeError
from fxquant.numerics import RANGE_SHARES, QuantizedTensor, choose_qparams, quantize_with, weight_range
from fxquant.observer_names import MIN_MAX, PER_CHANNEL
from fxquant.spec import Axis, TensorSpec

_PER_TENSOR = TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis="tensor")
_PER_CHANNEL = TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis="channel")
_PER_GROUP = TensorSpec(dtype="int4", qmin=-8, qmax=7, symmetric=True, axis="group", group_size=64)
_VALUES_AT_ONCE = 1 << 16  # as many as stay in a core's cache


class Observer(nn.Module):
    """A pass-through that measures. Subclasses say how a range is found; quantization follows from it.

    spec: how the tensor will become integers. min_val, max_val: float32, the range of all that was observed: (N,), one
    for each index of dimension 0, (N, groups) or, for axis "tensor", (1,); empty before that. How the values are split
    into batches makes no difference.
    """

    axis: Axis = "tensor"
    min_val: torch.Tensor
    max_val: torch.Tensor
    total: torch.Tensor

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        if spec.axis != self.axis:
            raise QConfigError(f"{type(self).__name__} measures per {self.axis}, but its spec is '{spec}'")
        self.spec = spec
        self.register_buffer("min_val", torch.empty(0), persistent=False)
        self.register_buffer("max_val", torch.empty(0), persistent=False)
        self.register_buffer("total", torch.empty(0), persistent=False)  # of the tensor seen; NaN if there were several

    @classmethod
    def with_args(cls, **options: Any) -> TensorSpec:
        """Return the TensorSpec that torch.ao's form says: `MinMaxObserver.with_args(dtype=torch.int8)`, say.

        QConfigError for an observer that torch.ao has not, which a TensorSpec alone cannot name.
        """
        name = {MinMaxObserver: MIN_MAX, PerChannelMinMaxObserver: PER_CHANNEL}.get(cls)
        if name is None:
            raise QConfigError(
                f"{cls.__name__}.with_args: write a TensorSpec, and QConfig(…, weight_observer={cls.__name__})"
            )
        return name.with_args(**options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x itself, and remember its range. Raises ShapeError if it has other channels or groups than before."""
        values = x.detach().to(torch.float32).contiguous()
        if not values.numel():
            return x
        (low, high), total = self.measure(values), _total(values)
        if self.axis == "tensor":
            low, high = low.amin().reshape(1), high.amax().reshape(1)
        if self.min_val.numel():
            if low.shape != self.min_val.shape:
                raise ShapeError(
                    f"{type(self).__name__} measures per {self.axis} and has seen ranges of shape "
                    f"{tuple(self.min_val.shape)}, got a tensor of {tuple(low.shape)}; use one observer for each tensor"
                )
            low = torch.minimum(low, self.min_val.to(low.device))
            high = torch.maximum(high, self.max_val.to(high.device))
            total = torch.where(total == self.total.to(total.device), total, torch.nan)
        self.min_val, self.max_val, self.total = low, high, total
        return x

    def measure(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range of x: (N, ...) float32 -> two (N,) float32. A subclass may clip it."""
        return weight_range(x, self.spec)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (scale, zero_point), shaped like the range seen. QConfigError if nothing was seen."""
        if self.min_val.numel() == 0:
            raise QConfigError(f"{type(self).__name__} has seen no tensor yet; call it on one first")
        return choose_qparams(self.min_val, self.max_val, self.spec)

    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        """Return the weight as integers, by its observed range; if there is none, or the weight has changed, by its
        range now.
        """
        weight = weight.detach().to(torch.float32)
        low, high = (self.min_val, self.max_val) if self._has_seen(weight) else self.measure(weight)
        if self.axis == "tensor":
            low, high = low[:1].expand(len(weight)), high[:1].expand(len(weight))
        scale, zero_point = choose_qparams(low, high, self.spec)
        values = quantize_with(weight, scale, zero_point, self.spec)
        zero_points, spec = None if self.spec.symmetric else zero_point, self.spec
        return QuantizedTensor(spec.format, values, scale, zero_points, weight.shape[-1], spec.group_size or 0)

    def _has_seen(self, weight: torch.Tensor) -> bool:
        """Return whether this float32 tensor, unchanged, is all that was observed; a cast changes the range."""
        if weight.is_meta or not self.min_val.numel() or self.min_val.dtype != torch.float32:
            return False
        return bool(self.total.to(weight.device) == _total(weight))

    def extra_repr(self) -> str:
        """Return what print shows: the spec and the range seen."""
        seen = f", range [{self.min_val.min():.4g}, {self.max_val.max():.4g}]" if self.min_val.numel() else ""
        return f"{self.spec}{seen}"


def _total(values: torch.Tensor) -> torch.Tensor:
    """Return a checksum that identifies the observed tensor: a version counter misses writes to `.data`."""
    return values.sum(dtype=torch.float64)


class MinMaxObserver(Observer):
    """Measures one range for the whole tensor."""

    def __init__(self, spec: TensorSpec = _PER_TENSOR) -> None:
        super().__init__(spec)


class PerChannelMinMaxObserver(Observer):
    """Measures one range for each index of dimension 0: an output channel of a Linear, a row of an Embedding."""

    axis = "channel"

    def __init__(self, spec: TensorSpec = _PER_CHANNEL) -> None:
        super().__init__(spec)


class LeastErrorObserver(PerChannelMinMaxObserver):
    """Measures, for each index of dimension 0, the part of its range that rounds with the least squared error.

    The range itself and 31/32, 30/32, … 18/32 of it are tried: values beyond are clipped, all others get finer steps.
    That pays with 4 bits; with 8 it hardly matters. docs/numerics.md, "clipped range".
    """

    def measure(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range of x, clipped: (N, ...) float32 -> two (N,) float32."""
        low, high = super().measure(x)
        if x.is_meta:
            return low, high
        rows = x.reshape(len(x), -1) if x.numel() else x.new_zeros(len(x), 1)
        at_once = max(1, _VALUES_AT_ONCE // rows.shape[1])
        parts = (torch.split(part, at_once) for part in (rows, low, high))
        shares = torch.cat([self._best_shares(*part) for part in zip(*parts, strict=True)])
        return low * shares, high * shares

    def _best_shares(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Return the share of each channel's range with the least error, the greatest of equal ones: (N,)."""
        best, least = torch.ones_like(low), self._error(x, low, high)
        for share in RANGE_SHARES[1:]:
            error = self._error(x, low * share, high * share)
            best, least = torch.where(error < least, share, best), torch.fmin(error, least)
        return best

    def _error(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Return each channel's squared error under a range: (N, K) -> (N,)."""
        scale, zero = (part.unsqueeze(1) for part in choose_qparams(low, high, self.spec))
        q = (x * (1.0 / scale)).add_(zero).round_().clamp_(self.spec.qmin, self.spec.qmax)
        return q.sub_(zero).mul_(scale).sub_(x).square_().sum(1)


class GroupMinMaxObserver(Observer):
    """Measures one range for each group of columns of each output channel: min_val, max_val: (N, groups)."""

    axis = "group"

    def __init__(self, spec: TensorSpec = _PER_GROUP) -> None:
        super().__init__(spec)
