"""The static cases of benchmarks/operators.py: layers from floats to floats, calibrated on what they are called with.

So a case's time holds that of quantizing its inputs, and of turning integers into floats, once each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Maker = Callable[[int, int], tuple[nn.Module, tuple[Any, ...]]]
"""What makes a float module and its inputs from a number of rows (here images) and a size (here channels)."""


class Static(nn.Sequential):
    """Modules that are quantized statically: integers between a quantize and floats, calibrated on the inputs."""


class StaticSum(Static):
    """A sum of two values, which a depthwise convolution of one place reads, so that it is of integers."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the convolution of x + y."""
        return super().forward(x + y)  # type: ignore[no-any-return]


def _images(*make: Callable[[int], nn.Module], inputs: int = 1) -> Maker:
    """Return cases of static layers on images of 8 × 8 with `size` channels."""
    kind = Static if inputs == 1 else StaticSum

    def case(rows: int, size: int) -> tuple[nn.Module, tuple[Any, ...]]:
        module = kind(*(each(size) for each in make)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = (torch.randn(rows, size, 8, 8).contiguous(memory_format=torch.channels_last) for _ in range(inputs))
        return module, tuple(images)

    return case


def _scale(size: int) -> nn.Module:
    return nn.Conv2d(size, size, 1, groups=size)


def _linear(rows: int, size: int) -> tuple[nn.Module, tuple[Any, ...]]:
    return Static(nn.Linear(size, size)), (torch.randn(rows, size),)


# For each static operator of the table, cases by name.
STATIC: dict[str, dict[str, Maker]] = {
    "static linear": {"static_linear": _linear},
    "static convolution": {
        "static_convolution": _images(lambda size: nn.Conv2d(size, size, 3, padding=1)),
        "static_pointwise": _images(lambda size: nn.Conv2d(size, size, 1)),
        "static_depthwise": _images(lambda size: nn.Conv2d(size, size, 3, padding=1, groups=size)),
        "static_sum": _images(_scale, inputs=2),
        "static_max_pool": _images(lambda _: nn.MaxPool2d(3, 1, 1), _scale),
        "static_average_pool": _images(lambda _: nn.AvgPool2d(3, 1, 1), _scale),
    },
}
