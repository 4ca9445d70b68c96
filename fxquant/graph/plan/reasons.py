"""Why a candidate stays float, whatever the mapping says of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.optim.swa_utils import AveragedModel

from fxquant.graph.constants import method_of
from fxquant.graph.plan.targets import Target, name_operands
from fxquant.graph.preserve.extra_state import has_extra_state
from fxquant.graph.trace.leaves import known_base, redefined
from fxquant.graph.trace.trace import wrapped_in
from fxquant.graph.trace.tracer import forward_of
from fxquant.nn.transformer import PLAIN_FORWARDS
from fxquant.operators import Operator
from fxquant.operators.base import refuse_weight
from fxquant.qconfig_mapping import type_name

WHY_KEPT = "code beside the graph uses it as it is"
"""The reason of weights that are no module's and that preserved methods, or modules that are not traced, may read."""


WHY_SET = "preserved code may write into it"
"""The reason of weights that methods change, and that the graph must share with them."""

WHY_WRITTEN = "forward writes into its weight or bias as it runs"
"""The reason of weights that are no constants."""


def refuse_call(row: Operator, target: Target, tensor: torch.Tensor) -> str | None:
    """Return why a call of a row stays float, or None."""
    operands = name_operands(row, target.node)
    if tensor.dim() != 2 and (target.is_stored_transposed or target.is_taken_transposed):
        return f"its weight is {tensor.dim()}-D, not 2-D"
    if len(target.node.args) > len(row.operands) or not operands.keys() <= set(row.operands):
        return f"it is called with more than {', '.join(row.operands)}"
    if sum(operand is target.operand for operand in operands.values()) > 1:
        return "its weight is its input too"
    examples = fx.node.map_arg(operands, lambda node: node.meta.get("tensor_meta"))
    if any(not _keeps_dtype(cast, tensor.dtype) for cast in target.casts) and not _multiplies(row, examples):
        return "its weight is cast to another dtype at each call"
    return row.refuse_call(examples) or refuse_weight(tensor.t() if target.is_stored_transposed else tensor)


def refuse_module(row: Operator, module: nn.Module) -> str | None:
    """Return why a module of a row stays float, or None."""
    if has_extra_state(type(module)):
        return "it keeps extra state (get_extra_state), for which its quantized form has no place"
    return row.refuse_module(module)


def _keeps_dtype(cast: fx.Node, dtype: torch.dtype) -> bool:
    """Return whether a cast gives what it takes."""
    fixed = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
    given = [*cast.args[1:], *cast.kwargs.values()]
    return given == [dtype] or (not given and fixed.get(method_of(cast)) == dtype)


def _multiplies(row: Operator, examples: dict[str, Any]) -> bool:
    """Return whether a call multiplies its weight with a float input, whose dtype, then the weight's, it gives."""
    inputs = [meta for name, meta in examples.items() if name not in row.weights and isinstance(meta, TensorMetadata)]
    return bool(inputs) and all(meta.dtype.is_floating_point for meta in inputs)


def calls_children(module: nn.Module) -> bool:
    """Return whether a module calls its children, so that they may be swapped: a user's forward, a container's, the
    adaptive softmax's, or one of torch's transformers', which `avoid_fast_path` keeps from reading their weights.
    """
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, AveragedModel)):
        return True
    if isinstance(module, nn.MultiheadAttention):  # a subclass's own forward may call super's
        return False
    forward = forward_of(module)
    module_name = getattr(forward, "__module__", None) or ""  # the forward of a GraphModule has none
    if forward is nn.AdaptiveLogSoftmaxWithLoss.forward:
        return True
    return forward in PLAIN_FORWARDS or not module_name.startswith("torch.")


def why_hidden(module: nn.Module) -> str:
    """Return why a module's type does not say what it computes, if so."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled to TorchScript; put the nn.Module that it was made from in its place"
    if wrapped_in(module):
        return f"{type(module).__name__} is a wrapper; put what it holds, its .{wrapped_in(module)}, in its place"
    return "its forward was replaced on the instance" if "forward" in vars(module) else ""


def why_unknown(kind: type[nn.Module], operators: Sequence[Operator]) -> str:
    """Return why a weight-bearing module without a row stays float."""
    known = known_base(kind, operators)
    if known is not None:
        own = "has a forward of its own" if kind.forward is not known.forward else "redefines"
        names = "" if kind.forward is not known.forward else f" {', '.join(redefined(kind, known))}"
        return f"it is a subclass of {type_name(known)} that {own}{names}"
    if not kind.forward.__module__.startswith("torch."):
        return "its forward is not traced, so calls with weights of its own are out of reach"
    return why_no_form(type_name(kind))


def why_no_form(name: str) -> str:
    """Return why a module or call that no row knows stays float."""
    library, _, kind = name.lower().partition(".")
    if library in ("nn", "torch") and "conv" in kind:
        return f"{name} has no dynamic form: of convolutions, the modules nn.Conv1d and nn.Conv2d have one"
    if library in ("nn", "torch") and kind == "bilinear":
        return f"{name} multiplies two inputs with each other; only forms of one input are quantized"
    return f"there is no quantized form of {name}"
