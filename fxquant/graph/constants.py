"""Constants in a graph: a parameter or buffer, or its transpose, which is as constant."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

_SWAPS = (torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims")
_PERMUTES = (torch.permute, "permute")


class Constant(NamedTuple):
    """A constant in a graph: the get_attr node of a tensor, and whether it is that matrix's transpose."""

    source: fx.Node
    is_transposed: bool


def constant_of(operand: Any) -> Constant | None:
    """Return the constant that an operand is, through any number of transpositions; None if it is none."""
    is_transposed = False
    while is_transposition(operand):
        operand, is_transposed = operand.args[0], not is_transposed
    if isinstance(operand, fx.Node) and operand.op == "get_attr":
        return Constant(operand, is_transposed)
    return None


def is_transposition(operand: Any) -> bool:
    """Return whether an operand is a node that transposes a matrix: w.t(), w.T, torch.transpose(w, 0, 1), …"""
    if not isinstance(operand, fx.Node) or not operand.args or operand.op not in ("call_function", "call_method"):
        return False
    if operand.target is getattr:
        return operand.args[1] in ("T", "mT")
    dims = pytree.tree_leaves((operand.args[1:], operand.kwargs))
    if not all(isinstance(dim, int) and -2 <= dim < 2 for dim in dims):
        return False
    order = [dim % 2 for dim in dims]
    if operand.target in _PERMUTES:
        return order == [1, 0]
    return sorted(order) == [0, 1] if operand.target in _SWAPS else operand.target in (torch.t, "t")


def transpose(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return a new node, where the graph inserts now, that transposes a matrix."""
    return graph.call_method("t", (node,))
