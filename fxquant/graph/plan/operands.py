"""What a function of values computes with, and what the example inputs tell about it."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from fxquant.operators.values import Form, ValueOperator
from fxquant.ranges import Fixed

LISTS = (torch.cat, torch.concat, torch.stack)
SHAPED_LIKE = ("view_as", "reshape_as", "expand_as")
"""Methods whose other operand gives only its shape."""
_CLAMPS: dict[Any, tuple[float | None, float | None]] = {
    **dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), (0.0, None)),
    **dict.fromkeys((nn.ReLU6, F.relu6), (0.0, 6.0)),
}
_UNIT: tuple[Any, ...] = (nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_", nn.Hardsigmoid, F.hardsigmoid)
_SIGNED: tuple[Any, ...] = (nn.Tanh, torch.tanh, F.tanh, "tanh", "tanh_")
_DIVISIONS: tuple[Any, ...] = (
    *(operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_", "true_divide"),
)
_BOUNDED = (torch.clamp, torch.clip, "clamp", "clip", F.hardtanh)


Bounds = tuple[float | None, float | None]


def bounds_of(kind: Any, module: Any, node: fx.Node) -> Bounds | None:
    """Return the bounds that a node clamps to, None where it does something else. kind: its function or type."""
    if kind is nn.Hardtanh:
        return float(module.min_val), float(module.max_val)
    if kind in _CLAMPS:
        return _CLAMPS[kind]
    if kind not in _BOUNDED:
        return None
    names = ("min_val", "max_val") if kind is F.hardtanh else ("min", "max")
    default = (-1.0, 1.0) if kind is F.hardtanh else (None, None)
    given = dict(zip(names, node.args[1:], strict=False)) | {n: node.kwargs[n] for n in names if n in node.kwargs}
    low, high = (given.get(name, other) for name, other in zip(names, default, strict=True))
    if not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)):
        return None
    return _number(low), _number(high)


def fixed_range_of(kind: Any) -> Fixed | None:
    """Return the range of a function's values that is known without data. kind: the function or type."""
    return Fixed(0.0, 1.0) if kind in _UNIT else Fixed(-1.0, 1.0) if kind in _SIGNED else None


@dataclass
class Chain:
    """A node, and those after it that it does too."""

    tail: fx.Node
    low: float | None = None
    high: float | None = None
    curve: str = ""
    slope: float = 0.0
    addend: fx.Node | None = None
    absorbed: list[str] = field(default_factory=list)


def operands_of(node: fx.Node, row: ValueOperator | None) -> list[fx.Node]:
    """Return the values that a function of values computes with, none where its arguments have no form."""
    if row is None or not node.args:
        return []
    if node.target in LISTS:
        given = node.args[0]
        nodes = [part for part in given if isinstance(part, fx.Node)] if isinstance(given, (list, tuple)) else []
        return nodes if isinstance(given, (list, tuple)) and len(nodes) == len(given) else []
    first, rest = node.args[0], node.args[1:]
    if row.is_pair:
        both = [part for part in node.args if isinstance(part, fx.Node)]
        return both if len(both) == len(node.args) == 2 and not node.kwargs else []
    if row.form in (Form.ADDS, Form.MULTIPLIES):
        return _pair(node, first, rest)
    return [first] if isinstance(first, fx.Node) else []


def _pair(node: fx.Node, first: Any, rest: tuple[Any, ...]) -> list[fx.Node]:
    """Return both operands of a sum or product, or the one beside a number."""
    if len(rest) != 1 or set(node.kwargs) - {"alpha"} or node.kwargs.get("alpha", 1) != 1:
        return []
    both = [part for part in (first, rest[0]) if isinstance(part, fx.Node)]
    numbers = [part for part in (first, rest[0]) if isinstance(part, (int, float)) and not isinstance(part, bool)]
    if len(both) + len(numbers) != 2 or not both:
        return []
    if node.target in _DIVISIONS and not (numbers and rest[0] in numbers):
        return []
    return both


def is_minus(node: fx.Node) -> bool:
    """Return whether a node subtracts."""
    return node.target in (operator.sub, torch.sub, "sub", "sub_")


def is_float(node: Any) -> bool:
    """Return whether a node gives floating-point tensors on the example inputs, and nothing else."""
    metas = _metas(node)
    return bool(metas) and all(meta.dtype == torch.float32 for meta in metas)


def _metas(node: Any) -> list[TensorMetadata]:
    parts = pytree.tree_leaves(node.meta.get("tensor_meta"), is_leaf=lambda part: isinstance(part, TensorMetadata))
    return [part for part in parts if isinstance(part, TensorMetadata)]


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a node's only tensor on the example inputs, None where it gives several or none."""
    metas = _metas(node)
    return tuple(metas[0].shape) if len(metas) == 1 else None


def _number(bound: Any) -> float | None:
    return None if bound is None or math.isinf(bound) else float(bound)
