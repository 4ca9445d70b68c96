"""How poolings, means and padding of values become calls of our operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxquant import ops
from fxquant.operators.values import NEAREST, Arguments

_RANKS: dict[Any, int] = {
    **dict.fromkeys((nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d, nn.AvgPool1d, F.avg_pool1d), 1),
    **dict.fromkeys((nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, nn.AvgPool2d, F.avg_pool2d), 2),
    **dict.fromkeys((nn.AdaptiveAvgPool3d, F.adaptive_avg_pool3d, nn.AvgPool3d, F.avg_pool3d), 3),
    **dict.fromkeys((nn.MaxPool1d, F.max_pool1d, torch.max_pool1d), 1),
    **dict.fromkeys((nn.MaxPool2d, F.max_pool2d, torch.max_pool2d), 2),
    **dict.fromkeys((nn.MaxPool3d, F.max_pool3d, torch.max_pool3d), 3),
}
_PAD_MODES = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}

NewCall = tuple[Callable[..., Any], dict[str, Any]]


def average(kind: Any, given: Arguments, rank: int) -> NewCall:
    """Return the operator of ours that averages, and its arguments beside values and scales. rank: the value's."""
    if kind in (torch.mean, "mean"):
        dims = given.get("dim")
        every = list(range(rank)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
        return ops.mean_value, {"dims": every, "keepdim": bool(given.get("keepdim", False))}
    if "output_size" in given:
        size = _each(given["output_size"], _RANKS[kind])
        if all(part == 1 for part in size):
            return ops.mean_value, {"dims": list(range(-_RANKS[kind], 0)), "keepdim": True}
        return ops.adaptive_pool_value, {"size": size}
    windows = _windows(given, _RANKS[kind])
    more = {"count_include_pad": bool(given.get("count_include_pad", True)), "divisor": given.get("divisor_override")}
    return ops.pool_value, {**windows, **more}


def max_pool(kind: Any, given: Arguments) -> dict[str, Any]:
    """Return the arguments of `ops.max_pool_value` beside the value."""
    return {**_windows(given, _RANKS[kind]), "dilation": _each(given.get("dilation", 1), _RANKS[kind])}


def padding(kind: Any, given: Arguments) -> tuple[list[int], str]:
    """Return the sides that a padding adds, as F.pad takes them, and its mode."""
    if kind is F.pad:
        return list(given["pad"]), str(given.get("mode", "constant"))
    name = str(kind.__name__)
    mode = next((mode for prefix, mode in _PAD_MODES.items() if name.startswith(prefix)), "constant")
    return list(given["padding"]), mode


def resizing(given: Arguments, rank: int) -> dict[str, Any] | None:
    """Return the arguments of `ops.resize_value` beside a value, None where it repeats values. rank: the value's."""
    if given.get("mode", "nearest") in NEAREST:
        return None
    size, factors = given.get("size"), given.get("scale_factor")
    more = {"size": size} if size is not None else {"factors": list(map(float, _each(factors, rank - 2)))}
    return {**more, "align_corners": bool(given.get("align_corners", False))}


def _windows(given: Arguments, rank: int) -> dict[str, Any]:
    kernel, stride = _each(given["kernel_size"], rank), given.get("stride")
    return {
        "kernel": kernel,
        "stride": kernel if stride is None or stride == () or stride == [] else _each(stride, rank),
        "padding": _each(given.get("padding", 0), rank),
        "ceil_mode": bool(given.get("ceil_mode", False)),
    }


def _each(size: Any, rank: int) -> list[Any]:
    is_one = isinstance(size, (int, float)) or size is None
    return [size] * rank if is_one else list(size) * (rank if len(size) == 1 else 1)
