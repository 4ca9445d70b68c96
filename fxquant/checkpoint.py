"""save and load: one safetensors file that holds a quantized model's tensors and the plan that made it.

Nothing is ever unpickled. The metadata entry "fxquant" is JSON: format, version, sites, left, fusions, mapping, aliases
of tied tensors, preserved attributes, the dtypes that tables give, extra states and the float model's architecture,
among others (`_describe` makes it); the entry "sha256" is a digest.

FORMAT grows by one with the first change after a release that another version would read wrongly or not at all: a field
more or less in the plan, other names, layouts or meanings of a module's tensors. That change decides whether `load`
still takes older files; a newer one it never does. 1 is the format of 0.1.0, which is not released yet, and may change
as it stands until then.
"""

from __future__ import annotations

import json
import os
import pathlib
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import fx, nn

from fxquant import tensor_file
from fxquant._version import __version__
from fxquant.errors import CheckpointError, FxQuantError, TraceError, nearest, warn
from fxquant.graph import edit
from fxquant.graph.convert.clean import clean
from fxquant.graph.convert.convert import convert, convert_modules
from fxquant.graph.convert.dtypes import set_table_dtypes, table_dtypes
from fxquant.graph.eager import plain_mirror
from fxquant.graph.fingerprint.architecture import Architecture, describe, differences
from fxquant.graph.fuse import fuse
from fxquant.graph.module import finish
from fxquant.graph.observe import observe
from fxquant.graph.old_keys import take_old_keys
from fxquant.graph.plain import plain_site, plain_skipped, plain_unfused, read_site, read_skipped, read_unfused
from fxquant.graph.plan.planner import replay
from fxquant.graph.preserve.extra_state import SUFFIX, tensors_of
from fxquant.graph.preserve.preserve import preserve
from fxquant.graph.record import Coverage, Fusion, Record, keep_record, need_stage, refuse_ours
from fxquant.graph.trace.checks import check_model
from fxquant.graph.trace.exported import adopt
from fxquant.graph.trace.trace import trace
from fxquant.graph.why import Why
from fxquant.nn.base import dtype_errors
from fxquant.operators import OPERATORS, Operator, find_row
from fxquant.plain_values import decode, encode
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import ObjectType, QConfigMapping, type_name

FORMAT = 1


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
            {"fxquant": json.dumps(_describe(quantized, record, aliases, states)), "sha256": tensor_file.BLANK},
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

    model: the float architecture, in eval mode; it may live on the meta device, for no float weight is read or made.
    It is not changed. operators: the table that the model was prepared with, if rows of your own were in it. check:
    whether a model that computes something else than the saved one (other heads, another activation) is refused.
    mmap: leave the tensors in the file, mapped, and read them at their first use: processes that load the same file
    share that memory, but the file may never be changed in place (docs/checkpoints.md). By default they are read.

    Raises CheckpointError for a file that is damaged, altered, foreign, of another format than this version's,
    or another model's. Warns where code that is not traced comes from another release of its package.
    """
    refuse_ours(model, "load")
    model = adopt(model)
    check_model(model)
    plan, tensors = _read(path, mmap)
    try:
        for name, first in plan["aliases"].items():
            tensors[name] = tensors[first]
        states = {key: decode(state, tensors) for key, state in plan.get("extra_states", {}).items()}
        record = _record(model, plan, operators, path)
    except FxQuantError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _senseless(path, error) from error
    result = _rebuild(model, record, plan, path, check)
    take_old_keys(result, tensors)
    _check_tensors(result, tensors, path)
    result.load_state_dict({**tensors, **states}, assign=True)
    _set_live(result, plan.get("live", {}))
    _fill_unsaved(result, model, path)
    return result


def _senseless(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    """Return the error for a plan that is signed but not one that `save` writes."""
    return CheckpointError(
        f"{path}: its plan makes no sense ({type(error).__name__}: {error}); write it anew with fxquant.save"
    )


def _distinct(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return a state_dict with each tied tensor once, and the other names of those."""
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


def _describe(model: nn.Module, record: Record, aliases: dict[str, str], states: dict[str, Any]) -> dict[str, Any]:
    """Return the plan as JSON values."""
    mapping = record.mapping.to_dict()
    return {
        "format": FORMAT,
        "version": __version__,
        "model": type(model).__name__,
        "is_traced": record.is_traced,
        "sites": [plain_site(site) for site in record.sites],
        "left": [plain_skipped(part) for part in record.skipped],
        "fusions": [asdict(fusion) for fusion in record.fusions],
        "mapping": {
            key: _plain(value) if key == "" else [[_plain(part) for part in entry] for entry in value]
            for key, value in mapping.items()
        },
        "aliases": aliases,
        "preserved": list(record.preserved.names),
        "live": {path: _live(model, path) for path in record.live},
        "written": sorted(record.written),
        "unfused": list(map(plain_unfused, record.unfused)),
        "constants": dict(record.constants),
        "untraced": dict(record.untraced),
        "float_bytes": record.float_bytes,
        "coverage": asdict(record.coverage),
        "dtypes": table_dtypes(model),
        "extra_states": states,
        "architecture": None if record.architecture is None else record.architecture.to_plain(),
        "batch_invariant": record.batch_invariant,
    }


def _live(model: nn.Module, path: str) -> list[Any]:
    """Return the value of an attribute in a list, empty where JSON has no such value: the skeleton's is taken then."""
    owner, _, name = path.rpartition(".")
    value = getattr(model.get_submodule(owner), name)
    return [value] if isinstance(value, (bool, int, float, str, type(None))) else []


def _set_live(result: nn.Module, values: dict[str, list[Any]]) -> None:
    """Set the attributes that a graph reads at each call to what they were when it was saved."""
    for path, value in values.items():
        owner, _, name = path.rpartition(".")
        if value:
            setattr(result.get_submodule(owner), name, value[0])


def _plain(part: Any) -> Any:
    """Return one part of a mapping entry as a JSON value: qconfigs as dicts, types by name."""
    if isinstance(part, QConfig):
        return part.to_dict()
    return type_name(part) if callable(part) else part


def _read(path: str | os.PathLike[str], mmap: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return a checkpoint's plan and tensors once the file is known to be whole, ours, and of a format that we read."""
    try:
        metadata, tensors = tensor_file.read(path, mmap)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    try:
        plan: dict[str, Any] = json.loads(metadata["fxquant"])
        is_newer, is_other = plan["format"] > FORMAT, plan["format"] != FORMAT
    except (LookupError, TypeError, ValueError) as error:
        raise _senseless(path, error) from error
    if is_other:
        cure = "upgrade fxquant" if is_newer else "quantize the float model anew, or load the file with that version"
        raise CheckpointError(
            f"{path}: was written by fxquant {plan.get('version')} in format {plan['format']}; this is fxquant "
            f"{__version__}, which reads format {FORMAT}: {cure}"
        )
    return plan, tensors


def _record(
    model: nn.Module, plan: dict[str, Any], operators: Sequence[Operator], path: str | os.PathLike[str]
) -> Record:
    """Return the record that a plan's JSON describes."""
    sites = tuple(map(read_site, plan["sites"]))
    for site in sites:
        if find_row(operators, site.operator) is None:
            raise CheckpointError(
                f"{path}: {site.path!r} needs the operator {site.operator!r}, which is not in the table; "
                "pass load(..., operators=(*OPERATORS, YOUR_ROW))"
            )
    return Record(
        stage="quantized",
        is_traced=plan["is_traced"],
        sites=sites,
        skipped=tuple(map(read_skipped, plan["left"])),
        fusions=tuple(Fusion(path=f["path"], chain=tuple(f["chain"])) for f in plan["fusions"]),
        mapping=_mapping(plan["mapping"], model, operators),
        operators=tuple(operators),
        unfused=tuple(map(read_unfused, plan.get("unfused", ()))),
        preserved=preserve(model, tuple(plan["preserved"])),
        live=tuple(plan.get("live", ())),
        written=frozenset(plan.get("written", ())),
        constants=plan["constants"],
        untraced=plan["untraced"],
        float_bytes=plan["float_bytes"],
        coverage=Coverage(**plan["coverage"]),
        architecture=Architecture.from_plain(plan["architecture"]) if plan.get("architecture") else None,
        batch_invariant=plan.get("batch_invariant"),  # files from before it was asked have none
    )


def _mapping(plain: dict[str, Any], model: nn.Module, operators: Sequence[Operator]) -> QConfigMapping:
    """Return the mapping; a type's name becomes the type where the model or the table has it, else stays a name."""
    kinds: set[ObjectType] = {type(module) for module in model.modules()}
    for row in operators:
        kinds.update(row.modules)
        kinds.update(row.functions)
    by_name = {type_name(kind): kind for kind in kinds}

    def restore(part: Any, is_type: bool) -> Any:
        if isinstance(part, dict):
            return QConfig.from_dict(part)
        return by_name.get(part, part) if is_type else part

    positions = {"object_type": 0, "module_name_object_type_order": 1}
    return QConfigMapping.from_dict(
        {
            key: restore(value, False)
            if key == ""
            else [[restore(part, positions.get(key) == i) for i, part in enumerate(entry)] for entry in value]
            for key, value in plain.items()
        }
    )


def _rebuild(
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
            "built when it was quantized; where it computes the same all the same: load(..., check=False)"
        ) from error
    except (LookupError, AttributeError, TypeError, ValueError, AssertionError, TraceError) as error:
        raise CheckpointError(
            f"{path}: was made for another model than this {type(model).__name__}: {error}"
        ) from error


class _OtherArchitectureError(Exception):
    """The float model is not the one that a file is of; says in what."""


def _rebuild_graph(model: nn.Module, record: Record, saved: Architecture | None) -> nn.Module:
    traced = trace(model, record.operators, "meta", record.constants, record.untraced, keep=record.keep)
    _match(saved, traced.module, model)
    fuse(traced.module, traced.hooked, traced.keep.preserved, only=record.fusions)
    plan = observe(traced.module, replay(traced.module, record.sites, record.operators))
    module: fx.GraphModule = traced.module
    convert(module, plan.sites, record.operators, batch_invariant=record.batch_invariant)
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
            f"{possible[0]}; compare its answers with known ones"
        )


def _check_tensors(result: nn.Module, tensors: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless the file's tensors are just those that the model needs."""
    own = tensors_of(result)
    for name, tensor in own.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: has no tensor {name!r}, which this model needs{nearest(name, tensors)}")
        found = tensors[name]
        is_cast = bool(dtype_errors({name: tensor}, tensors))
        if found.shape == tensor.shape and found.is_floating_point() and tensor.is_floating_point() and is_cast:
            raise CheckpointError(
                f"{path}: {name!r} is {found.dtype} in the file, but {tensor.dtype} in this model: load "
                f"into a model of the file's dtype, model.to({found.dtype}), and cast the result"
            )
        if found.shape != tensor.shape or is_cast:
            raise CheckpointError(
                f"{path}: {name!r} is {tuple(found.shape)} {found.dtype}, but this model needs {tuple(tensor.shape)} "
                f"{tensor.dtype}: the checkpoint is another model's"
            )
    extra = sorted(tensors.keys() - own.keys())
    if extra:
        raise CheckpointError(f"{path}: has {extra[0]!r}, for which this model has no place{nearest(extra[0], own)}")


def _fill_unsaved(result: nn.Module, model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give the buffers that no state_dict holds (persistent=False) the values that the user's model has.

    Raises CheckpointError where that has none either, and for plain tensors without data, which the model's code uses.
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
                raise _no_value(path, f"the attribute {f'{owner}.{name}'.lstrip('.')!r}, which is no buffer")


def _no_value(path: str | os.PathLike[str], what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: holds no value for {what}, nor does the model, which is on the meta device; build the model on the "
        "CPU and load into that"
    )
