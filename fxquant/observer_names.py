"""torch.ao's names of observers for activations, and its form `Observer.with_args(…)`: each is a TensorSpec here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fxquant.errors import QConfigError, nearest
from fxquant.ranges import Fixed, LeastError, MinMax, MovingAverage, Range
from fxquant.spec import Axis, TensorSpec

_MINMAX = MinMax()
_ACTIVATION = TensorSpec(dtype="uint8", qmin=0, qmax=255, axis="tensor", range=_MINMAX)
_WEIGHT = TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis="tensor")
_ROWS = TensorSpec(dtype="uint8", qmin=0, qmax=255, axis="channel")
_ROWS_4BIT = TensorSpec(dtype="uint4", qmin=0, qmax=15, axis="channel")

_SPECS: dict[Axis, dict[str, TensorSpec]] = {
    "tensor": {"quint8": _ACTIVATION, "uint8": _ACTIVATION, "qint8": _WEIGHT, "int8": _WEIGHT},
    "channel": {
        **dict.fromkeys(("qint8", "int8"), replace(_WEIGHT, axis="channel")),
        **dict.fromkeys(("quint8", "uint8"), _ROWS),
        "quint4x2": _ROWS_4BIT,
    },
}
"""The spec of each dtype that a name takes, by its axis. The dtypes are known by their names alone."""

_OPTIONS = frozenset(
    ("dtype", "qscheme", "quant_min", "quant_max", "is_dynamic", "reduce_range", "eps", "factory_kwargs", "memoryless")
)


@dataclass(frozen=True)
class ObserverName:
    """A name of torch.ao's for a way to observe; `with_args(…)`, or calling it, gives the equivalent TensorSpec.

    dtype: quint8 (the default) or uint8 for an activation, qint8 or int8 for a weight. A name
    of channels is for weights: int8 by default, quint8 and quint4x2 for the rows of an embedding.
    Activations are exact at 8 bits here, so `reduce_range` changes nothing; neither do `eps` and a histogram's `bins`.
    Of `qscheme` only "per tensor" or "per channel" counts: an activation's zero point always follows from its range.
    options: what this name takes beyond that; `needs`: those of them that it cannot do without.
    """

    name: str
    range: Range = _MINMAX
    axis: Axis = "tensor"
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def with_args(self, **options: Any) -> TensorSpec:
        """Return the spec. QConfigError for an option or a value of it that has no meaning here."""
        self._check(options)
        spec = self._spec(str(options.get("dtype", "qint8" if self.axis == "channel" else "quint8")))
        low, high = options.get("quant_min"), options.get("quant_max")
        if spec.range is not None:
            if low not in (None, 0):
                raise QConfigError(f"{self.name} does not take quant_min={low}: an activation's integers begin at 0")
            spec = replace(spec, range=self._range(options))
        spec = replace(spec, qmin=spec.qmin if low is None else low, qmax=spec.qmax if high is None else high)
        return replace(spec, dynamic=True, range=None) if options.get("is_dynamic") else spec

    def __call__(self, **options: Any) -> TensorSpec:
        """Return the spec, as `with_args` does."""
        return self.with_args(**options)

    def _check(self, options: dict[str, Any]) -> None:
        known = _OPTIONS.union(self.options)
        for option in options:
            if option not in known:
                raise QConfigError(f"{self.name} does not take {option!r}{nearest(option, known)}")
        if missing := [option for option in self.needs if option not in options]:
            raise QConfigError(f"{self.name} needs {', '.join(f'{option}=…' for option in missing)}")
        if options.get("ch_axis", 0) != 0:
            raise QConfigError(
                f"{self.name} does not take ch_axis={options['ch_axis']}: a weight's channels are dimension 0, and a "
                "transposed convolution's are found without it; leave ch_axis out"
            )
        scheme = str(options.get("qscheme", f"per_{self.axis}")).removeprefix("torch.")
        if not scheme.startswith(f"per_{self.axis}"):
            raise QConfigError(f"{self.name} measures per {self.axis}, it does not take qscheme=torch.{scheme}")

    def _spec(self, dtype: str) -> TensorSpec:
        specs = _SPECS[self.axis]
        kind = dtype.removeprefix("torch.")
        if kind not in specs:
            raise QConfigError(
                f"{self.name} does not take dtype={dtype}; there are {', '.join(f'torch.{known}' for known in specs)}"
            )
        return specs[kind]

    def _range(self, options: dict[str, Any]) -> Range:
        if isinstance(self.range, Fixed):
            scale, zero, top = float(options["scale"]), int(options["zero_point"]), options.get("quant_max")
            return Fixed(-zero * scale, ((255 if top is None else top) - zero) * scale)
        if isinstance(self.range, MovingAverage) and "averaging_constant" in options:
            return MovingAverage(options["averaging_constant"])
        return self.range


HistogramObserver = ObserverName("HistogramObserver", LeastError(), options=("bins", "upsample_rate"))
"""The range of the least squared error: `LeastError`."""

MovingAverageMinMaxObserver = ObserverName(
    "MovingAverageMinMaxObserver", MovingAverage(), options=("averaging_constant",)
)
"""The batches' ranges, averaged: `MovingAverage`."""

MovingAveragePerChannelMinMaxObserver = ObserverName(
    "MovingAveragePerChannelMinMaxObserver", axis="channel", options=("averaging_constant", "ch_axis")
)
"""For weights, which do not change between batches: one range a channel."""

FixedQParamsObserver = ObserverName(
    "FixedQParamsObserver", Fixed(), options=("scale", "zero_point"), needs=("scale", "zero_point")
)
"""A range that is known: `with_args(scale=…, zero_point=…)` gives `Fixed`."""

MIN_MAX = ObserverName("MinMaxObserver")
"""The options of `MinMaxObserver.with_args`."""

PER_CHANNEL = ObserverName("PerChannelMinMaxObserver", axis="channel", options=("ch_axis",))
"""The options of `PerChannelMinMaxObserver.with_args`."""

default_observer = MIN_MAX()
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
