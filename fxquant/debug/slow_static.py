"""Static layers that take longer than float with the kernels in use: what has no kernel, and kinds that were measured.

Measured by `python -m benchmarks.operators --operators static_convolution,...` and in whole networks
(docs/performance.md, static networks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from fxquant.nn.static import StaticQuantizedConv, StaticQuantizedProduct
from fxquant.ops import kernel_info

_LEAST_OUTPUTS = 16  # of a group: so many are computed at once


@dataclass(frozen=True)
class SlowKind:
    """A kind of static layers and why it is slow. is_one: of a layer and the kernels' instruction set, None without."""

    why: str
    is_one: Callable[[StaticQuantizedProduct, str | None], bool]


def _group(layer: StaticQuantizedProduct) -> tuple[int, int] | None:
    """Return a group's inputs and outputs; None for what has no groups."""
    if not isinstance(layer, StaticQuantizedConv) or layer.groups == 1:
        return None
    return layer.in_channels // layer.groups, layer.out_channels // layer.groups


def _has_small_groups(layer: StaticQuantizedProduct, isa: str | None) -> bool:
    group = _group(layer)
    return isa is not None and group not in (None, (1, 1)) and group[1] < _LEAST_OUTPUTS


SLOW_KINDS = (
    SlowKind("without the native library static layers run in plain torch, slower than float", lambda _, isa: not isa),
    SlowKind(
        f"groups of fewer than {_LEAST_OUTPUTS} output channels fill a part of a register: mostly slower than float",
        _has_small_groups,
    ),
)


def slow_static(model: nn.Module) -> Iterator[tuple[list[str], str]]:
    """Yield the paths of a quantized model's static layers of each slow kind that it has, and why that is slow."""
    isa = kernel_info().isa
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, StaticQuantizedProduct)]
    for kind in SLOW_KINDS:
        paths = [path for path, layer in layers if kind.is_one(layer, isa)]
        if paths:
            yield paths, kind.why
