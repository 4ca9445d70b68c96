"""Constants in a graph: a parameter or buffer, or its transpose, which is as constant."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

_SWAPS = (
    *(torch.transpose, torch.swapaxes, torch.swapdims, torch.movedim, torch.moveaxis),
    *("transpose", "swapaxes", "swapdims", "movedim", "moveaxis"),
)
_PERMUTES = (torch.permute, "permute")
_TURNS = (torch.t, torch.adjoint, "t", "adjoint")  # the conjugate of a real number is the number
_ATTRIBUTES = {"T": True, "mT": True, "H": True, "mH": True, "data": False}
_SAME = (torch.detach, "detach", "contiguous")

_KINDS = ("dtype", "device", "layout", "is_cuda")
_MAKERS = ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
_LIKENERS = ("to", "type_as")


class Constant(NamedTuple):
    """A constant in a graph: the get_attr node of a tensor, and whether it is that matrix's transpose."""

    source: fx.Node
    is_transposed: bool


def constant_of(operand: Any) -> Constant | None:
    """Return the constant that an operand is, through any number of transpositions; None if it is none."""
    is_transposed = False
    while (is_turned := is_transposition(operand)) is not None:
        operand, is_transposed = operand.args[0], is_transposed != is_turned
    if isinstance(operand, fx.Node) and operand.op == "get_attr":
        return Constant(operand, is_transposed)
    return None


def is_transposition(operand: Any) -> bool | None:
    """Return whether a node gives a matrix transposed (w.t(), w.T, torch.transpose(w, 0, 1), …), or as it is.

    As it is: w.contiguous(), w.detach(), w.data, w.permute(0, 1). None for anything else.
    """
    if not isinstance(operand, fx.Node) or not operand.args or operand.op not in ("call_function", "call_method"):
        return None
    if operand.target is getattr:
        return _ATTRIBUTES.get(str(operand.args[1]))
    if operand.target in _SAME:
        return False
    dims = pytree.tree_leaves((operand.args[1:], operand.kwargs))
    if not all(isinstance(dim, int) and -2 <= dim < 2 for dim in dims):
        return None
    order = [dim % 2 for dim in dims]
    if operand.target in _PERMUTES and sorted(order) == [0, 1]:
        return bool(order == [1, 0])
    if operand.target in _SWAPS and len(order) == 2:
        return bool(order[0] != order[1])
    return True if operand.target in _TURNS else None


def asks_kind(node: fx.Node, operand: fx.Node) -> bool:
    """Return whether a node asks an operand for its dtype and device alone: w.device, w.new_zeros(3), x.to(w), …"""
    if node.target is getattr:
        return node.args[1] in _KINDS
    place = 0 if node.target in _MAKERS else 1 if node.target in _LIKENERS else None
    return node.op == "call_method" and [i for i, arg in enumerate(node.args) if arg is operand] == [place]


def transpose(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return a new node, where the graph inserts now, that transposes a matrix."""
    return graph.call_method("t", (node,))
