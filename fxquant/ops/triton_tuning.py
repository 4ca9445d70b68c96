"""The shapes of a product's tiles, and the choice among them by measurement.

A product of a shape that is new to the process is run in each of a few ways, and the fastest is kept for this number of
tokens, rounded up to a power of two. All give the same bits. While a CUDA graph is captured nothing can be measured:
a shape that is new then takes the first way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

_ROUNDS = 10
_HELD_CYCLES = 1_000_000  # the device waits as long before it begins, so that launches do not wait for Python
_chosen: dict[Hashable, Shape] = {}


@dataclass(frozen=True)
class Shape:
    """A tile's shape, and with how many warps and stages of loading a program computes it.

    tokens: 1 is the kernel of a single token, where the format has one. columns: 0 where groups say it.
    """

    tokens: int
    outputs: int
    columns: int
    warps: int
    stages: int

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """What a launch takes."""
        sizes = {"BN": self.outputs, "BK": self.columns} if self.columns else {"BN": self.outputs}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


_Choice: TypeAlias = dict[int, tuple[Shape, ...]]  # by the most tokens that they are for

_INT8: _Choice = {
    1: (Shape(1, 8, 1024, 4, 1), Shape(1, 16, 512, 4, 1), Shape(1, 4, 2048, 4, 1), Shape(16, 32, 256, 4, 4)),
    15: (Shape(16, 32, 256, 4, 4), Shape(16, 64, 256, 4, 4), Shape(16, 16, 512, 4, 4)),
    31: (Shape(32, 32, 256, 4, 4), Shape(32, 64, 256, 4, 4), Shape(32, 64, 128, 4, 5)),
    63: (Shape(64, 32, 256, 4, 4), Shape(64, 64, 128, 4, 4), Shape(32, 64, 256, 4, 4)),
    1023: (Shape(64, 64, 128, 4, 4), Shape(128, 64, 128, 4, 4), Shape(128, 128, 128, 8, 4), Shape(64, 32, 256, 4, 4)),
    1 << 62: (Shape(128, 128, 128, 8, 4), Shape(128, 256, 128, 8, 3), Shape(128, 256, 64, 8, 4)),
}
_GROUPS: _Choice = {
    16: (Shape(16, 32, 0, 4, 4), Shape(16, 16, 0, 2, 5), Shape(16, 64, 0, 4, 3)),
    64: (Shape(32, 64, 0, 4, 3), Shape(64, 64, 0, 4, 3), Shape(16, 64, 0, 4, 4)),
    1 << 62: (Shape(64, 64, 0, 4, 3), Shape(128, 64, 0, 8, 3), Shape(128, 128, 0, 8, 2)),
}
_INT4: _Choice = {
    1: (Shape(1, 16, 0, 4, 1), Shape(1, 8, 0, 4, 1), Shape(1, 8, 0, 2, 1), Shape(16, 16, 0, 2, 5)),
    **_GROUPS,
}
_INT16: _Choice = {
    16: (Shape(16, 32, 128, 4, 3), Shape(16, 16, 128, 2, 4)),
    1 << 62: (Shape(64, 64, 64, 4, 3), Shape(32, 64, 128, 4, 3)),
}
_STATIC: _Choice = {
    15: (Shape(16, 32, 128, 4, 4), Shape(16, 64, 128, 4, 4)),
    4095: (Shape(64, 64, 64, 4, 4), Shape(64, 64, 128, 4, 3), Shape(32, 64, 64, 4, 4)),
    1 << 62: (Shape(128, 64, 64, 4, 4), Shape(128, 128, 64, 8, 3), Shape(64, 64, 64, 4, 4), Shape(128, 64, 32, 4, 4)),
}
_SHAPES = {"static": _STATIC, "int8": _INT8, "int4": _INT4, "int3": _GROUPS, "int16": _INT16}


def shapes(weight_format: str, tokens: int) -> tuple[Shape, ...]:
    """Return the shapes to choose from for a format and so many tokens."""
    return _SHAPES[weight_format][_most(weight_format, tokens)]


def _most(weight_format: str, tokens: int) -> int:
    """Return up to how many tokens the shapes are for that are for so many."""
    return next(most for most in _SHAPES[weight_format] if tokens <= most)


def tuned(key: tuple[Hashable, ...], tokens: int, device: torch.device, launch: Callable[[Shape], None]) -> None:
    """Run a product in its fastest shape. key: what its speed depends on beside the tokens, its format first."""
    name = str(key[0])
    key = (key, (tokens - 1).bit_length(), _most(name, tokens), device.index)
    shape = _chosen.get(key)
    if shape is None:
        known = shapes(name, tokens)
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            shape = known[0]
        else:
            shape = _chosen[key] = min(known, key=lambda one: _measure(one, launch))
    launch(shape)


def _measure(shape: Shape, launch: Callable[[Shape], None]) -> float:
    """Return how long a shape takes, in ms; without end if the device has not the memory for it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    try:
        launch(shape)
    except Exception as error:
        if type(error).__name__ != "OutOfResources":
            raise
        return float("inf")
    torch.cuda._sleep(_HELD_CYCLES)  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(_ROUNDS):
        launch(shape)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)  # type: ignore[no-any-return]
