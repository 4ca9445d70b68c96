"""Observers of values: modules that pass a value on, and remember enough of it to choose its range."""

from __future__ import annotations

import torch
from torch import nn

from fxquant import ops
from fxquant.errors import CalibrationError
from fxquant.numerics import FLOAT32_MAX, FLOAT32_TINY, choose_value_qparams
from fxquant.ranges import Fixed, Learned, LeastError, MinMax, MovingAverage, Percentile, Range
from fxquant.spec import TensorSpec

BINS = 2048
_SHARES = torch.linspace(1.0, 0.02, 99)  # of a side of the range that are tried as bounds


class ValueObserver(nn.Module):
    """A pass-through that measures a value. Statistics have one shape, whatever the batches' are.

    spec: how the value will become integers. low, high: () float32, the least and greatest finite value so far, 0
    included; `has_seen` tells whether there was one. is_given: whether scale and zero point are known from elsewhere.
    """

    is_given = False
    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.spec = spec
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros(()), persistent=False)
        self.has_seen = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x itself, its values remembered."""
        values = x.detach()
        if values.numel() and values.device.type != "meta":
            self.see(values.to(torch.float32))
            self.has_seen = True
        return x

    def see(self, x: torch.Tensor) -> None:
        """Remember a batch: float32, not empty."""
        low, high = bounds(x)
        self.low, self.high = torch.minimum(low, self.low.to(low)), torch.maximum(high, self.high.to(high))

    def choose(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range: two () float32."""
        return self.low, self.high

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (scale, zero_point): () float32, () int32. CalibrationError where nothing was seen."""
        if not self.has_seen:
            raise CalibrationError(f"{type(self).__name__} has seen no value yet; run calibration data through it")
        return choose_value_qparams(*self.choose(), self.spec.qmax)

    def extra_repr(self) -> str:
        """Return what print shows: the spec and what was seen."""
        seen = f", seen [{float(self.low):.4g}, {float(self.high):.4g}]" if self.has_seen else ", nothing seen"
        return f"{self.spec}{seen}"


class MovingAverageObserver(ValueObserver):
    """Averages the batches' least and greatest values."""

    def see(self, x: torch.Tensor) -> None:
        """Remember a batch."""
        low, high = bounds(x)
        if self.has_seen:
            constant = self.spec.range.constant  # type: ignore[union-attr]
            low = self.low.to(low) + constant * (low - self.low.to(low))
            high = self.high.to(high) + constant * (high - self.high.to(high))
        self.low, self.high = low, high


class FixedObserver(ValueObserver):
    """Gives a range that is known without data."""

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__(spec)
        self.has_seen = True

    def see(self, x: torch.Tensor) -> None:
        """Remember nothing."""

    def choose(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range that the spec says."""
        fixed = self.spec.range
        assert isinstance(fixed, Fixed)
        return torch.tensor(fixed.low), torch.tensor(fixed.high)


class HistogramObserver(ValueObserver):
    """Counts values in bins of one width, aligned to 0; where a batch goes beyond them, bins are joined two by two.

    counts: (2048,) float64; width: () float32, a bin's; first: () int64, the number of the first bin, which spans
    [first * width, (first + 1) * width).
    """

    counts: torch.Tensor
    width: torch.Tensor
    first: torch.Tensor

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__(spec)
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.float64), persistent=False)
        self.register_buffer("width", torch.zeros(()), persistent=False)
        self.register_buffer("first", torch.zeros((), dtype=torch.int64), persistent=False)

    def see(self, x: torch.Tensor) -> None:
        """Remember a batch."""
        super().see(x)
        low, high = float(self.low), float(self.high)
        span = max(high - low, FLOAT32_TINY * BINS * 4)
        if not self.has_seen:
            self.width = torch.tensor(span / (BINS - 2))
            self.first = torch.tensor(int(low // float(self.width)))
        width, first, counts = float(self.width), int(self.first), self.counts.cpu()
        while max(first + len(counts), int(high // width) + 1) - min(first, int(low // width)) > BINS:
            counts, first = _joined(counts, first)
            width *= 2
        counts, first = _placed(counts, first, min(first, int(low // width)))
        counts = counts + ops.histogram(x, 1.0 / width, -first)
        self.width, self.first, self.counts = torch.tensor(width), torch.tensor(first), counts

    def centres(self) -> torch.Tensor:
        """Return the middle of each bin: (2048,) float64."""
        return (torch.arange(BINS, dtype=torch.float64) + int(self.first) + 0.5) * float(self.width)

    def choose(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range as the spec's `range` wants it."""
        way = self.spec.range
        if isinstance(way, Percentile):
            return self._percentile(way.percent)
        return self._least_error()

    def _percentile(self, percent: float) -> tuple[torch.Tensor, torch.Tensor]:
        below = self.counts.cumsum(0) / self.counts.sum()
        edges = (torch.arange(BINS + 1, dtype=torch.float64) + int(self.first)) * float(self.width)
        sides = int(self.low < 0) + int(self.high > 0)
        tail = (1 - percent / 100) / max(1, sides)
        low = edges[:-1][below > tail][0].float()
        high = edges[1:][below >= 1 - tail][0].float()
        return torch.maximum(low, self.low.cpu()).clamp(max=0), torch.minimum(high, self.high.cpu()).clamp(min=0)

    def _least_error(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bounds with the least squared error, each side's share of the whole tried in turn."""
        low, high = self.low.cpu(), self.high.cpu()
        best = low, high
        shares = _SHARES
        for bounds_at in (
            lambda _: (low * shares, high * shares),
            lambda b: (b[0].expand_as(shares), high * shares),
            lambda b: (low * shares, b[1].expand_as(shares)),
            lambda b: (b[0].expand_as(shares), high * shares),
        ):
            lows, highs = bounds_at(best)
            at = int(self._errors(lows, highs).argmin())
            best = lows[at], highs[at]
        return best

    def _errors(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Return the squared error of all values under each of some ranges: (N,) -> (N,) float64."""
        x = self.centres()[self.counts > 0]
        scale = ((high.double() - low.double()) / self.spec.qmax).clamp(min=FLOAT32_TINY).unsqueeze(1)
        zero = (-low.double().unsqueeze(1) / scale).round()
        real = (((x / scale).round() + zero).clamp(0, self.spec.qmax) - zero) * scale
        return ((real - x).square() * self.counts[self.counts > 0]).sum(1)


class InputMean(nn.Module):
    """A pass-through that remembers the mean of each channel of a product's input: for bias correction.

    dim: the channels'. total: (channels,) float64, the sum of all that was seen, or empty; count: () float64.
    """

    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("total", torch.zeros(0, dtype=torch.float64), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x itself, its channels' sums remembered; a batch that is not finite counts for nothing."""
        values = x.detach()
        if values.numel() and values.device.type != "meta":
            channels = values.shape[self.dim]
            others = [dim for dim in range(values.dim()) if dim != self.dim % values.dim()]
            sums = values.to(torch.float32).sum(others) if others else values.to(torch.float32)
            if sums.isfinite().all():
                total = self.total.to(sums.device) if self.total.numel() else 0.0
                self.total, self.count = total + sums.to(torch.float64), self.count + values.numel() // channels
        return x

    def extra_repr(self) -> str:
        """Return what print shows."""
        return f"dim={self.dim}"


def bounds(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the greatest finite value, 0 included: two () float32."""
    low, high = torch.aminmax(x)
    if not (low.isfinite() & high.isfinite()):
        low, high = torch.aminmax(x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    return low.clamp(-FLOAT32_MAX, 0.0), high.clamp(0.0, FLOAT32_MAX)


def _joined(counts: torch.Tensor, first: int) -> tuple[torch.Tensor, int]:
    """Return counts in bins twice as wide, without the empty ones at the ends, and the number of the first of them."""
    before = first % 2
    padded = torch.cat([counts.new_zeros(before), counts, counts.new_zeros((len(counts) + before) % 2)])
    halves = padded.view(-1, 2).sum(1)
    filled = halves.nonzero().flatten()
    start, end = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 1)
    return halves[start:end], (first - before) // 2 + start


def _placed(counts: torch.Tensor, first: int, new_first: int) -> tuple[torch.Tensor, int]:
    """Return all bins, from number `new_first` on, with these counts in them."""
    every = counts.new_zeros(BINS)
    every[first - new_first : first - new_first + len(counts)] = counts
    return every, new_first


_OBSERVERS: dict[type[Range], type[ValueObserver]] = {
    MinMax: ValueObserver,
    MovingAverage: MovingAverageObserver,
    Percentile: HistogramObserver,
    LeastError: HistogramObserver,
    Fixed: FixedObserver,
    Learned: ValueObserver,  # in the graph that a file is loaded into, where it sees nothing
}


def make_value_observer(spec: TensorSpec) -> ValueObserver:
    """Return a fresh observer for a calibrated value."""
    return _OBSERVERS[type(spec.range or MinMax())](spec)
