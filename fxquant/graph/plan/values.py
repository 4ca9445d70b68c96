"""Decisions about values: which edges of a static model's graph become integers, where, and with whose scale.

A value is wanted as integers where a static site reads it, or a function of values that itself is wanted so. It is made
as integers where a static site gives it, or a function of values whose operands are integers; a float value that is
wanted is quantized where it is first moved or read. Nothing is changed here: docs/design.md, "Values".
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from fxquant.graph.plan.floats import find_floats
from fxquant.graph.plan.operands import (
    LISTS,
    SHAPED_LIKE,
    Chain,
    Curve,
    bounds_of,
    curve_of,
    fixed_range_of,
    is_float,
    is_minus,
    operands_of,
    shape_of,
)
from fxquant.graph.plan.targets import product_input
from fxquant.graph.record import Site, Skipped
from fxquant.graph.values import NO_VALUES, Edge, IntegerCall, Values
from fxquant.nn.fused import FLOAT_TYPES, linear_relu
from fxquant.operators import OPERATORS, Operator
from fxquant.operators.values import MOVING, Form, ValueOperator, arguments_of, find_value_operator
from fxquant.spec import TensorSpec


def plan_values(
    module: fx.GraphModule,
    sites: Sequence[Site],
    skipped: Sequence[Skipped],
    hooked: frozenset[str] = frozenset(),
    operators: Sequence[Operator] = OPERATORS,
) -> Values:
    """Return what each value of a graph becomes. sites: those that are static count; hooked: modules with hooks."""
    static = {(site.call is None, site.call or site.path): site for site in sites if site.is_static}
    parts: list[Site | Skipped] = [*sites, *skipped]
    candidates = {part.call or part.path for part in parts}
    return _Walk(module, static, hooked, operators).run(candidates) if static else NO_VALUES


class _Walk:
    """One walk backward, for what is wanted, and one forward, for what is made."""

    def __init__(
        self,
        module: fx.GraphModule,
        static: dict[tuple[bool, str], Site],
        hooked: frozenset[str],
        operators: Sequence[Operator],
    ) -> None:
        self._module, self._static, self._hooked, self._operators = module, static, hooked, operators
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

    def run(self, candidates: Collection[str]) -> Values:
        """Return the decisions. candidates: the paths and names of what is decided about as such."""
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
        integer = {name for call in self._calls for name in (call.node, *call.absorbed)}
        floats = find_floats(self._nodes, self._made, self._quantized, integer, self._wanted, self._kind, candidates)
        return Values(tuple(self._edges()), tuple(self._calls), floats)

    def _site(self, node: fx.Node) -> Site | None:
        is_module = node.op == "call_module"
        return self._static.get((is_module, str(node.target) if is_module else node.name))

    def _reads(self, user: fx.Node, node: fx.Node) -> Site | None:
        """Return the static site that a user of a node is, if the node is its input."""
        site = self._site(user)
        return site if site is not None and product_input(user, site, self._operators) is node else None

    def _row(self, node: fx.Node) -> ValueOperator | None:
        """Return the operator of a function of values, None where its form has no place for the node's arguments."""
        kind = self._kind(node)
        row = find_value_operator(kind) if node.op in ("call_function", "call_method", "call_module") else None
        if row is None or not is_float(node) or (node.op == "call_module" and node.target in self._hooked):
            return None
        operands = operands_of(node, row)
        if not operands or not all(map(is_float, operands)):
            return None
        rest = {n for n in node.all_input_nodes if n not in operands and node.target not in SHAPED_LIKE}
        given = arguments_of(kind, node.args, dict(node.kwargs), self._submodule(node))
        return None if any(map(is_float, rest)) or not row.takes(given) else row

    def _submodule(self, node: fx.Node) -> nn.Module | None:
        return self._module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _kind(self, node: fx.Node) -> Any:
        module = self._submodule(node)
        return node.target if module is None else type(module)

    # Backward

    def _want(self, node: fx.Node) -> None:
        """Note the spec under which a node's readers want it as integers, if they do."""
        for user in node.users:
            site = self._reads(user, node)
            if site is not None:
                assert site.qconfig.activation is not None
                self._note(node, site.qconfig.activation)
            elif user in self._wanted and self._rows[user] is not None and node in operands_of(user, self._rows[user]):
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
        operands = operands_of(node, row)
        if row.form in MOVING:
            floats = [operand for operand in operands if operand not in self._made]
            if (node.target in LISTS and floats == operands) or any(shape_of(operand) is None for operand in floats):
                self._quantize_for_site(node)  # joined floats, and what a float gives in a tuple
                return []
            self._quantized.update(dict.fromkeys(floats))
            for operand in operands:
                self._join(operand, node)
            self._made.add(node)
            self._moved.add(node)
            rank = len(shape_of(operands[0]) or ())
            self._calls.append(IntegerCall(node=node.name, form=row.form, inputs=self._named(operands), rank=rank))
            return []
        if all(operand in self._made for operand in operands):
            return self._make(node, row.form).absorbed
        self._quantize_for_site(node)
        return []

    def _quantize_for_site(self, node: fx.Node) -> None:
        """Quantize what float gives where a site reads it; what moves it does so itself."""
        if any(self._reads(user, node) is not None for user in node.users):
            self._quantized[node] = None

    def _make(self, node: fx.Node, form: Form, site: Site | None = None) -> Chain:
        """Let a node compute with integers, and do what follows it."""
        row = self._rows[node]
        operands = operands_of(node, row) if site is None else [product_input(node, site, self._operators)]
        for operand in operands:
            if operand not in self._made:
                self._quantized[operand] = None
        has_clamp = site is not None or form in (Form.ADDS, Form.MULTIPLIES) or self._has_channels(node)
        chain = self._absorb(node, site) if has_clamp else Chain(node)
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
                curve=chain.curve.name,
                slope=chain.curve.slope,
                addend=self._named([chain.addend])[0] if chain.addend is not None else "",
                absorbed=tuple(chain.absorbed),
                rank=len(shape_of(operands[0]) or ()),
            )
        )
        return chain

    def _has_channels(self, node: fx.Node) -> bool:
        """Return whether a function of values is one for each channel."""
        row, module = self._rows[node], self._submodule(node)
        given = arguments_of(self._kind(node), node.args, dict(node.kwargs), module)
        return row is not None and row.form is Form.LOOKS_UP and row.channels(given) > 0

    def _absorb(self, node: fx.Node, site: Site | None) -> Chain:
        """Return what a node can do of what follows it: an addition or a curve, by a site, and a clamp."""
        chain = Chain(node, low=0.0 if self._is_rectified(node) else None)
        while len(chain.tail.users) == 1:
            (user,) = chain.tail.users
            bounds = bounds_of(self._kind(user), self._submodule(user), user) if self._rows[user] else None
            if bounds is not None and operands_of(user, self._rows[user]) == [chain.tail]:
                chain.low, chain.high = _higher(chain.low, bounds[0]), bounds[1]
                chain.tail = user
                chain.absorbed.append(user.name)
                break
            curve = self._curve(chain, site, user)
            if curve is not None:
                chain.curve, chain.tail = curve, user
                chain.absorbed.append(user.name)
                break
            addend = self._addend(node, chain, user) if site is not None else None
            if addend is None:
                break
            chain.addend, chain.tail = addend, user
            chain.absorbed.append(user.name)
        return chain

    def _curve(self, chain: Chain, site: Site | None, user: fx.Node) -> Curve | None:
        """Return the curve that a node is, if a site may do it: its integers are wanted, and there is no bound yet."""
        if site is None or (chain.low, chain.high) != (None, None) or user not in self._wanted or not self._rows[user]:
            return None
        return curve_of(self._kind(user), self._submodule(user), user)

    def _is_rectified(self, node: fx.Node) -> bool:
        """Return whether a site is one module with its ReLU."""
        return node.target is linear_relu or (node.op == "call_module" and self._kind(node) in FLOAT_TYPES)

    def _addend(self, node: fx.Node, chain: Chain, user: fx.Node) -> fx.Node | None:
        """Return what an addition adds to what a site gives, if the site can do that."""
        row = self._rows[user]
        if (
            chain.addend is not None
            or chain.low is not None
            or row is None
            or row.form is not Form.ADDS
            or is_minus(user)
        ):
            return None
        others = [operand for operand in operands_of(user, row) if operand is not chain.tail]
        if len(others) != 1 or others[0] not in self._made or self._order[others[0]] > self._order[node]:
            return None
        return others[0] if shape_of(others[0]) == shape_of(node) else None

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
            fixed = fixed_range_of(self._kind(node)) if root is node else None
            if fixed is not None and not any(self._root(other) is root for other in values if other is not node):
                spec = replace(spec, range=fixed)
            yield Edge(
                name=self._names.get(node, node.name),
                at=node.name,
                scale_of=self._names.get(root, root.name),
                spec=spec,
                is_float=node not in self._made,
                is_moved=node in self._moved,
            )


def _higher(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else max(one, other)
