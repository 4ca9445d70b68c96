"""Rebuilds a quantized model without data, from its plan and the float architecture, and checks a file's tensors."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import fx, nn

from fxquant.errors import CheckpointError, TraceError, nearest, warn
from fxquant.graph import edit
from fxquant.graph.convert.clean import clean
from fxquant.graph.convert.convert import convert, convert_modules
from fxquant.graph.convert.dtypes import set_table_dtypes
from fxquant.graph.eager import plain_mirror
from fxquant.graph.fingerprint.architecture import Architecture, describe, differences
from fxquant.graph.fuse import fuse
from fxquant.graph.module import finish
from fxquant.graph.observe import observe
from fxquant.graph.plan.planner import replay
from fxquant.graph.preserve.extra_state import tensors_of
from fxquant.graph.record import Record, keep_record
from fxquant.graph.trace.trace import trace
from fxquant.nn.stored import dtype_errors


def rebuild(
    model: nn.Module, record: Record, plan: dict[str, Any], path: str | os.PathLike[str], check: bool
) -> nn.Module:
    """Return the quantized model without data: the recorded decisions applied to a mirror on the meta device.

    check: whether another architecture than the recorded one is a CheckpointError.
    """
    saved = record.architecture if check else None
    try:
        result = (_rebuild_graph if record.is_traced else _rebuild_tree)(model, record, saved)
        set_table_dtypes(result, plan.get("dtypes", {}))
        return result
    except _OtherArchitectureError as error:
        raise CheckpointError(
            f"{path}: was made for another model than this {type(model).__name__}: {error}. Build the model as it was "
            "built when it was quantized; if it computes the same nevertheless: load(..., check=False)"
        ) from error
    except (LookupError, AttributeError, TypeError, ValueError, AssertionError, TraceError) as error:
        raise CheckpointError(
            f"{path}: was made for another model than this {type(model).__name__}: {error}"
        ) from error


class _OtherArchitectureError(Exception):
    """The float model is not the one that was saved; the message says how they differ."""


def _rebuild_graph(model: nn.Module, record: Record, saved: Architecture | None) -> nn.Module:
    traced = trace(model, record.operators, "meta", record.constants, record.untraced, keep=record.keep)
    _match(saved, traced.module, model)
    fuse(traced.module, traced.hooked, traced.keep.preserved, only=record.fusions)
    plan = observe(traced.module, replay(traced.module, record.sites, record.operators, record.values))
    module: fx.GraphModule = traced.module
    convert(module, plan.sites, record.operators, batch_invariant=record.batch_invariant, values=plan.values)
    record = record.advance(**traced.kept)
    return finish(clean(module, model, record.preserved), model, record, is_skeleton=True)


def _rebuild_tree(model: nn.Module, record: Record, saved: Architecture | None) -> nn.Module:
    root = plain_mirror(model, "meta")
    _match(saved, root, model)
    root, _ = convert_modules(root, record.sites, record.operators, batch_invariant=record.batch_invariant)
    return keep_record(root, record)


def _match(saved: Architecture | None, root: nn.Module, model: nn.Module) -> None:
    """Raise _OtherArchitectureError unless a model is the saved one; warn where its untraced code may be another."""
    certain, possible = differences(saved, describe(root, model)) if saved is not None else ([], [])
    if certain:
        more = f" (and {len(certain) - 1} more)" if len(certain) > 1 else ""
        raise _OtherArchitectureError(certain[0] + more)
    if possible:
        warn(
            f"this {type(root).__name__} is not traced, and was quantized with another release of its package: "
            f"{possible[0]}; compare its outputs with known ones"
        )


def check_tensors(result: nn.Module, tensors: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless the file's tensors are exactly those that the model needs."""
    needed = tensors_of(result)
    for name, tensor in needed.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: has no tensor {name!r}, which this model needs{nearest(name, tensors)}")
        saved = tensors[name]
        is_cast = bool(dtype_errors({name: tensor}, tensors))
        if saved.shape == tensor.shape and saved.is_floating_point() and tensor.is_floating_point() and is_cast:
            raise CheckpointError(
                f"{path}: {name!r} is {saved.dtype} in the file, but {tensor.dtype} in this model: load "
                f"into a model of the file's dtype, model.to({saved.dtype}), and cast the result"
            )
        if saved.shape != tensor.shape or is_cast:
            raise CheckpointError(
                f"{path}: {name!r} is {tuple(saved.shape)} {saved.dtype}, but this model needs {tuple(tensor.shape)} "
                f"{tensor.dtype}: the checkpoint is another model's"
            )
    extra = sorted(tensors.keys() - needed.keys())
    if extra:
        raise CheckpointError(f"{path}: has {extra[0]!r}, for which this model has no place{nearest(extra[0], needed)}")


def fill_unsaved(result: nn.Module, model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give the buffers that no state_dict holds (persistent=False) the values that the user's model has.

    Raises CheckpointError where that has none either, and for plain tensor attributes without data.
    """
    for name, buffer in list(result.named_buffers()):
        if buffer.device.type == "meta":
            source = edit.get_tensor(model, name)
            if source is None or source.device.type == "meta":
                raise _no_value(path, f"the non-persistent buffer {name!r}")
            owner, _, last = name.rpartition(".")
            result.get_submodule(owner)._buffers[last] = source.detach().clone()
    for owner, module in result.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                raise _no_value(path, f"the attribute {f'{owner}.{name}'.lstrip('.')!r}, which is not a buffer")


def _no_value(path: str | os.PathLike[str], what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: holds no value for {what}, nor does the model, which is on the meta device; build the model on the "
        "CPU and load into that"
    )
