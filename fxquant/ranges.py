"""How the range of a calibrated value is chosen from what it was while calibration data ran: one frozen row a way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fxquant.errors import QConfigError


@dataclass(frozen=True)
class Range:
    """A way to choose a value's range. Its statistics have one shape, whatever the batches' shapes are."""

    def to_dict(self) -> dict[str, Any]:
        """Return its name and fields as plain JSON values."""
        return {"name": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class MinMax(Range):
    """The least and the greatest value of all batches. One outlier stretches it."""


@dataclass(frozen=True)
class MovingAverage(Range):
    """The batches' least and greatest values, averaged: low += constant * (batch's low - low)."""

    constant: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.constant <= 1:
            raise QConfigError(f"MovingAverage.constant is above 0 and at most 1, got {self.constant}")


@dataclass(frozen=True)
class Percentile(Range):
    """What so many percent of all values lie in, as many left out below as above, but for a bound that is 0."""

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise QConfigError(f"Percentile.percent is above 50 and at most 100, got {self.percent}")


@dataclass(frozen=True)
class LeastError(Range):
    """The range in which quantizing all values makes the least squared error, found on a histogram of them."""


@dataclass(frozen=True)
class Fixed(Range):
    """A range that is known without data: of a sigmoid's output, say."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low <= 0 <= self.high or self.low == self.high:
            raise QConfigError(f"Fixed range holds 0 and more, got [{self.low}, {self.high}]")


@dataclass(frozen=True)
class Learned(Range):
    """A step size that training learns, for `prepare_qat_fx` alone: of an activation, or of symmetric weights.

    Esser et al. 2020, "Learned Step Size Quantization": it begins as the first batch's range, or the weight's, says.
    """


RANGES: dict[str, type[Range]] = {
    kind.__name__: kind for kind in (MinMax, MovingAverage, Percentile, LeastError, Fixed, Learned)
}
"""The ways by name."""


def range_from_dict(fields: dict[str, Any]) -> Range:
    """Return what `Range.to_dict` described."""
    return RANGES[fields["name"]](**{name: value for name, value in fields.items() if name != "name"})
