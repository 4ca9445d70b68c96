"""What a model on a CUDA device runs on: Triton's kernels or plain torch, and which of its layers are the latter's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fxquant.nn.base import QuantizedModule
from fxquant.nn.static import StaticQuantizedConv
from fxquant.ops import gpu


@dataclass(frozen=True)
class PlainKind:
    """Layers that have no kernel of Triton's, and why."""

    why: str
    is_one: Callable[[QuantizedModule], bool]


def _is_other_convolution(layer: QuantizedModule) -> bool:
    if not isinstance(layer, StaticQuantizedConv):
        return False
    return layer.groups > 1 or bool(layer.transposed) or len(layer.kernel_size) != 2


PLAIN_KINDS = (
    PlainKind("float16 weights are torch's own float products", lambda layer: layer.qconfig.weight.dtype == "float16"),
    PlainKind("static convolutions in groups, transposed, 1-d or 3-d run in plain torch", _is_other_convolution),
)


def device_of(model: nn.Module) -> torch.device | None:
    """Return the first CUDA device that a model's tensors are on; None where there is none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors if tensor.is_cuda), None)


def runs_on(model: nn.Module) -> tuple[str, ...]:
    """Return the lines that say what runs a model on its CUDA device; none for a model elsewhere."""
    device = device_of(model)
    if device is None:
        return ()
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, QuantizedModule)]
    lines = [f"runs on {device}: {gpu.state(device.index)}"]
    if not gpu.why_not(device.index):
        for kind in PLAIN_KINDS:
            paths = [path for path, layer in layers if kind.is_one(layer)]
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            lines += [f"runs on {device}: {', '.join(paths[:3])}{more}: {kind.why}"] if paths else []
    return tuple(lines)
