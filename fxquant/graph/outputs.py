"""A model's outputs: their tensors by name, wherever they are, and how far those of two models are apart."""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import rnn

_ITERATORS = (types.GeneratorType, map, filter, zip)
_DRAWN = 64
"""How many values are taken of an iterator, which may have no end."""

_CLOSED = (nn.Module, type, torch.Generator, torch.device, torch.dtype, types.ModuleType)
"""Objects with attributes that do not count as containers of outputs."""


def drained(value: Any) -> Any:
    """Return a generator's first values as a list, so that what makes them runs now; anything else as it is."""
    return list(itertools.islice(value, _DRAWN)) if isinstance(value, _ITERATORS) else value


def named_tensors(value: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of an output by their paths: "scores", "states.0", "" for an output that is one.

    It looks into tuples, lists, dicts, dataclasses, named tuples, packed sequences and objects with attributes.
    """
    return dict(_walk("", value, ()))


def named_floats(value: Any) -> dict[str, torch.Tensor]:
    """Return those of an output's tensors whose values are floats, by their paths; complex numbers as pairs."""
    tensors = {}
    for name, tensor in named_tensors(value).items():
        if tensor.is_nested or tensor.layout is not torch.strided:
            tensor = tensor.values() if tensor.is_nested else tensor.to_dense()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if tensor.is_floating_point():
            tensors[name] = tensor
    return tensors


def _walk(path: str, value: Any, above: tuple[int, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a value and their paths. above: the ids of what it is in, which it may hold again."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, float):
        yield path, torch.tensor(value, dtype=torch.float64)
    elif id(value) not in above:
        for name, part in _parts(value):
            yield from _walk(f"{path}.{name}" if path else name, part, (*above, id(value)))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a container holds, by name or number."""
    if isinstance(value, rnn.PackedSequence):
        yield "data", value.data
    elif isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None) or map(str, range(len(value)))
        yield from zip(names, value, strict=False)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, _CLOSED) and not callable(value):
        yield from ((name, part) for name, part in vars(value).items() if not isinstance(part, float))  # an option


class Error:
    """Running sums of one tensor's error: Σ y², Σ (y - ŷ)² and max |y - ŷ|, over the `known` finite float values."""

    def __init__(self) -> None:
        self.calls, self.known, self.signal, self.noise, self.largest = 0, 0, 0.0, 0.0, 0.0

    def add(self, expected: torch.Tensor, got: torch.Tensor) -> None:
        """Add another pair. Values that are not finite in float are left out."""
        expected, got = wide(expected), wide(got)
        if not math.isfinite(energy(expected)):
            known = expected.isfinite()
            expected, got = expected[known], got[known]
        difference = expected - got
        self.known += difference.numel()
        noise = energy(difference)
        self.calls += 1
        self.signal += energy(expected)
        self.noise += noise if math.isfinite(noise) else math.inf  # a NaN where the float model has none
        self.largest = max(self.largest, _largest(difference) if math.isfinite(noise) else math.inf)

    @property
    def sqnr_db(self) -> float:
        """10 log10(Σ y² / Σ (y - ŷ)²): infinite without any error, NaN without any pair of finite values."""
        if not self.known:
            return math.nan
        if self.noise == 0:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if ratio else -math.inf

    @property
    def relative_rms(self) -> float:
        """√(Σ (y - ŷ)² / Σ y²)."""
        if not self.known or self.noise == 0:
            return 0.0 if self.known else math.nan
        return math.sqrt(self.noise / self.signal) if self.signal else math.inf

    @property
    def max_error(self) -> float:
        """The largest |y - ŷ|."""
        return self.largest if self.known else math.nan


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor detached, in float32 or wider."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def energy(x: torch.Tensor) -> float:
    """Return Σ x², summed in float64; NaN or infinite where an element is."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _largest(x: torch.Tensor) -> float:
    return max(abs(float(end)) for end in x.aminmax()) if x.numel() else 0.0
