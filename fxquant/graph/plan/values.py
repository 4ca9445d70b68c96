"""Decisions about values: which edges of a static model's graph become integers, where, and with whose scale.

A value is wanted as integers where a static site reads it, or a function of values that itself is wanted so. It is made
as integers where a static site gives it, or a function of values whose operands are integers; a float value that is
wanted is quantized where it is first moved or read. Nothing is changed here: docs/design.md, "values".
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from fxquant.graph.record import NO_VALUES, Edge, IntegerCall, Site, Values
from fxquant.nn.fused import FLOAT_TYPES
from fxquant.operators.values import Form, ValueOperator, arguments_of, find_value_operator
from fxquant.ranges import Fixed
from fxquant.spec import TensorSpec

_LISTS = (torch.cat, torch.concat, torch.stack)
_CLAMPS: dict[Any, tuple[float | None, float | None]] = {
    **dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), (0.0, None)),
    **dict.fromkeys((nn.ReLU6, F.relu6), (0.0, 6.0)),
}
_BOUNDED = (torch.clamp, torch.clip, "clamp", "clip", F.hardtanh)
_MOVING = (Form.KEEPS, Form.PADS, Form.POOLS)
_UNIT: tuple[Any, ...] = (nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_", nn.Hardsigmoid, F.hardsigmoid)
_SIGNED: tuple[Any, ...] = (nn.Tanh, torch.tanh, F.tanh, "tanh", "tanh_")


@dataclass
class _Chain:
    """A node, and those after it that it does too."""

    tail: fx.Node
    low: float | None = None
    high: float | None = None
    addend: fx.Node | None = None
    absorbed: list[str] = field(default_factory=list)


def plan_values(module: fx.GraphModule, sites: Sequence[Site], hooked: frozenset[str] = frozenset()) -> Values:
    """Return what each value of a graph becomes. sites: those that are static count; hooked: modules with hooks."""
    static = {site.path: site for site in sites if site.is_static}
    return _Walk(module, static, hooked).run() if static else NO_VALUES


class _Walk:
    """One walk backward, for what is wanted, and one forward, for what is made."""

    def __init__(self, module: fx.GraphModule, static: dict[str, Site], hooked: frozenset[str]) -> None:
        self._module, self._static, self._hooked = module, static, hooked
        self._nodes = list(module.graph.nodes)
        self._order = {node: number for number, node in enumerate(self._nodes)}
        self._rows = {node: self._row(node) for node in self._nodes}
        self._wanted: dict[fx.Node, TensorSpec] = {}
        self._made: set[fx.Node] = set()  # as integers
        self._moved: set[fx.Node] = set()  # of those, what other values are moved from
        self._quantized: dict[fx.Node, None] = {}  # floats that become integers too
        self._parents: dict[fx.Node, fx.Node] = {}  # of values that share a scale
        self._names: dict[fx.Node, str] = {}  # of made values, where an earlier node gives them
        self._calls: list[IntegerCall] = []

    def run(self) -> Values:
        """Return the decisions."""
        for node in reversed(self._nodes):
            self._want(node)
        done: set[str] = set()
        for node in self._nodes:
            if node.name in done:
                continue
            site = self._site(node)
            if site is not None:
                done |= set(self._make(node, Form.PRODUCT, site).absorbed)
            elif node in self._wanted:
                done |= set(self._visit(node))
        return Values(tuple(self._edges()), tuple(self._calls))

    def _site(self, node: fx.Node) -> Site | None:
        return self._static.get(str(node.target)) if node.op == "call_module" else None

    def _row(self, node: fx.Node) -> ValueOperator | None:
        """Return the operator of a function of values, None where its form has no place for the node's arguments."""
        kind = self._kind(node)
        row = find_value_operator(kind) if node.op in ("call_function", "call_method", "call_module") else None
        if row is None or not _is_float(node) or (node.op == "call_module" and node.target in self._hooked):
            return None
        operands = _operands(node, row)
        if not operands or not all(map(_is_float, operands)):
            return None
        rest = {n for n in node.all_input_nodes if n not in operands}
        module = self._module.get_submodule(str(node.target)) if node.op == "call_module" else None
        given = arguments_of(kind, node.args, dict(node.kwargs), module)
        return None if any(map(_is_float, rest)) or not row.takes(given) else row

    def _kind(self, node: fx.Node) -> Any:
        return type(self._module.get_submodule(str(node.target))) if node.op == "call_module" else node.target

    # Backward

    def _want(self, node: fx.Node) -> None:
        """Note the spec under which a node's readers want it as integers, if they do."""
        for user in node.users:
            site = self._site(user)
            if site is not None and user.args[:1] == (node,):
                assert site.qconfig.activation is not None
                self._note(node, site.qconfig.activation)
            elif user in self._wanted and self._rows[user] is not None and node in _operands(user, self._rows[user]):
                self._note(node, self._wanted[user])

    def _note(self, node: fx.Node, spec: TensorSpec) -> None:
        known = self._wanted.get(node)
        if known is None or known.qmax < spec.qmax:  # who wants it coarser gets it finer
            self._wanted[node] = spec

    # Forward

    def _visit(self, node: fx.Node) -> list[str]:
        """Decide for a wanted node that is no static site; return what it absorbs."""
        row = self._rows[node]
        if row is None:
            self._quantize_for_site(node)
            return []
        operands = _operands(node, row)
        if row.form in _MOVING:
            floats = [operand for operand in operands if operand not in self._made]
            if (self._is_list(node) and floats == operands) or any(_shape(operand) is None for operand in floats):
                self._quantize_for_site(node)  # joined floats, and what a float gives in a tuple
                return []
            self._quantized.update(dict.fromkeys(floats))
            for operand in operands:
                self._join(operand, node)
            self._made.add(node)
            self._moved.add(node)
            self._calls.append(IntegerCall(node=node.name, form=row.form, inputs=self._named(operands)))
            return []
        if all(operand in self._made for operand in operands):
            return self._make(node, row.form).absorbed
        self._quantize_for_site(node)
        return []

    def _quantize_for_site(self, node: fx.Node) -> None:
        """Quantize what float gives where a site reads it; what moves it does so itself."""
        if any(self._site(user) is not None and user.args[:1] == (node,) for user in node.users):
            self._quantized[node] = None

    def _make(self, node: fx.Node, form: Form, site: Site | None = None) -> _Chain:
        """Let a node compute with integers, and do what follows it."""
        row = self._rows[node]
        operands = node.all_input_nodes[:1] if site is not None else _operands(node, row)
        for operand in operands:
            if operand not in self._made:
                self._quantized[operand] = None
        chain = self._absorb(node, site) if site is not None or form in (Form.ADDS, Form.MULTIPLIES) else _Chain(node)
        is_made = chain.tail in self._wanted
        if is_made:
            self._made.add(chain.tail)
            self._names[chain.tail] = node.name
        self._calls.append(
            IntegerCall(
                node=node.name,
                form=form,
                inputs=self._named(operands),
                output=node.name if is_made else "",
                low=chain.low,
                high=chain.high,
                addend=self._named([chain.addend])[0] if chain.addend is not None else "",
                absorbed=tuple(chain.absorbed),
                rank=len(_shape(operands[0]) or ()),
            )
        )
        return chain

    def _absorb(self, node: fx.Node, site: Site | None) -> _Chain:
        """Return what a node can do of what follows it: an addition, by a site, and a clamp."""
        chain = _Chain(node, low=0.0 if self._is_rectified(node) else None)
        while len(chain.tail.users) == 1:
            (user,) = chain.tail.users
            bounds = self._bounds(user)
            if bounds is not None and _operands(user, self._rows[user]) == [chain.tail]:
                chain.low, chain.high = _tighter(chain.low, bounds[0], max), bounds[1]
                chain.tail = user
                chain.absorbed.append(user.name)
                break
            addend = self._addend(node, chain, user) if site is not None else None
            if addend is None:
                break
            chain.addend, chain.tail = addend, user
            chain.absorbed.append(user.name)
        return chain

    def _is_rectified(self, node: fx.Node) -> bool:
        """Return whether a site is one module with its ReLU."""
        return node.op == "call_module" and self._kind(node) in FLOAT_TYPES

    def _addend(self, node: fx.Node, chain: _Chain, user: fx.Node) -> fx.Node | None:
        """Return what an addition adds to what a site gives, if the site can do that."""
        row = self._rows[user]
        if chain.addend is not None or chain.low is not None or row is None or row.form is not Form.ADDS or _is_minus(user):
            return None
        others = [operand for operand in _operands(user, row) if operand is not chain.tail]
        if len(others) != 1 or others[0] not in self._made or self._order[others[0]] > self._order[node]:
            return None
        return others[0] if _shape(others[0]) == _shape(node) else None

    def _bounds(self, node: fx.Node) -> tuple[float | None, float | None] | None:
        """Return the bounds that a node clamps to, None where it does something else."""
        if self._rows[node] is None:
            return None
        kind = self._kind(node)
        if kind is nn.Hardtanh:
            module = self._module.get_submodule(str(node.target))
            return float(module.min_val), float(module.max_val)  # type: ignore[arg-type]
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

    def _is_list(self, node: fx.Node) -> bool:
        return node.target in _LISTS

    # Scales

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self._parents:
            node = self._parents[node]
        return node

    def _join(self, one: fx.Node, other: fx.Node) -> None:
        """Let two values share a scale: that of the earlier one's class."""
        first, second = sorted((self._root(one), self._root(other)), key=self._order.__getitem__)
        if first is not second:
            self._parents[second] = first

    def _named(self, nodes: Sequence[Any]) -> tuple[str, ...]:
        return tuple(self._names.get(node, node.name) for node in nodes)

    def _edges(self) -> Iterator[Edge]:
        """Yield the values that become integers, in the graph's order."""
        classes: dict[fx.Node, TensorSpec] = {}
        values = [node for node in self._nodes if node in self._made or node in self._quantized]
        for node in values:
            spec, root = self._wanted.get(node), self._root(node)
            if spec is not None and (root not in classes or classes[root].qmax < spec.qmax):
                classes[root] = spec
        for node in values:
            root = self._root(node)
            spec = classes[root]
            fixed = self._fixed(node) if root is node else None
            if fixed is not None and not any(self._root(other) is root for other in values if other is not node):
                spec = _with_range(spec, fixed)
            yield Edge(
                name=self._names.get(node, node.name),
                at=node.name,
                scale_of=self._names.get(root, root.name),
                spec=spec,
                is_float=node not in self._made,
                is_moved=node in self._moved,
            )

    def _fixed(self, node: fx.Node) -> Fixed | None:
        """Return the range of a function that is known without data."""
        kind = self._kind(node)
        return Fixed(0.0, 1.0) if kind in _UNIT else Fixed(-1.0, 1.0) if kind in _SIGNED else None


def _with_range(spec: TensorSpec, fixed: Fixed) -> TensorSpec:
    return replace(spec, range=fixed)


def _operands(node: fx.Node, row: ValueOperator | None) -> list[fx.Node]:
    """Return the values that a function of values computes with, none where its arguments have no form."""
    if row is None or not node.args:
        return []
    if node.target in _LISTS:
        given = node.args[0]
        return list(given) if isinstance(given, (list, tuple)) and all(isinstance(n, fx.Node) for n in given) else []
    first, rest = node.args[0], node.args[1:]
    if row.form in (Form.ADDS, Form.MULTIPLIES):
        return _pair(node, row, first, rest)
    return [first] if isinstance(first, fx.Node) else []


def _pair(node: fx.Node, row: ValueOperator, first: Any, rest: tuple[Any, ...]) -> list[fx.Node]:
    """Return both operands of a sum or product, or the one beside a number."""
    if len(rest) != 1 or set(node.kwargs) - {"alpha"} or node.kwargs.get("alpha", 1) != 1:
        return []
    both = [part for part in (first, rest[0]) if isinstance(part, fx.Node)]
    numbers = [part for part in (first, rest[0]) if isinstance(part, (int, float)) and not isinstance(part, bool)]
    if len(both) + len(numbers) != 2 or not both:
        return []
    if node.target in (operator.truediv, torch.div, "div") and not (numbers and rest[0] in numbers):
        return []
    return both


def is_curve(node: fx.Node) -> bool:
    """Return whether a sum or product is one of a value and a number, and so a function of single values."""
    return sum(isinstance(part, fx.Node) for part in node.args[:2]) == 1


def _is_minus(node: fx.Node) -> bool:
    return node.target in (operator.sub, torch.sub, "sub", "sub_")


def _is_float(node: Any) -> bool:
    """Return whether a node gives floating-point tensors on the example inputs, and nothing else."""
    metas = _metas(node)
    return bool(metas) and all(meta.dtype == torch.float32 for meta in metas)


def _metas(node: Any) -> list[TensorMetadata]:
    parts = pytree.tree_leaves(node.meta.get("tensor_meta"), is_leaf=lambda part: isinstance(part, TensorMetadata))
    return [part for part in parts if isinstance(part, TensorMetadata)]


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    metas = _metas(node)
    return tuple(metas[0].shape) if len(metas) == 1 else None


def _tighter(one: float | None, other: float | None, choose: Callable[[float, float], float]) -> float | None:
    return other if one is None else one if other is None else choose(one, other)


def _number(bound: Any) -> float | None:
    return None if bound is None or math.isinf(bound) else float(bound)
