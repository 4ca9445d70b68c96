"""What writes into its operand, as F.relu(x, inplace=True) does: who reads the operand afterwards, reads the result.

A graph's nodes run one after another, so floats need none of this. But integers, and what rounds in training, are other
tensors than the floats that they stand for, and a write into one does not reach the other.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx

from fxquant.operators.values import MOVES

SHARED = "fxquant_shared"
"""The key in the meta of nodes whose results share memory that is written under one name and read under another."""

_OPERATORS: tuple[Any, ...] = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.ipow, operator.imod),
)
_COPIES: tuple[Any, ...] = (
    *(torch.cat, torch.concat, torch.stack, torch.roll, torch.flip, torch.tile, torch.clone, torch.index_select),
    *("roll", "flip", "repeat", "clone", "index_select"),
)


def read_results(module: fx.GraphModule) -> None:
    """Let nodes read the result of what wrote into their operand, not the operand: the same tensor, so the same bits.

    Whoever reads a view of the operand, or what the operand is a view of, does so through a `.detach()` after the
    write; these values are marked as SHARED.
    """
    for node in list(module.graph.nodes):
        operand = _written(module, node)
        if operand is None or _base(module, operand).op == "get_attr":  # a weight: its readers decide about it
            continue
        after = _later(node)
        results = _views(module, node)
        for part in _views(module, _base(module, operand)) - results:
            late = [user for user in part.users if user in after and user not in results]
            if not late:
                continue
            result = node
            if part is not operand:
                with module.graph.inserting_after(node):
                    result = module.graph.call_method("detach", (part,))
                result.meta.update(part.meta)
                for shared in (result, *_views(module, _base(module, operand))):
                    shared.meta[SHARED] = True
            for user in late:
                user.replace_input_with(part, result)


def _written(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the operand that a node writes into and gives back, if it does."""
    target: Any = node.target
    if node.op == "call_module":
        writes = getattr(module.get_submodule(target), "inplace", False) is True
    elif node.op == "call_method":
        writes = target.endswith("_") and not target.endswith("__")
    elif node.op == "call_function":
        writes = target in _OPERATORS or _asks_inplace(node) or getattr(target, "__name__", "").endswith("_")
    else:
        return None
    operand = node.args[0] if node.args else node.kwargs.get("input")
    return operand if writes and isinstance(operand, fx.Node) else None


def _asks_inplace(node: fx.Node) -> bool:
    """Return whether a function is called with inplace=True."""
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin, or one that takes other arguments
        return False
    return given.arguments.get("inplace") is True


def _later(node: fx.Node) -> set[fx.Node]:
    """Return the nodes after one."""
    found, follower = set(), node.next
    while follower.op != "root":
        found.add(follower)
        follower = follower.next
    return found


def _source(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the operand whose memory a node's result may be."""
    kind: Any = type(module.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    is_view = kind not in _COPIES and (kind in MOVES.functions or kind in MOVES.modules)
    first = node.args[0] if node.args else None
    return first if is_view and isinstance(first, fx.Node) else _written(module, node)


def _base(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    while (source := _source(module, node)) is not None:
        node = source
    return node


def _views(module: fx.GraphModule, node: fx.Node) -> set[fx.Node]:
    """Return a node and those whose results may be its memory."""
    found, waiting = {node}, [node]
    while waiting:
        part = waiting.pop()
        views = [user for user in part.users if user not in found and _source(module, user) is part]
        found.update(views)
        waiting += views
    return found
