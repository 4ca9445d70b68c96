"""Decisions about values: which edges of a static model's graph become integers, where, and with whose scale.

A value is wanted as integers where a static site reads it, or a function of values that itself is wanted so. It is made
as integers where a static site gives it, or a function of values whose operands are integers; a float value that is
wanted is quantized where it is first moved or read. Nothing is changed here: docs/design.md, "Values".
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from fxquant.graph.plan.floats import find_floats
from fxquant.graph.plan.functions import Functions
from fxquant.graph.plan.operands import LISTS, Chain, fixed_range_of, is_minus, shape_of
from fxquant.graph.plan.targets import product_input
from fxquant.graph.pointwise import Ending, ending_of
from fxquant.graph.record import Site, Skipped
from fxquant.graph.values import NO_VALUES, Edge, IntegerCall, Values
from fxquant.nn.fused import FLOAT_TYPES, linear_relu
from fxquant.operators import OPERATORS, Operator
from fxquant.operators.values import MOVING, Form
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
        self._functions = Functions(module, hooked)
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
        kind = self._functions.kind
        floats = find_floats(self._nodes, self._made, self._quantized, integer, self._wanted, kind, candidates)
        return Values(tuple(self._edges()), tuple(self._calls), floats)

    def _site(self, node: fx.Node) -> Site | None:
        is_module = node.op == "call_module"
        return self._static.get((is_module, str(node.target) if is_module else node.name))

    def _reads(self, user: fx.Node, node: fx.Node) -> Site | None:
        """Return the static site that a user of a node is, if the node is its input."""
        site = self._site(user)
        return site if site is not None and product_input(user, site, self._operators) is node else None

    # Backward

    def _want(self, node: fx.Node) -> None:
        """Note the spec under which a node's readers want it as integers, if they do."""
        for user in node.users:
            site = self._reads(user, node)
            if site is not None:
                assert site.qconfig.activation is not None
                self._note(node, site.qconfig.activation)
            elif user in self._wanted and node in self._functions.operands(user):
                self._note(node, self._wanted[user])

    def _note(self, node: fx.Node, spec: TensorSpec) -> None:
        known = self._wanted.get(node)
        if known is None or known.qmax < spec.qmax:  # who wants it coarser gets it finer
            self._wanted[node] = spec

    # Forward

    def _visit(self, node: fx.Node) -> list[str]:
        """Decide for a wanted node that is no static site; return what it absorbs."""
        row, operands = self._functions.row(node), self._functions.operands(node)
        if row is None:
            self._quantize_for_site(node)
            return []
        functions = self._functions.starting(node) if set(operands) <= self._made else ()
        function = next((nodes for nodes in functions if nodes[-1] in self._wanted), None)
        if function is not None:
            return self._make_table(operands[0], function)
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
        if all(operand in self._made for operand in operands) and not row.is_pair:
            return self._make(node, row.form).absorbed
        self._quantize_for_site(node)
        return []

    def _quantize_for_site(self, node: fx.Node) -> None:
        """Quantize what float gives where a site reads it; what moves it does so itself."""
        if any(self._reads(user, node) is not None for user in node.users):
            self._quantized[node] = None

    def _make(self, node: fx.Node, form: Form, site: Site | None = None) -> Chain:
        """Let a node compute with integers, and do what follows it."""
        operands = self._functions.operands(node)
        if site is not None:
            operands = [product_input(node, site, self._operators)]
        for operand in operands:
            if operand not in self._made:
                self._quantized[operand] = None
        has_more = site is not None or form in (Form.ADDS, Form.MULTIPLIES)
        chain = self._absorb(node, site) if has_more else Chain(node)
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
                curve=chain.curve,
                slope=chain.slope,
                addend=self._named([chain.addend])[0] if chain.addend is not None else "",
                absorbed=tuple(chain.absorbed),
                rank=len(shape_of(operands[0]) or ()),
            )
        )
        return chain

    def _make_table(self, source: fx.Node, function: Sequence[fx.Node]) -> list[str]:
        """Let a table be what some nodes make of a value; return those after the first."""
        first, *rest = function
        self._made.add(function[-1])
        self._names[function[-1]] = first.name
        absorbed = tuple(node.name for node in rest)
        self._calls.append(
            IntegerCall(
                node=first.name,
                form=Form.LOOKS_UP,
                inputs=self._named([source]),
                output=first.name,
                absorbed=absorbed,
                rank=len(shape_of(source) or ()),
            )
        )
        return list(absorbed)

    def _absorb(self, node: fx.Node, site: Site | None) -> Chain:
        """Return what a node can do of what follows it: an addition or a curve, by a site, and a clamp."""
        chain = Chain(node, low=0.0 if self._is_rectified(node) else None)
        while True:
            function, ending = self._ending(chain, site)
            if function:
                chain.low, chain.high = _higher(chain.low, ending.low), ending.high
                chain.curve, chain.slope = ending.curve, ending.slope
                chain.tail = function[-1]
                chain.absorbed += [part.name for part in function]
                break
            (user,) = chain.tail.users if len(chain.tail.users) == 1 else (None,)
            addend = self._addend(node, chain, user) if site is not None and user is not None else None
            if addend is None or user is None:
                break
            chain.addend, chain.tail = addend, user
            chain.absorbed.append(user.name)
        return chain

    def _ending(self, chain: Chain, site: Site | None) -> tuple[Sequence[fx.Node], Ending]:
        """Return the longest function of a chain's result, which nothing else reads, that a node can end with.

        A curve only by a site, without bounds, and where its integers are wanted.
        """
        for function in self._functions.after(chain.tail):
            ending = ending_of(self._module, function) if set(chain.tail.users) <= set(function) else None
            is_curve = ending is not None and ending.curve != ""
            may_bend = site is not None and chain.low is None and function[-1] in self._wanted
            if ending is not None and (may_bend or not is_curve):
                return function, ending
        return (), Ending()

    def _is_rectified(self, node: fx.Node) -> bool:
        """Return whether a site is one module with its ReLU."""
        return node.target is linear_relu or (node.op == "call_module" and self._functions.kind(node) in FLOAT_TYPES)

    def _addend(self, node: fx.Node, chain: Chain, user: fx.Node) -> fx.Node | None:
        """Return what an addition adds to what a site gives, if the site can do that."""
        row = self._functions.row(user)
        if (
            chain.addend is not None
            or chain.low is not None
            or row is None
            or row.form is not Form.ADDS
            or is_minus(user)
        ):
            return None
        others = [operand for operand in self._functions.operands(user) if operand is not chain.tail]
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
            fixed = fixed_range_of(self._functions.kind(node)) if root is node else None
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
