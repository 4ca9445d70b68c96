"""Metrics of a model: the user's function, or by default the relative RMS error of the outputs.

relative RMS = √(Σ (y - ŷ)² / Σ y²)      over all batches, of the output with the largest error
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fxquant.errors import ArgumentError, ExampleInputsError, ModelStateError
from fxquant.formats import FORMATS
from fxquant.graph.outputs import named_floats

Metric = Callable[[nn.Module], float]
Floats = Mapping[str, torch.Tensor]
"""The floating-point tensors of an output, by their paths."""

_CHUNK = 2**15
"""How many values are compared at once, in float64: as many as stay in a core's cache."""

NO_FLOATS = (
    "the model's outputs hold no floating-point tensor to compare (class indices alone do not show an error); let "
    "forward return its scores too"
)
"""The message about a model whose outputs cannot be compared."""

_FINE = frozenset({"float", *(row.name for row in FORMATS if row.bits >= 16)})
"""Schemes that lose next to nothing."""


def call_metric(metric: Metric, model: nn.Module) -> float:
    """Return a user's metric of a model as a float, or raise ArgumentError for anything but a number."""
    value = metric(model)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"metric is a function of a model that gives a number, but it gave {type(value).__name__}: {error}"
        ) from error


def need_number(start: float) -> None:
    """Raise ModelStateError if the metric of the float model is NaN."""
    if math.isnan(start):
        raise ModelStateError(
            "the metric of the float model is NaN, so nothing can be compared with it; look for NaN in the model's "
            "weights, the data and the metric"
        )


def need_information(start: float, tried: Iterable[float], schemes: Iterable[str]) -> None:
    """Raise ArgumentError if a user's metric is 0 or NaN for the float model and for everything that was tried.

    schemes: those that were tried. A metric that is 0 is plausible if all of them lose next to nothing.
    """
    values = list(tried)
    is_nan = all(map(math.isnan, values))
    is_zero = not any(value for value in (start, *values) if not math.isnan(value))
    if values and (is_nan or (is_zero and not _FINE.issuperset(schemes))):
        raise ArgumentError(
            f"metric gives 0 or NaN for all {len(values)} quantized models that were tried, so it cannot tell them "
            "apart; let it count something that the model gives (is its data empty?), or leave it out"
        )


def squared_errors(got: Any, expected: Floats) -> tuple[float, ...]:
    """Return Σ (y - ŷ)² and Σ y² of each floating-point output in turn, or raise ExampleInputsError."""
    result = named_floats(got)
    if not expected:
        raise ExampleInputsError(f"{NO_FLOATS}, or pass a metric of your own")
    if not any(tensor.numel() for tensor in expected.values()):
        raise ExampleInputsError(
            "the model's outputs are empty on a batch of data, so there is no error to measure; leave that batch out, "
            "or pass a metric of your own"
        )
    sums: list[float] = []
    for name, y in expected.items():
        if name not in result or result[name].shape != y.shape:
            shape = tuple(result[name].shape) if name in result else "missing"
            raise ExampleInputsError(
                f"output {name!r} is {tuple(y.shape)} in float and {shape} with some sites quantized: its shape "
                "depends on the values, so the two cannot be compared; pass a metric of your own"
            )
        sums += _squared_error(result[name].reshape(-1), y.reshape(-1))
    return tuple(sums)


def _squared_error(got: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return Σ (y - ŷ)² and Σ y² over the values that are finite in float; NaN if none of them is."""
    noise = signal = 0.0
    for ours, theirs in zip(torch.split(got, _CHUNK), torch.split(expected, _CHUNK), strict=True):
        y, x = ours.double(), theirs.double()
        square = float(x.square().sum())
        if not math.isfinite(square):  # masked logits are -inf
            known = x.isfinite()
            y, x = y[known], x[known]
            square = float(x.square().sum()) if len(x) else math.nan
        noise += float((y - x).square().sum())
        signal += square
    return noise, signal


def relative_rms(errors: Iterable[tuple[float, ...]]) -> float:
    """Return √(Σ noise / Σ signal) of the worst output. errors: what `squared_errors` gave for each batch.

    An output that is 0 in all batches has no relative error and is left out. If all are, this is √Σ noise.
    """
    sums: list[float] = []
    for batch in errors:
        sums = [a + b for a, b in itertools.zip_longest(sums, batch, fillvalue=0.0)]
    pairs = list(zip(sums[::2], sums[1::2], strict=True))
    if not any(signal for _, signal in pairs):
        return math.sqrt(sum(noise for noise, _ in pairs))
    squares = [noise / signal for noise, signal in pairs if signal]
    return math.nan if any(map(math.isnan, squares)) else math.sqrt(max(squares))
