"""Functional calls: which operand is their weight, the operands' names and shapes, and the calls' names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from fxquant.graph.constants import constant_of
from fxquant.graph.record import Site
from fxquant.operators import CallPattern, Operator, find_operator
from fxquant.qconfig_mapping import type_name


class Target(NamedTuple):
    """A functional call that a Site is about.

    node: the call. operand: what it takes as its weight. weight: the get_attr node that it is made of.
    is_stored_transposed, is_taken_transposed: whether the tensor, and what the call takes, are (I, O) and not (O, I).
    casts: the nodes that cast it on its way.
    """

    node: fx.Node
    operand: fx.Node
    weight: fx.Node
    is_stored_transposed: bool
    is_taken_transposed: bool
    casts: tuple[fx.Node, ...] = ()


def find_target(operator: Operator, node: fx.Node) -> Target | None:
    """Return where an operator's call takes its weight, None if that is not constant."""
    operands = name_operands(operator, node)
    operand = operands.get(operator.weights[0])
    constant = constant_of(operand)
    if operand is None or constant is None:
        return None
    is_taken_transposed = pattern_of(operator, node).is_transposed(operands)
    is_stored_transposed = constant.is_transposed != is_taken_transposed
    return Target(node, operand, constant.source, is_stored_transposed, is_taken_transposed, constant.casts)


def name_operands(operator: Operator, node: fx.Node) -> dict[str, Any]:
    """Return a call's operands by its operator's names for them."""
    return pattern_of(operator, node).name_operands(node.args, node.kwargs)


def product_input(node: fx.Node, site: Site, operators: Sequence[Operator]) -> Any:
    """Return what a static site, which a node calls, multiplies with its weight."""
    operator = find_operator(operators, site.operator) if site.call is not None else None
    if operator is None:
        return node.args[0] if node.args else None
    return name_operands(operator, node)["input"]


def pattern_of(operator: Operator, node: fx.Node) -> CallPattern:
    """Return the pattern of an operator's call; LookupError for another operator's."""
    pattern = operator.find_pattern(node.target)
    if pattern is None:
        raise LookupError(f"{node.name!r} calls {call_name(node.target)}, which is no call of {operator.name!r}")
    return pattern


def example_shape(node: fx.Node) -> tuple[int, ...]:
    """Return the rows, inputs and outputs of a call on the example inputs; indices count as inputs of that size."""
    inputs = next((n.meta.get("tensor_meta") for n in node.all_input_nodes if constant_of(n) is None), None)
    x, y = _first_tensor(inputs), _first_tensor(node.meta.get("tensor_meta"))
    if x is None or y is None or not len(x.shape) * len(y.shape) * y.shape.numel():
        return ()
    outputs = y.shape[-1]
    return y.shape.numel() // outputs, x.shape[-1] if x.dtype.is_floating_point else outputs, outputs


def _first_tensor(meta: Any) -> TensorMetadata | None:
    """Return the first tensor in a value's recorded metadata."""
    parts = pytree.tree_leaves(meta, is_leaf=lambda part: isinstance(part, TensorMetadata))
    return next((part for part in parts if isinstance(part, TensorMetadata)), None)


def call_name(target: Any) -> str:
    """Return a function as one would write it, a method as .name()."""
    if isinstance(target, str):
        return f".{target}()"
    return type_name(target) if not isinstance(target, torch._ops.OpOverload) else str(target)
