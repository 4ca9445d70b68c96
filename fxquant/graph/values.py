"""What is decided about the values of a static model: the rows that planning writes and everything later reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fxquant.graph.why import Reason
from fxquant.operators.values import Arguments, Form, arguments_of
from fxquant.spec import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One value of a static model that becomes integers.

    name: the node that gives it in the quantized graph, after which its scale and zero point are named. at: the node
    whose result is observed. scale_of: the name of the value whose scale it has: its own, or that of one that it is
    moved from or joined with. is_float: whether float computes it, and it is then quantized. is_moved: whether it only
    holds what other values hold, and is not observed by itself.
    """

    name: str
    at: str
    scale_of: str
    spec: TensorSpec
    is_float: bool = False
    is_moved: bool = False


@dataclass(frozen=True, kw_only=True)
class IntegerCall:
    """One node that computes with integers.

    node: its name; form: what it does. inputs: the edges' names; output: the name of its edge, ""
    where it gives floats. low, high: what it clamps to; curve, slope: what a product ends with in their place, or "";
    addend: the edge that it adds first, or "". absorbed: the nodes after it that it does. rank: the dimensions of its
    input.
    """

    node: str
    form: Form
    inputs: tuple[str, ...]
    output: str = ""
    low: float | None = None
    high: float | None = None
    curve: str = ""
    slope: float = 0.0
    addend: str = ""
    absorbed: tuple[str, ...] = ()
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class FloatValue:
    """One value that stays float between integers. node: what gives it, in the float graph; path: its module's, or "".

    kind: its function or type as one writes it; source: "file.py:12", the user's line, or "".
    """

    node: str
    path: str
    kind: str
    why: Reason
    source: str = ""

    def __str__(self) -> str:
        line = f" at {self.source}" if self.source else ""
        return f"{self.path or self.node} ({self.kind}{line}): {self.why}"


@dataclass(frozen=True)
class Values:
    """What was decided about a graph's values.

    edges: those that become integers; calls: what computes with integers; floats: those between them that do not.
    """

    edges: tuple[Edge, ...] = ()
    calls: tuple[IntegerCall, ...] = ()
    floats: tuple[FloatValue, ...] = ()


NO_VALUES = Values()

"""Those of a model without static sites."""


def function_of(module: fx.GraphModule, node: fx.Node) -> tuple[Any, Arguments]:
    """Return what a node computes, and its arguments beside the value."""
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    kind = node.target if called is None else type(called)
    return kind, arguments_of(kind, node.args, dict(node.kwargs), called)
