"""The file of a quantized model: written by `save`, read by `load`.

Nothing is ever unpickled. The metadata entry "fxquant" is the plan (plan.py), the entry "sha256" a digest.
"""

from __future__ import annotations

import json
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from fxquant import tensor_file
from fxquant.checkpoint.plan import describe_plan, parse_plan, read_record, set_live
from fxquant.checkpoint.rebuild import check_tensors, fill_unsaved, rebuild
from fxquant.errors import CheckpointError, FxQuantError
from fxquant.graph.old_keys import take_old_keys
from fxquant.graph.preserve.extra_state import SUFFIX
from fxquant.graph.record import need_stage, refuse_ours
from fxquant.graph.trace.checks import check_model
from fxquant.graph.trace.exported import adopt
from fxquant.graph.why import Why
from fxquant.operators import OPERATORS, Operator
from fxquant.plain_values import decode, encode


def save(quantized: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized model to one safetensors file, atomically: the file is complete or not there.

    What get_extra_state gives is stored where it is made of plain values and tensors.

    Raises ModelStateError for anything but a result of convert_fx (or load), CheckpointError for a folder that is
    missing, may not be written to, or is in the file's place, for a model that calls layers outside of it, and for
    other extra state.
    """
    record = need_stage(quantized, "quantized", "save", "convert_fx(prepared)")
    astray = [part.path for part in record.skipped if part.why.why is Why.PASSED_BY]
    if astray:
        raise CheckpointError(
            f"{path}: not written: forward calls {', '.join(map(repr, astray))} by a reference from outside of the "
            "model's modules, so that what load makes would call the skeleton's layers, without the saved weights; let "
            "forward call them by attributes of the model"
        )
    state = quantized.state_dict()
    held: dict[str, torch.Tensor] = {}  # the tensors of extra states
    states = {key: encode(state.pop(key), key, held) for key in [*state] if key.endswith(SUFFIX)}
    tensors, aliases = _distinct({**state, **held})
    target = pathlib.Path(path)
    if not target.parent.is_dir():
        raise CheckpointError(f"{path}: cannot be written: there is no folder {str(target.parent)!r}; make it first")
    if target.is_dir():
        raise CheckpointError(f"{path}: cannot be written: it is a folder; name a file in it")
    name = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        name.touch()
        mode = name.stat().st_mode  # what the user's umask gives; save_file would give it to the owner alone
        save_file(
            tensors,
            name,
            {"fxquant": json.dumps(describe_plan(quantized, record, aliases, states)), "sha256": tensor_file.BLANK},
        )
        name.chmod(mode)
        tensor_file.sign(name)
        name.replace(target)
    except BaseException as error:
        name.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise


@torch.inference_mode(False)
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    operators: Sequence[Operator] = OPERATORS,
    mmap: bool = False,
    check: bool = True,
) -> nn.Module:
    """Return the quantized model that `save` wrote.

    model: the float architecture, in eval mode, or what fuse_fx made of it if that was prepared; it may live on the
    meta device, for no float weight is read or made. It is not changed. operators: the table that the
    model was prepared with, if it had operators of your own. check: whether a model that computes something else
    than the saved one (other heads, another activation) is refused.
    mmap: leave the tensors in the file, mapped, and read them at their first use: processes that load the same file
    share that memory, but the file may never be changed in place (docs/checkpoints.md). By default they are read.

    Raises CheckpointError for a file that is damaged, altered, foreign, of another format than this version's,
    or another model's. Warns where code that is not traced comes from another release of its package.
    """
    refuse_ours(model, "load", ("prepared", "quantized"))
    model = adopt(model)
    check_model(model)
    plan, tensors = _read(path, mmap)
    try:
        for name, first in plan["aliases"].items():
            tensors[name] = tensors[first]
        states = {key: decode(state, tensors) for key, state in plan.get("extra_states", {}).items()}
        record = read_record(model, plan, operators, path)
    except FxQuantError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _senseless(path, error) from error
    result = rebuild(model, record, plan, path, check)
    take_old_keys(result, tensors)
    check_tensors(result, tensors, path)
    result.load_state_dict({**tensors, **states}, assign=True)
    set_live(result, plan.get("live", {}))
    fill_unsaved(result, model, path)
    return result


def _senseless(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    """Return the error for a plan whose digest is right but that `save` cannot have written."""
    return CheckpointError(
        f"{path}: its plan cannot be used ({type(error).__name__}: {error}); write it anew with fxquant.save"
    )


def _distinct(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return a state_dict with each tied tensor once, and the first names of the others."""
    first: dict[Any, str] = {}
    tensors, aliases = {}, {}
    for name, tensor in state.items():
        key = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().contiguous()
            if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
                tensors[name] = tensors[name].clone()  # a view of something larger
    return tensors, aliases


def _read(path: str | os.PathLike[str], mmap: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return a checkpoint's plan and tensors; raise CheckpointError unless the file is whole, ours, and of format
    FORMAT.
    """
    try:
        metadata, tensors = tensor_file.read(path, mmap)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    try:
        return parse_plan(metadata, path), tensors
    except (LookupError, TypeError, ValueError) as error:
        raise _senseless(path, error) from error
