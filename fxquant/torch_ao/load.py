"""from_torch_ao and load_torch_ao: conversion of models that torch.ao quantized. Integers and scales are kept.

The float architecture is given, or that of torch.ao's modules, and converted as usual, by module swap or as a graph,
except that each weight gets torch.ao's integers.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxquant.errors import ModelStateError, TorchAoError, nearest
from fxquant.graph import edit
from fxquant.graph.convert.clean import clean
from fxquant.graph.convert.convert import WeightCache, convert, convert_modules
from fxquant.graph.fingerprint.architecture import describe
from fxquant.graph.fuse import fuse
from fxquant.graph.module import finish
from fxquant.graph.observe import observe
from fxquant.graph.plan.planner import plan, plan_modules
from fxquant.graph.plan.targets import name_operands
from fxquant.graph.record import keep_record, record_of
from fxquant.graph.trace.trace import Traced, trace
from fxquant.graph.trace.tracer import SCOPE
from fxquant.graph.trace.verify import tensors_meta
from fxquant.nn.static import StaticQuantizedProduct
from fxquant.operators import OPERATORS, find_function_operator
from fxquant.qconfig import QConfig, default_dynamic_qconfig
from fxquant.torch_ao.architecture import architecture_of, marked
from fxquant.torch_ao.packed import Packed
from fxquant.torch_ao.state import Contents, Weight, unpack
from fxquant.torch_ao.static import Scales
from fxquant.torch_ao.values import give_scales, take_values

_WHOLE_MODEL = (
    "with a float model beside it, a state_dict is expected, of which only tensors are read. If it is a whole model, "
    "from someone you trust: load_torch_ao(path), or from_torch_ao(torch.load(path, weights_only=False), model)"
)


@torch.inference_mode(False)
def from_torch_ao(
    quantized: nn.Module | Mapping[str, Any],
    model: nn.Module | None = None,
    *,
    qconfig: QConfig = default_dynamic_qconfig,
) -> nn.Module:
    """Return fxquant's form of a model that torch.ao quantized dynamically, with the same integers and scales.

    quantized: a result of torch.ao's quantize_dynamic or convert_fx, or its state_dict. It is not changed.
    model: the float architecture, on any device; its weights are not read, and it is not changed. A state_dict needs
    it; without it, the result of convert_fx does not tell where the weight of an F.linear stood or what a BatchNorm was
    folded into, so that `fxquant.load` could not put a checkpoint of it into the float architecture.
    qconfig: its activation half says how inputs become integers: by default 8 bits, one scale a token; torch.ao's is
    per_tensor_dynamic_qconfig.with_reduce_range(). The weight half is torch.ao's.

    What comes back is an FxModule where torch.ao's was a graph or a graph is needed to place the weights of F.linear
    calls and folded BatchNorms, else a model of the user's own class, as quantize_dynamic gives. Linear, LinearReLU,
    F.linear, LSTM, GRU, the cells, Embedding (8- and 4-bit), EmbeddingBag; float16 weights too.

    Raises TorchAoError for static quantization, a state_dict of another model, or what this torch cannot unpack;
    ModelStateError or TraceError for a model that is needed as a graph and gives none.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TorchAoError(f"from_torch_ao takes the float model as an nn.Module, got {type(model).__name__}")
    for argument in (quantized, model):
        if record_of(argument) is not None:
            raise ModelStateError("from_torch_ao takes torch.ao's model and the float one; this went through fxquant")
    scales = Scales()
    if isinstance(quantized, nn.Module):
        state = quantized.state_dict()
        architecture = architecture_of(quantized, scales) if model is None else marked(model, state, scales)
    elif isinstance(quantized, Mapping) and model is not None:
        state, architecture = dict(quantized), marked(model, quantized, scales)
    else:
        got = "a state_dict alone" if isinstance(quantized, Mapping) else type(quantized).__name__
        raise TorchAoError(
            "from_torch_ao takes a model that torch.ao quantized, or its state_dict with the float model beside it: "
            f"from_torch_ao(state_dict, model); got {got}"
        )
    contents = unpack(state, architecture, qconfig, scales)
    if scales.of or _needs_graph(architecture, contents):
        result = _as_graph(architecture, contents, scales, model if scales.of else None)
    else:
        result = _as_tree(architecture, contents)
    _check_filled(result)
    return result


def load_torch_ao(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, qconfig: QConfig = default_dynamic_qconfig
) -> nn.Module:
    """Return fxquant's form of a torch.ao model that was saved with torch.save; see `from_torch_ao`.

    path: a file of its state_dict, for which the float model is needed; only tensors are read from it
    (weights_only=True), nothing is unpickled. Without `model`, a file of the whole model: that one is unpickled, which
    runs whatever code is in it, so that it must come from someone you trust.

    Raises TorchAoError for a file that cannot be read so, and as `from_torch_ao`.
    """
    try:
        with torch.serialization.safe_globals([(Packed, "torch.ScriptObject")]):
            held = torch.load(path, map_location="cpu", weights_only=model is not None)
    except OSError as error:
        raise TorchAoError(f"{path}: cannot be opened: {error.strerror}") from error
    except Exception as error:  # unpickling may raise anything
        hint = "the classes in it must be importable" if model is None else _WHOLE_MODEL
        raise TorchAoError(f"{path}: torch {torch.__version__} cannot read it: {hint}") from error
    return from_torch_ao(held, model, qconfig=qconfig)


def _needs_graph(architecture: nn.Module, contents: Contents) -> bool:
    """Return whether only a graph has places for the contents: F.linear calls, folded BatchNorms."""
    means = {name for name in architecture.state_dict() if name.endswith("running_mean")}
    return isinstance(architecture, fx.GraphModule) or bool(contents.calls) or not means <= contents.floats.keys()


def _as_tree(architecture: nn.Module, contents: Contents) -> nn.Module:
    """Return the architecture with its modules swapped, as quantize_dynamic does."""
    root = edit.mirror(architecture).eval()
    described = describe(root)
    cache = _fill(root, contents, architecture)
    decided = plan_modules(root, contents.mapping, OPERATORS)
    root, sites = convert_modules(root, decided.sites, OPERATORS, cache)
    record = decided.record(architecture, architecture=described)
    return keep_record(root, record.advance(stage="quantized", sites=sites))


def _as_graph(architecture: nn.Module, contents: Contents, scales: Scales, model: nn.Module | None = None) -> nn.Module:
    """Return the architecture as a graph, as prepare_fx and convert_fx give; a BatchNorm that was not folded stays.

    model: the float one, of which a static architecture is a copy with marks.
    """
    traced = _trace(architecture)
    described = describe(traced.module if model is None else _trace(model).module, model or architecture)
    norms = {name.rpartition(".")[0] for name in contents.floats if name.endswith(".running_mean")}
    fusions, _ = fuse(traced.module, traced.hooked | norms)
    _place_calls(traced, contents)
    cache = _fill(traced.module, contents, architecture)
    values, qparams = take_values(traced.module, scales)
    decided = replace(plan(traced, contents.mapping, OPERATORS), values=values)
    decided = observe(traced.module, decided)
    give_scales(traced.module, qparams)
    sites = convert(traced.module, decided.sites, OPERATORS, cache, values=values)
    for part in traced.module.modules():
        if isinstance(part, StaticQuantizedProduct) and part.bias.is_meta:  # torch.ao's had none
            part.set_bias("bias", torch.zeros(part.out_features))
    record = decided.record(architecture, traced, fusions=fusions, architecture=described)
    record = record.advance(stage="quantized", sites=sites)
    return finish(clean(traced.module, architecture), architecture, record)


def _trace(model: nn.Module) -> Traced:
    return trace(model, OPERATORS, keep_whole=True, folds=False)  # its weights are not read


def _place_calls(traced: Traced, contents: Contents) -> None:
    """Give each packed weight to its F.linear call: torch.ao numbers them in a module's scope, in the graph's order."""
    operator = find_function_operator(OPERATORS, torch.nn.functional.linear)
    assert operator is not None
    known, numbers, indices = set(contents.floats), collections.Counter[str](), collections.Counter[str]()
    for node in traced.module.graph.nodes:
        if node.op != "call_function" or node.target not in operator.functions:
            continue
        scope = node.meta.get(SCOPE, "")
        index, indices[scope] = indices[scope], indices[scope] + 1
        operands = name_operands(operator, node)
        weight, bias = operands["weight"], operands.get("bias")
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or str(weight.target) in known:
            continue  # torch.ao left it float
        prefix = scope.replace(".", "_")
        packed = contents.calls.pop((prefix, numbers[prefix]), None)
        numbers[prefix] += 1
        if packed is None:
            raise TorchAoError(f"torch.ao's state_dict has no weight for the F.linear of {str(weight.target)!r}")
        for constant in (part for part in (weight, bias) if isinstance(part, fx.Node) and part.op == "get_attr"):
            constant.meta["tensor_meta"] = tensors_meta(edit.get_tensor(traced.module, str(constant.target)))
        contents.weights[str(weight.target)] = packed[0]
        if isinstance(bias, fx.Node) and packed[1] is not None:
            contents.floats[str(bias.target)] = packed[1]
        contents.mapping.set_module_name_object_type_order(scope, torch.nn.functional.linear, index, packed[0].qconfig)
    for scope, number in contents.calls:
        raise TorchAoError(f"the model has no call of F.linear for the packed weight {number} of module {scope!r}")


def _fill(skeleton: nn.Module, contents: Contents, architecture: nn.Module) -> WeightCache:
    """Fill in the float tensors, and tensors without data for the quantized weights; return the integers of these."""
    cache, known, expected = WeightCache(), architecture.state_dict().keys(), skeleton.state_dict(keep_vars=True)
    values: dict[str, torch.Tensor | Weight] = {**contents.floats, **contents.weights}
    for name in sorted(values.keys() - expected.keys() - known):
        raise TorchAoError(
            f"torch.ao's state_dict has {name!r}, for which the model has no place{nearest(name, expected)}"
        )
    placed: dict[tuple[int, bool], torch.Tensor] = {}
    done: set[tuple[int, str]] = set()
    for name in sorted(expected, key=lambda name: name not in contents.weights):
        value, old = values.get(name), expected[name]
        path, _, last = name.rpartition(".")
        owner = skeleton.get_submodule(path)
        if value is None and (name in known or isinstance(old, nn.Parameter)):
            raise TorchAoError(f"torch.ao's state_dict has no {name!r}, which the model needs{nearest(name, values)}")
        if value is None or (id(owner), last) in done:
            continue  # a constant of the graph itself; a module's second name, under which torch.ao leaves it float
        if value.shape != old.shape:
            theirs, ours = tuple(value.shape), tuple(old.shape)
            raise TorchAoError(f"{name!r} is {theirs} in torch.ao's state_dict, {ours} in the model")
        is_weight = isinstance(value, Weight)
        new = torch.empty_like(old, device="meta") if isinstance(value, Weight) else value.detach().clone()
        new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        new = placed.setdefault((id(old), is_weight), new)  # tied ones stay tied
        if isinstance(value, Weight):
            cache.give(new.transpose(0, 1) if value.is_turned else new, value.qconfig, value.quantized)
        setattr(owner, last, new)  # not register_…: nn.RNN keeps a list of its weights up to date so
        done.add((id(owner), last))
    return cache


def _check_filled(result: nn.Module) -> None:
    """Raise TorchAoError for a tensor without data: a weight that is no site, a buffer that no state_dict holds."""
    record = record_of(result)
    assert record is not None
    for name, tensor in (*result.named_parameters(), *result.named_buffers()):
        if tensor.is_meta:
            why = next((part.reason for part in record.skipped if name in (part.path, f"{part.path}.weight")), "")
            raise TorchAoError(
                f"{name!r} would have no value: "
                + (
                    why
                    or "no state_dict holds it, nor does the model, which is on the meta device; build it on the CPU"
                )
            )
