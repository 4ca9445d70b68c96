"""Modules quantized where they stand, in the model that transformers loads and returns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fxquant.errors import CheckpointError, TraceError
from fxquant.graph.convert.convert import convert_modules
from fxquant.graph.plan.outcome import judge
from fxquant.graph.plan.planner import plan_modules
from fxquant.graph.plan.rules import check_mapping
from fxquant.graph.record import Record, keep_record
from fxquant.graph.trace.leaves import make_plain
from fxquant.graph.trace.trace import names_of
from fxquant.huggingface.config import FxQuantConfig
from fxquant.nn import QuantizedModule
from fxquant.nn.float_weight import FloatWeight
from fxquant.nn.stored import LIKE
from fxquant.nn.training import frozen
from fxquant.operators import OPERATORS

FloatWeight._is_hf_initialized = True  # type: ignore[attr-defined]  # else transformers' _init_weights would write to it


def quantize(model: PreTrainedModel, config: FxQuantConfig) -> Record:
    """Quantize a loaded float model's modules in place, as `quantize_dynamic` does in a copy; return the record."""
    make_plain(model)
    known, mapping = names_of(model), config.mapping_for(model)
    check_mapping(mapping, known)
    decided = plan_modules(model, mapping, OPERATORS)
    invariant = config.batch_invariant
    record = decided.record(model, batch_invariant=invariant)  # without the architecture: config.json says what it is
    judge(type(model).__name__, record, known, strict=config.strict)
    ties = ties_of(model)
    _, sites = convert_modules(model, record.sites, record.operators, batch_invariant=invariant)
    forget_ties(ties)
    record = record.advance(stage="quantized", sites=sites)
    keep_record(model, record)
    return record


@dataclasses.dataclass
class Skeleton:
    """A quantized model without data. expected: the dtypes of its quantized modules' tensors; frozen: the parameters
    that require no gradient.
    """

    record: Record
    aliases: Mapping[str, str]
    likes: Mapping[str, str]
    expected: Mapping[str, torch.dtype]
    frozen: frozenset[str]
    path: str


def build_skeleton(
    model: PreTrainedModel, record: Record, aliases: Mapping[str, str], plan: dict[str, Any], path: str
) -> Skeleton:
    """Replace a meta model's modules by quantized ones without data; say what has to be loaded into them.

    Raises CheckpointError for a plan whose sites do not fit the model.
    """
    make_plain(model)
    ties = ties_of(model)
    try:
        convert_modules(model, record.sites, record.operators, batch_invariant=record.batch_invariant)
    except (LookupError, AttributeError, TypeError, ValueError, AssertionError, TraceError) as error:
        raise CheckpointError(
            f"{path}: was made for another model than this {type(model).__name__}: {error}"
        ) from error
    forget_ties(ties)
    for name in aliases:  # no file holds them
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._non_persistent_buffers_set.add(last)
    _ignore(model, plan["guard"])
    expected = {name: tensor.dtype for name, tensor in _tensors(model).items() if name not in aliases}
    frozen = frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return Skeleton(record, aliases, plan["likes"], expected, frozen, path)


def fill(model: PreTrainedModel, skeleton: Skeleton) -> Record:
    """Complete a skeleton after its tensors were loaded: ties, frozen biases, dtypes, the record, which is returned.

    Raises CheckpointError where a tensor of a quantized module was not loaded, or has another dtype.
    """
    for name, first in skeleton.aliases.items():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        module._buffers[last] = model.get_buffer(first)
        module._non_persistent_buffers_set.discard(last)
    tensors = _tensors(model)
    for name, dtype in skeleton.expected.items():
        tensor = tensors[name]
        if tensor.is_meta or not getattr(tensor, "_is_hf_initialized", False):
            raise CheckpointError(f"{skeleton.path}: the folder's files have no tensor {name!r}, which the model needs")
        if tensor.dtype != dtype and not (name.endswith(".bias") and tensor.is_floating_point()):
            raise CheckpointError(
                f"{skeleton.path}: {name!r} is {tensor.dtype} in the files, but {dtype} by their plan"
            )
    for name in skeleton.frozen:
        model.get_parameter(name).requires_grad_(False)  # transformers loads all as trainable
    for path, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            _settle(module, skeleton.likes.get(path))
    keep_record(model, skeleton.record)
    return skeleton.record


def _settle(module: QuantizedModule, like_dtype: str | None) -> None:
    """Make the empty parameter that shows the dtype and device of a loaded module's float weights."""
    like = module._parameters.pop(LIKE, None)
    if like is not None:
        device = next(module.buffers(recurse=False)).device
        dtype = like.dtype if like_dtype is None else getattr(torch, like_dtype)
        module._parameters[LIKE] = frozen(torch.empty(0, dtype=dtype, device=device))


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's quantized modules that files hold, by name."""
    return {
        f"{path}.{name}": tensor
        for path, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for name, tensor in (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False))
        if name != LIKE
    }


def _ignore(model: PreTrainedModel, guard: str) -> None:
    """Let transformers' loading report leave the guard out."""
    if guard:
        inner = re.escape(
            guard.removeprefix(f"{model.base_model_prefix}.")
        )  # reports name it with the prefix or without
        known = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*known, rf"(^|\.){inner}$"}


Ties = list[tuple[Any, dict[str, str]]]


def ties_of(model: nn.Module) -> Ties:
    """Return the models in a model, with the parameters that each ties, before they are replaced."""
    return [
        (part, part.get_expanded_tied_weights_keys()) for part in model.modules() if isinstance(part, PreTrainedModel)
    ]


def forget_ties(ties: Ties) -> None:
    """Let transformers tie only what is still a parameter of a float module: fxquant keeps tied integers one tensor."""
    for part, tied in ties:
        part._tied_weights_keys = _still_float(part, tied) or None
        part.all_tied_weights_keys = _still_float(part, getattr(part, "all_tied_weights_keys", {}))


def _still_float(part: nn.Module, tied: Mapping[str, str]) -> dict[str, str]:
    """Return the pairs of which neither belongs to a quantized module."""
    quantized = {path for path, module in part.named_modules() if isinstance(module, QuantizedModule)}
    return {
        target: source
        for target, source in tied.items()
        if not quantized.intersection((target.rpartition(".")[0], source.rpartition(".")[0]))
    }
