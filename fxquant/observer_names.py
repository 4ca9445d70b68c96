"""torch.ao's names of observers for activations, and its form `Observer.with_args(…)`: each is a TensorSpec here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fxquant.errors import QConfigError
from fxquant.ranges import Fixed, LeastError, MinMax, MovingAverage, Range
from fxquant.spec import Axis, TensorSpec

_MINMAX = MinMax()
_ACTIVATION = TensorSpec(dtype="uint8", qmin=0, qmax=255, axis="tensor", range=_MINMAX)
_WEIGHT = TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis="tensor")
_UNUSED = {"reduce_range", "eps", "bins", "upsample_rate", "factory_kwargs", "qscheme", "memoryless"}
_KNOWN = {"dtype", "quant_min", "quant_max", "averaging_constant", "ch_axis", "is_dynamic", "scale", "zero_point"}


@dataclass(frozen=True)
class ObserverName:
    """A name of torch.ao's for a way to observe; `with_args(…)`, or calling it, gives the equivalent TensorSpec.

    Activations are always exact at 8 bits here, so `reduce_range` changes nothing; neither do `eps` and a histogram's
    sizes. dtype: torch.quint8 (the default) or torch.uint8 for an activation, torch.qint8 or torch.int8 for a weight.
    """

    name: str
    range: Range = _MINMAX
    axis: Axis = "tensor"

    def with_args(self, **options: Any) -> TensorSpec:
        """Return the spec. QConfigError for an option that has no meaning here."""
        unknown = sorted(options.keys() - _KNOWN - _UNUSED)
        if unknown or options.get("ch_axis", 0) != 0:
            told = repr(unknown[0]) if unknown else f"ch_axis={options['ch_axis']}; channels are dimension 0"
            raise QConfigError(f"{self.name} does not take {told}; write a fxquant.TensorSpec instead")
        is_weight = self.axis == "channel" or "qint8" in str(options.get("dtype", "")) or _is_int8(options.get("dtype"))
        spec = replace(_WEIGHT, axis=self.axis) if is_weight else replace(_ACTIVATION, range=self._range(options))
        low, high = options.get("quant_min"), options.get("quant_max")
        spec = replace(spec, qmin=spec.qmin if low is None else low, qmax=spec.qmax if high is None else high)
        return replace(spec, dynamic=True, range=None) if options.get("is_dynamic") else spec

    def __call__(self, **options: Any) -> TensorSpec:
        """Return the spec, as `with_args` does."""
        return self.with_args(**options)

    def _range(self, options: dict[str, Any]) -> Range:
        if isinstance(self.range, Fixed) and "scale" in options:
            scale, zero = float(options["scale"]), int(options.get("zero_point", 0))
            top = options.get("quant_max")
            return Fixed(-zero * scale, ((255 if top is None else top) - zero) * scale)
        if isinstance(self.range, MovingAverage) and "averaging_constant" in options:
            return MovingAverage(options["averaging_constant"])
        return self.range


def _is_int8(dtype: Any) -> bool:
    return str(dtype) == "torch.int8"


HistogramObserver = ObserverName("HistogramObserver", LeastError())
"""The range of the least squared error: `LeastError`."""

MovingAverageMinMaxObserver = ObserverName("MovingAverageMinMaxObserver", MovingAverage())
"""The batches' ranges, averaged: `MovingAverage`."""

MovingAveragePerChannelMinMaxObserver = ObserverName("MovingAveragePerChannelMinMaxObserver", axis="channel")
"""For weights, which do not change between batches: one range a channel."""

FixedQParamsObserver = ObserverName("FixedQParamsObserver", Fixed())
"""A range that is known: `with_args(scale=…, zero_point=…)` gives `Fixed`."""

default_observer = ObserverName("MinMaxObserver")()
"""An activation's range from its least to its greatest value."""

default_histogram_observer = HistogramObserver()
"""An activation's range of the least squared error."""

default_fixed_qparams_range_0to1_observer = FixedQParamsObserver(scale=1 / 256, zero_point=0)
"""0 to 255/256: a sigmoid's."""

default_fixed_qparams_range_neg1to1_observer = FixedQParamsObserver(scale=2 / 256, zero_point=128)
"""-1 to 127/128: a tanh's."""

default_weight_observer = _WEIGHT
"""int8 weights, one scale a tensor."""

default_per_channel_weight_observer = replace(_WEIGHT, axis="channel")
"""int8 weights, one scale an output channel."""
