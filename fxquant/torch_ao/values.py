"""The values of a torch.ao model in a float graph that has its marks: edges and integer calls, as planning gives them.

Nothing is planned: a value becomes an integer where torch.ao quantizes, and stays one until torch.ao dequantizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant.errors import TorchAoError
from fxquant.graph import edit
from fxquant.graph.observe import observer_path
from fxquant.graph.plan.operands import bounds_of, operands_of
from fxquant.graph.plan.targets import call_name
from fxquant.graph.values import Edge, IntegerCall, Values
from fxquant.nn.fused import FLOAT_TYPES
from fxquant.operators.values import MOVING, NEAREST, Form, arguments_of, find_value_operator
from fxquant.torch_ao.static import SPEC, STATIC_LATER, Qparams, Scales, qparams_of
from fxquant.value_observers import ValueObserver

_FIXED: dict[Any, tuple[float, int]] = {
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"), (1 / 256, 0)),
    **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid), (1 / 256, 0)),
    **dict.fromkeys((nn.Tanh, torch.tanh, F.tanh, "tanh"), (2 / 256, 128)),
}
"""The scale and zero point that some of torch's functions give quantized values, whatever they are given."""


class GivenObserver(ValueObserver):
    """Gives a scale and zero point that are known."""

    is_given = True

    def __init__(self, qparams: Qparams) -> None:
        super().__init__(SPEC)
        self._qparams = qparams
        self.has_seen = True

    def see(self, x: torch.Tensor) -> None:
        """Remember nothing."""

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale and the zero point."""
        return self._qparams


def take_values(module: fx.GraphModule, scales: Scales) -> tuple[Values, dict[str, Qparams]]:
    """Return what a graph's values become, and their scales by the edges' names; remove the marks.

    scales: what is known of modules' results, the marks' too. Raises TorchAoError where torch.ao computes something
    else with integers than we do.
    """
    walk = _Walk(module, scales)
    for node in list(module.graph.nodes):
        walk.visit(node)
    walk.remove_marks()
    return Values(tuple(walk.edges), tuple(walk.calls)), walk.scales


def give_scales(module: nn.Module, scales: Mapping[str, Qparams]) -> None:
    """Put what is known into the place of the observers of a prepared graph."""
    for name, qparams in scales.items():
        edit.swap_module(module, observer_path(name), GivenObserver(qparams))


class _Walk:
    """One walk in the graph's order."""

    def __init__(self, module: fx.GraphModule, scales: Scales) -> None:
        self._module, self._of, self._products = module, scales.of, scales.products
        self.edges: list[Edge] = []
        self.calls: list[IntegerCall] = []
        self.scales: dict[str, Qparams] = {}  # by the edge that has it
        self._edges: dict[fx.Node, Edge] = {}  # of nodes that give integers, marks too
        self._marks: list[fx.Node] = []
        self._done: set[fx.Node] = set()  # what an earlier node does too

    def visit(self, node: fx.Node) -> None:
        """Decide for a node."""
        operands = [part for part in node.all_input_nodes if part in self._edges]
        if node in self._done:
            return
        if self._is_mark(node):
            self._visit_mark(node)
        elif operands and node.op.startswith("call_") and node.target not in (getattr, "size", "dim", "numel"):
            self._visit_call(node)

    def _is_mark(self, node: fx.Node) -> bool:
        return (
            node.op == "call_module"
            and node.target in self._of
            and type(self._module.get_submodule(str(node.target))) is nn.Identity
        )

    def _visit_mark(self, node: fx.Node) -> None:
        qparams = self._of[str(node.target)]
        x = node.args[0]
        assert isinstance(x, fx.Node)
        if qparams is None:
            self._marks.append(node)
            return
        source: Any = x.args[0] if x in self._marks else x
        known = self._edges.get(source) or next((edge for edge in self.edges if edge.at == x.name), None)
        if known is not None and _is_same(self.scales[known.scale_of], qparams):
            self._edges[node] = known  # quantized in the same way once more
        elif known is not None:
            self._own(Edge(name=node.name, at=node.name, scale_of=node.name, spec=SPEC, is_float=True), node, qparams)
            return  # integers of another scale: the mark stays
        else:
            self._own(Edge(name=x.name, at=x.name, scale_of=x.name, spec=SPEC, is_float=True), node, qparams)
        self._marks.append(node)

    def _own(self, edge: Edge, node: fx.Node, qparams: Qparams | None = None) -> None:
        """Add the edge of what a node gives."""
        self.edges.append(edge)
        self._edges[node] = edge
        if qparams is not None:
            self.scales[edge.name] = qparams

    def _visit_call(self, node: fx.Node) -> None:
        module = self._module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is not None and node.target in self._products:
            low = 0.0 if type(module) in FLOAT_TYPES else None
            self._compute(node, Form.PRODUCT, [node.all_input_nodes[0]], self._of.get(str(node.target)), low)
            return
        kind = node.target if module is None else type(module)
        row = find_value_operator(kind)
        operands = operands_of(node, row)
        given = arguments_of(kind, node.args, dict(node.kwargs), module)
        is_known = row is not None and all(x in self._edges for x in operands or [node]) and row.takes(given)
        if not is_known or _is_other(kind, given):
            raise self._refused(node, kind, "has no integer form here")
        assert row is not None
        if row.form in MOVING:
            self._move(node, kind, row.form, operands)
            return
        self._compute(node, row.form, operands, self._scale_of(node, kind, row.form, operands))

    def _scale_of(self, node: fx.Node, kind: Any, form: Form, operands: Sequence[fx.Node]) -> Qparams | None:
        """Return the scale that torch gives a node's result, None where it is that of what it is computed from."""
        if node.op == "call_module" and self._of.get(str(node.target)) is not None:
            return self._of[str(node.target)]
        if kind in _FIXED:
            return qparams_of(*_FIXED[kind])
        if form in (Form.ADDS, Form.MULTIPLIES) and len(operands) == 1:
            number = next(part for part in node.args if not isinstance(part, fx.Node))
            return _moved(self.scales[self._edges[operands[0]].scale_of], form, float(number))  # type: ignore[arg-type]
        return None

    def _move(self, node: fx.Node, kind: Any, form: Form, operands: Sequence[fx.Node]) -> None:
        first, *others = (self._edges[operand] for operand in operands)
        for other in others:
            if not _is_same(self.scales[first.scale_of], self.scales[other.scale_of]):
                raise self._refused(node, kind, "joins values of several scales")
        edge = Edge(name=node.name, at=node.name, scale_of=first.scale_of, spec=SPEC, is_moved=True)
        self._own(edge, node)
        self.calls.append(IntegerCall(node=node.name, form=form, inputs=self._named(operands)))

    def _compute(
        self, node: fx.Node, form: Form, operands: Sequence[fx.Node], qparams: Qparams | None, low: float | None = None
    ) -> None:
        """Add a call that computes new integers, under a scale of its own, the mark's after it, or its operand's."""
        tail, absorbed, high = node, [], None
        (user,) = node.users if len(node.users) == 1 else (None,)
        if form in (Form.ADDS, Form.MULTIPLIES) and qparams is None and user is not None:
            bounds = bounds_of(user.target, None, user) if user.op != "call_module" else None
            if bounds is not None:
                tail, (low, high) = user, bounds
                absorbed.append(user.name)
        marks = [part for part in tail.users if self._is_mark(part) and self._of[str(part.target)] is not None]
        if qparams is None and len(tail.users) == len(marks) == 1:
            qparams = self._of[str(marks[0].target)]
        if qparams is None and form in (Form.PRODUCT, Form.ADDS, Form.MULTIPLIES):
            raise self._refused(node, node.target, "has no scale")
        inputs = self._named(operands)
        scale_of = node.name if qparams is not None else self._edges[operands[0]].scale_of
        edge = Edge(name=node.name, at=tail.name, scale_of=scale_of, spec=SPEC)
        for part in {node, tail}:
            self._edges[part] = edge
        self._own(edge, tail, qparams)
        for mark in marks:
            self._edges[mark] = edge
            self._marks.append(mark)
        self._done |= {tail, *marks} - {node}
        self.calls.append(
            IntegerCall(
                node=node.name, form=form, inputs=inputs, output=node.name, low=low, high=high, absorbed=tuple(absorbed)
            )
        )

    def _named(self, operands: Sequence[fx.Node]) -> tuple[str, ...]:
        return tuple(self._edges[operand].name for operand in operands)

    def _refused(self, node: fx.Node, kind: Any, what: str) -> TorchAoError:
        place = str(node.target) if node.op == "call_module" else node.name
        return TorchAoError(f"{place!r} ({call_name(kind)}) {what}. {STATIC_LATER}")

    def remove_marks(self) -> None:
        """Take the marks out of the graph and the module."""
        for mark in self._marks:
            mark.replace_all_uses_with(mark.args[0])  # type: ignore[arg-type]
            self._module.graph.erase_node(mark)
        self._module.recompile()


def _is_other(kind: Any, given: dict[str, Any]) -> bool:
    """Return whether torch.ao computes something in another way: a mean of all of a value, a linear interpolation."""
    is_whole = kind in (torch.mean, "mean") and given.get("dim") is None
    row = find_value_operator(kind)
    return is_whole or (row is not None and row.form is Form.RESIZES and given.get("mode", "nearest") not in NEAREST)


def _is_same(one: Qparams, other: Qparams) -> bool:
    return torch.equal(one.scale, other.scale) and torch.equal(one.zero_point, other.zero_point)


def _moved(qparams: Qparams, form: Form, number: float) -> Qparams:
    """Return the scale and zero point of x + c or x * c, as torch.ao's quantized tensors move theirs."""
    scale, zero = float(qparams.scale), int(qparams.zero_point)
    if form is Form.MULTIPLIES:
        return qparams_of(scale * abs(number), zero if number > 0 else 255 - zero) if number else qparams_of(1.0, 0)
    moved = zero - round(number / scale)
    if moved < 0:
        return qparams_of((255 - moved) / 255 * scale, 0)
    return qparams_of(moved / 255 * scale, 255) if moved > 255 else qparams_of(scale, moved)
