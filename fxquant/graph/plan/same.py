"""Subclasses of nn.Linear whose own forward is nn.Linear's in other words, as openai-whisper's and many LLMs' are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fxquant.graph.constants import asks_kind, constant_of, is_cast
from fxquant.graph.plan.targets import name_operands
from fxquant.graph.trace.tracer import TRACING, Tracer
from fxquant.operators import Operator, find_function_operator


def is_linear(module: nn.Module, operators: Sequence[Operator]) -> bool:
    """Return whether a module's forward gives F.linear(input, self.weight, self.bias) and does nothing else.

    Weight and bias may be cast to the input's dtype. module: one that may be traced, a mirror.
    """
    operator = find_function_operator(operators, F.linear)
    is_plain = isinstance(module, nn.Linear) and not module._modules and "forward" not in vars(module)
    if operator is None or not is_plain:
        return False
    try:
        with TRACING:
            graph = Tracer(operators).trace(module)
    except Exception:  # whatever forward does that cannot be traced: then it is not that simple
        return False
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    linear = graph.output_node().args[0]
    if not isinstance(linear, fx.Node) or [node for node in calls if node.target is F.linear] != [linear]:
        return False
    operands = name_operands(operator, linear)
    x, weight, bias = (operands.get(name) for name in ("input", "weight", "bias"))
    rest = (node for node in calls if node is not linear)
    return (
        isinstance(x, fx.Node)
        and x is next(iter(graph.nodes))
        and _is(weight, "weight")
        and (_is(bias, "bias") if module.bias is not None else bias is None)
        and all(is_cast(node) or all(asks_kind(node, part) for part in node.all_input_nodes) for node in rest)
    )


def _is(operand: Any, name: str) -> bool:
    """Return whether an operand is a tensor of the module, cast perhaps, the right way round."""
    constant = constant_of(operand)
    return constant is not None and not constant.is_transposed and constant.source.target == name
