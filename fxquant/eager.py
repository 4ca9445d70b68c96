"""quantize_dynamic: eager mode. Modules are swapped in place; the model's own Python code runs on."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from fxquant.entry import entry
from fxquant.errors import QConfigError
from fxquant.graph.calibrate import gather
from fxquant.graph.call import Inputs, bind_inputs
from fxquant.graph.check.check import checked
from fxquant.graph.eager import convert_tree, plain_mirror, prepare_tree
from fxquant.graph.plan.outcome import judge
from fxquant.graph.plan.rules import check_mapping
from fxquant.graph.record import need_stage, refuse_ours
from fxquant.graph.trace.checks import check_kind
from fxquant.graph.trace.exported import adopt
from fxquant.graph.trace.trace import names_of
from fxquant.operators import OPERATORS, Operator
from fxquant.progress import Progress, count_on_terminal
from fxquant.qconfig import (
    QConfig,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    int16_dynamic_qconfig,
)
from fxquant.qconfig_mapping import QConfigMapping, type_name

What: TypeAlias = type[nn.Module] | str

_BY_DTYPE = {
    "int8": default_dynamic_qconfig,
    "qint8": default_dynamic_qconfig,
    "int16": int16_dynamic_qconfig,
    "float16": float16_dynamic_qconfig,
    "uint8": float_qparams_weight_only_qconfig,
    "quint8": float_qparams_weight_only_qconfig,
    "uint4": float_qparams_weight_only_qconfig_4bit,
    "quint4x2": float_qparams_weight_only_qconfig_4bit,
}


@entry
def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: QConfigMapping | Mapping[What, QConfig | None] | Iterable[What] | None = None,
    dtype: torch.dtype = torch.int8,
    *,
    operators: Iterable[Operator] = OPERATORS,
    strict: bool = False,
    batch_invariant: bool | None = None,
    data: Iterable[Any] | None = None,
    progress: Progress = count_on_terminal,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return a copy of the model, in eval mode, with its modules swapped for quantized ones. It is not traced.

    qconfig_spec: module types and names to quantize; a dict of them to qconfigs (None: float); a QConfigMapping; or
    None for every module of the operator table. dtype: for types and names without a qconfig of their own: torch.int8
    (default_dynamic_qconfig), torch.int16, torch.float16; for embeddings torch.uint8, torch.uint4.
    strict: whether a QConfigError lists what would stay float although no entry of the mapping says so.
    batch_invariant: as for `prepare_fx`, for the swapped modules; products in the model's own code stay torch's. data,
    progress: as for `convert_fx`. example_inputs, example_kwargs: one call's arguments, as for prepare_fx, on which the
    quantized model is checked as by `convert_fx`; without them nothing runs, and nothing is checked.

    This is for models that do not trace; calls of F.linear and the like cannot be quantized here. `fxquant.explain`
    lists what happened to each module; `fxquant.save` and `load` work as for a result of convert_fx.
    Raises ModelStateError, QConfigError, MappingNameError, ExampleInputsError or CheckError.
    """
    refuse_ours(model, "quantize_dynamic")
    model = adopt(model)
    check_kind(model)
    mapping = _as_mapping(qconfig_spec, dtype)
    known = names_of(plain_mirror(model))
    check_mapping(mapping, known)
    inputs = _bound(model, example_inputs, example_kwargs)
    prepared = prepare_tree(model, mapping, tuple(operators), inputs=inputs, batch_invariant=batch_invariant)
    record = need_stage(prepared, "prepared", "quantize_dynamic", "prepare_tree")
    judge(type(model).__name__, record, known, strict=strict)
    hessians = None if data is None else gather(prepared, record.sites, data, progress)
    convert = functools.partial(convert_tree, hessians=hessians)
    return convert(prepared) if inputs is None else checked(prepared, convert)


def _bound(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None) -> Inputs | None:
    """Return the arguments of the call that the model is checked on, None where there are none."""
    if example_inputs is None and example_kwargs is None:
        return None
    return bind_inputs(model, () if example_inputs is None else example_inputs, example_kwargs)


def _as_mapping(spec: Any, dtype: torch.dtype) -> QConfigMapping:
    """Return a qconfig_spec as a mapping."""
    if isinstance(spec, QConfigMapping):
        return spec.copy()
    name = str(dtype).removeprefix("torch.")
    if name not in _BY_DTYPE:
        raise QConfigError(
            f"quantize_dynamic: dtype {dtype} is not one of torch.int8, torch.int16, torch.float16, torch.uint8, "
            "torch.uint4"
        )
    if spec is None:
        return QConfigMapping().set_global(_BY_DTYPE[name])
    if isinstance(spec, (str, type)):
        raise QConfigError(f"quantize_dynamic: qconfig_spec is a set or dict of types and names, {{{type_name(spec)}}}")
    if not isinstance(spec, Iterable):
        raise QConfigError(
            "quantize_dynamic: qconfig_spec is a set or dict of types and names, or fxquant's QConfigMapping, "
            f"got {type(spec).__module__}.{type(spec).__name__}"
        )
    mapping = QConfigMapping()
    for what in spec:
        qconfig = spec[what] if isinstance(spec, Mapping) else _BY_DTYPE[name]
        if isinstance(what, str):
            mapping.set_module_name(what, qconfig)
        else:
            mapping.set_object_type(what, qconfig)
    return mapping
