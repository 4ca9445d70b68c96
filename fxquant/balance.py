"""Two float models of the same function whose ranges suit integers better: equalized weights, smoothed outliers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fxquant.entry import entry
from fxquant.errors import ArgumentError, warn
from fxquant.graph import edit
from fxquant.graph.balance import equalize_pairs, find_layer_pairs, find_norm_pairs, smooth_pairs
from fxquant.graph.calibrate import run_batch
from fxquant.graph.call import each_batch
from fxquant.graph.module import FxModule
from fxquant.graph.record import need_stage
from fxquant.progress import Progress, count_on_terminal
from fxquant.quantize_fx import fuse_fx


@entry
def equalize_fx(
    model: nn.Module, example_inputs: Any = None, *, example_kwargs: Mapping[str, Any] | None = None
) -> FxModule:
    """Return the model as fuse_fx does, with weights of equal ranges in layers that follow each other, for prepare_fx.

    Each channel between two layers is multiplied by a power of two, which the second one's weights take back, so the
    outputs are those of fuse_fx, to the bit. It pays where weights have one scale a tensor. Between the layers ReLU,
    leaky ReLU, PReLU, pooling, padding with zeros and dropout may stand; ReLU6 and other bounds do not scale along.

    model: in eval mode; it is not changed. On the meta device it is only fused. A warning says that no layers follow
    each other so. Raises as fuse_fx does.
    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction".
    """
    module, fixed = _fused(model, example_inputs, example_kwargs, "equalize_fx")
    if _is_meta(module):
        return module
    pairs = find_layer_pairs(module, fixed)
    if not pairs:
        warn(
            "equalize_fx changed nothing: no two layers follow each other with nothing but ReLU, pooling and the like "
            "between them, which scale along with a channel"
        )
    equalize_pairs(module, pairs)
    return module


@entry
def smooth_fx(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    data: Iterable[Any],
    strength: float = 0.5,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress = count_on_terminal,
) -> FxModule:
    """Return the model as fuse_fx does, LayerNorms' outliers shifted into the weights that read them, for prepare_fx.

    Each channel of a LayerNorm or RMSNorm that only Linear modules read is multiplied by a power of two near
    max |w| ** (1 - strength) / max |x| ** strength, and the weights take it back: the outputs are those of fuse_fx, to
    the bit.

    model: in eval mode; it is not changed. On the meta device it is only fused.
    data: batches as convert_fx takes them, which tell max |x| of each channel.
    strength: from 0 to 1, how much of an outlier goes into the weights. progress: as for convert_fx.
    A warning says that there is no such LayerNorm. Raises as fuse_fx does; ArgumentError for another strength;
    ExampleInputsError for data that does not run. Source: Xiao et al. 2023, "SmoothQuant".
    """
    if not 0 <= strength <= 1:
        raise ArgumentError(f"smooth_fx: strength is from 0 to 1, got {strength}")
    module, fixed = _fused(model, example_inputs, example_kwargs, "smooth_fx")
    if _is_meta(module):
        return module
    pairs = find_norm_pairs(module, fixed)
    if not pairs:
        warn("smooth_fx changed nothing: there is no nn.LayerNorm or nn.RMSNorm that only nn.Linear modules read")
        return module
    smooth_pairs(module, _peaks(module, [pair.source for pair in pairs], data, progress), pairs, strength)
    return module


def _fused(
    model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None, caller: str
) -> tuple[FxModule, frozenset[int]]:
    """Return a model fused, and the modules by id that code beside its graph uses."""
    module = fuse_fx(model, example_inputs, example_kwargs=example_kwargs)
    record = need_stage(module, "fused", caller, "fuse_fx")
    return module, frozenset(map(id, record.preserved.modules(module)))


def _is_meta(module: nn.Module) -> bool:
    """Return whether a model has no values, as where a file is loaded into it: its structure is all that counts."""
    return any(parameter.is_meta for parameter in module.parameters())


def _peaks(module: nn.Module, paths: list[str], data: Iterable[Any], progress: Progress) -> dict[str, torch.Tensor]:
    """Return the greatest magnitude of each channel that some normalizations give while a model runs over data."""
    twin, peaks = edit.mirror(module), {path: torch.zeros(()) for path in paths}

    def watch(path: str) -> Any:
        def see(_: nn.Module, __: Any, y: torch.Tensor) -> None:
            if y.numel():
                peak = y.detach().abs().flatten(0, -2).amax(0).to("cpu", torch.float64)
                peaks[path] = torch.maximum(peaks[path].to(peak), peak)

        return see

    for path in paths:
        twin.get_submodule(path).register_forward_hook(watch(path))
    for number, arguments in enumerate(each_batch(data, module, progress)):
        run_batch(twin, arguments, number)
    return peaks
