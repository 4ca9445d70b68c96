"""Why a candidate stays float, whatever the mapping says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.nn.modules.conv import _ConvNd
from torch.optim.swa_utils import AveragedModel

from fxquant.graph.constants import method_of
from fxquant.graph.plan.targets import Target, call_name, name_operands, pattern_of
from fxquant.graph.preserve.extra_state import has_extra_state
from fxquant.graph.trace.checks import wrapped_in
from fxquant.graph.trace.leaves import known_base, redefined
from fxquant.graph.trace.tracer import forward_of
from fxquant.graph.why import Reason, Why, because
from fxquant.nn.transformer import PLAIN_FORWARDS
from fxquant.operators import Operator
from fxquant.operators.base import refuse_weight
from fxquant.qconfig_mapping import type_name

_CONVOLUTIONS = (
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(F.conv_tbc, torch.convolution),
)


def refuse_call(operator: Operator, target: Target, tensor: torch.Tensor) -> Reason | None:
    """Return why a call with an operator stays float, or None."""
    operands = name_operands(operator, target.node)
    if tensor.dim() != 2 and (target.is_stored_transposed or target.is_taken_transposed):
        return because(Why.NOT_2D, tensor.dim())
    pattern = pattern_of(operator, target.node)
    if len(target.node.args) > len(pattern.operands) or not operands.keys() <= set(pattern.roles or pattern.operands):
        return because(Why.MORE_OPERANDS, ", ".join(pattern.operands))
    if sum(operand is target.operand for operand in operands.values()) > 1:
        return because(Why.WEIGHT_IS_INPUT)
    examples = fx.node.map_arg(operands, lambda node: node.meta.get("tensor_meta"))
    if any(not _keeps_dtype(cast, tensor.dtype) for cast in target.casts) and not _multiplies(operator, examples):
        return because(Why.CAST)
    text = pattern.refuse_call(examples) or refuse_weight(tensor.t() if target.is_stored_transposed else tensor)
    return because(Why.TOLD, text) if text else None


def refuse_module(operator: Operator, module: nn.Module) -> Reason | None:
    """Return why a module with an operator stays float, or None."""
    if has_extra_state(type(module)):
        return because(Why.EXTRA_STATE)
    text = operator.refuse_module(module)
    return because(Why.TOLD, text) if text else None


def _keeps_dtype(cast: fx.Node, dtype: torch.dtype) -> bool:
    """Return whether a cast keeps this dtype."""
    fixed = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
    dtypes = [*cast.args[1:], *cast.kwargs.values()]
    return dtypes == [dtype] or (not dtypes and fixed.get(method_of(cast)) == dtype)


def _multiplies(operator: Operator, examples: dict[str, Any]) -> bool:
    """Return whether a call multiplies its weight, cast to the input's dtype, with a float input."""
    inputs = [meta for name, meta in examples.items() if name not in operator.weights]
    inputs = [meta for meta in inputs if isinstance(meta, TensorMetadata)]
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


def why_hidden(module: nn.Module) -> Reason | None:
    """Return why a module's type does not say what it computes, if so."""
    if isinstance(module, torch.jit.ScriptModule):
        return because(Why.SCRIPTED)
    if wrapped_in(module):
        return because(Why.WRAPPER, type(module).__name__, wrapped_in(module))
    return because(Why.REPLACED_FORWARD) if "forward" in vars(module) else None


def why_unknown(module_type: type[nn.Module], operators: Sequence[Operator]) -> Reason:
    """Return why a weight-bearing module without an operator stays float."""
    known = known_base(module_type, [operator for operator in operators if not operator.is_static])
    if known is not None:
        if module_type.forward is not known.forward:
            return because(Why.OWN_FORWARD, type_name(known))
        return because(Why.REDEFINES, type_name(known), ", ".join(redefined(module_type, known)))
    if not module_type.forward.__module__.startswith("torch."):
        return because(Why.UNTRACED)
    return why_no_form(module_type)


def why_no_form(target: Any) -> Reason:
    """Return why a module type, function or method stays float that no operator covers."""
    is_convolution = issubclass(target, _ConvNd) if isinstance(target, type) else target in _CONVOLUTIONS
    if is_convolution:
        return because(Why.NO_CONVOLUTION, call_name(target))
    return because(Why.NO_BILINEAR if target in (F.bilinear, nn.Bilinear) else Why.NO_FORM, call_name(target))
