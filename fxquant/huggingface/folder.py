"""What a saved folder holds beside the tensors: the plan, in the metadata of each safetensors file.

It is the plan of `fxquant.save`, with two entries more: "guard", the name of an empty tensor under a float weight's
name, whose shape transformers refuses where fxquant.huggingface was not imported; and "likes", the dtypes of float
weights that are not the model's. "aliases" has tied integers only: tied floats are transformers' affair.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fxquant.checkpoint.plan import describe_plan, parse_plan, read_record
from fxquant.errors import CheckpointError, FxQuantError
from fxquant.graph.edit import identity
from fxquant.graph.record import Record
from fxquant.nn import QuantizedModule
from fxquant.nn.stored import LIKE
from fxquant.operators import OPERATORS


def describe(model: nn.Module, record: Record) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata that `save_pretrained` writes. Tied integers are there once."""
    tensors = model.state_dict()
    aliases = _aliases(model)
    for name in aliases:
        del tensors[name]
    guard = _guard(model, record)
    if guard:
        tensors[guard] = torch.empty(0)
    # config.json says what the float model is, and its code is transformers', which changes it in each release.
    plan = {
        **describe_plan(model, record.advance(architecture=None), aliases, {}),
        "guard": guard,
        "likes": _likes(model),
    }
    return tensors, {"fxquant": json.dumps(plan)}


def read(files: Sequence[str] | None) -> dict[str, Any]:
    """Return the plan of a folder's first file. Raises CheckpointError where it has none that this version can read."""
    if not files:
        raise CheckpointError(
            "a quantized model is loaded from the safetensors files of its folder, which hold the plan in their "
            "metadata, but from_pretrained got a state_dict"
        )
    path = files[0]
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return parse_plan(metadata, path)
    except (LookupError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: its metadata holds no plan of fxquant's ({type(error).__name__}: {error}), which save_pretrained "
            "of a quantized model writes; save the model again from where it was quantized"
        ) from error


def place_record(model: nn.Module, plan: dict[str, Any], path: str) -> tuple[Record, dict[str, str]]:
    """Return a plan's record and aliases, in the paths of the model that is loaded.

    It may be of another class than the saved one: the encoder of a classifier, or a classifier around an encoder, as
    transformers loads them; parts that it lacks are left out. Raises CheckpointError for a plan that does not fit.
    """
    try:
        record = read_record(model, plan, OPERATORS, path)
        place = _placing(model)
        sites = [replace(site, path=at) for site in record.sites if (at := place(site.path)) is not None]
        skipped = [replace(part, path=at) for part in record.skipped if (at := place(part.path)) is not None]
        if (plan["model"] == type(model).__name__ and len(sites) < len(record.sites)) or (record.sites and not sites):
            lost = next(site.path for site in record.sites if place(site.path) is None)
            raise CheckpointError(
                f"{path}: was saved from a {plan['model']} with a quantized {lost!r}, which this "
                f"{type(model).__name__} does not have"
            )
        return record.advance(sites=tuple(sites), skipped=tuple(skipped)), _placed_aliases(plan["aliases"], place)
    except FxQuantError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its plan cannot be used ({type(error).__name__}: {error})") from error


def _placed_aliases(aliases: dict[str, str], place: Callable[[str], str | None]) -> dict[str, str]:
    """Return the tied tensors whose modules the model has."""
    placed = {}
    for names in aliases.items():
        owners = [(place(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        if all(owner is not None for owner, _ in owners):
            name, first = (f"{owner}.{last}" for owner, last in owners)
            placed[name] = first
    return placed


def _placing(model: nn.Module) -> Callable[[str], str | None]:
    """Return a function that gives the path in this model of a path in the saved one, or None."""
    known = {path for path, _ in model.named_modules(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."

    def place(path: str) -> str | None:
        return next((at for at in (path, path.removeprefix(prefix), prefix + path) if at in known), None)

    return place


def _aliases(model: nn.Module) -> dict[str, str]:
    """Return the tied buffers of quantized modules: each name but the first, and the first."""
    first: dict[Any, str] = {}
    aliases = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in module.named_buffers(recurse=False) if isinstance(module, QuantizedModule) else ():
            full = f"{path}.{name}"
            if tensor.numel() and first.setdefault(identity(tensor), full) != full:
                aliases[full] = first[identity(tensor)]
    return aliases


def _guard(model: nn.Module, record: Record) -> str:
    """Return the name that the first quantized weight had in the float model, "" where none is quantized."""
    for site in record.sites:
        module = model.get_submodule(site.path)
        if isinstance(module, QuantizedModule) and module._stored:
            return f"{site.path}.{next(iter(module._stored))}"
    return ""


def _likes(model: nn.Module) -> dict[str, str]:
    """Return the dtypes of the float weights that quantized modules stand for, where they are not the model's."""
    likes = {}
    for path, module in model.named_modules():
        like = module._parameters.get(LIKE) if isinstance(module, QuantizedModule) else None
        if like is not None and like.dtype != model.dtype:
            likes[path] = str(like.dtype).removeprefix("torch.")
    return likes
