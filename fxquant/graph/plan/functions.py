"""What each node of a graph is to the table of functions of values, and which nodes are one function together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import fx, nn

from fxquant.graph.in_place import SHARED
from fxquant.graph.plan.operands import SHAPED_LIKE, is_float, operands_of
from fxquant.graph.pointwise import functions_after
from fxquant.operators.values import PASSES, Form, ValueOperator, arguments_of, find_value_operator

_POINTWISE = (Form.LOOKS_UP, Form.ADDS, Form.MULTIPLIES)


class Functions:
    """The functions of values in a graph. hooked: modules that must stay as they are, for their hooks."""

    def __init__(self, module: fx.GraphModule, hooked: Collection[str]) -> None:
        self._module, self._hooked = module, hooked
        self._nodes = list(module.graph.nodes)
        self._order = {node: number for number, node in enumerate(self._nodes)}
        self._rows: dict[fx.Node, ValueOperator | None] = {}
        for node in self._nodes:
            self._rows[node] = self._row(node)

    def row(self, node: fx.Node) -> ValueOperator | None:
        """Return the operator of a function of values, None where its form has no place for the node's arguments."""
        return self._rows[node]

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the values that a function of values computes with; nothing for any other node."""
        return operands_of(node, self._rows.get(node))

    def kind(self, node: fx.Node) -> Any:
        """Return the type of the module, or the function or method, that a node calls."""
        module = self.submodule(node)
        return node.target if module is None else type(module)

    def submodule(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, or None."""
        return self._module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def after(self, node: fx.Node) -> Iterator[Sequence[fx.Node]]:
        """Yield the nodes of each function of a node's result, the longest first."""
        return functions_after(node, self._nodes[self._order[node] + 1 :], self._pointwise)

    def starting(self, node: fx.Node) -> Iterator[Sequence[fx.Node]]:
        """Yield the functions of one value that begin with a node and take more than it, the longest first."""
        reads = self._pointwise(node)
        for nodes in self.after(reads[0]) if reads else ():
            if nodes[0] is node and len(nodes) > 1 and any(self.kind(part) not in PASSES for part in nodes):
                yield nodes

    def _row(self, node: fx.Node) -> ValueOperator | None:
        kind = self.kind(node)
        row = find_value_operator(kind) if node.op in ("call_function", "call_method", "call_module") else None
        is_hooked = node.op == "call_module" and node.target in self._hooked
        if row is None or not is_float(node) or is_hooked or SHARED in node.meta:
            return None
        operands = operands_of(node, row)
        if not operands or not all(map(is_float, operands)):
            return None
        rest = {n for n in node.all_input_nodes if n not in operands and node.target not in SHAPED_LIKE}
        if any(map(is_float, rest)) or (rest and row.form is Form.LOOKS_UP):
            return None
        given = arguments_of(kind, node.args, dict(node.kwargs), self.submodule(node))
        return row if row.takes(given) and (not row.is_pair or self._is_of_one(operands)) else None

    def _is_of_one(self, operands: Sequence[fx.Node]) -> bool:
        """Return whether values are functions of a single one."""
        waiting, sources = list(operands), set()
        while waiting:
            node = waiting.pop()
            reads = self._pointwise(node)
            waiting += reads
            sources |= set() if reads else {node}
        return len(sources) == 1

    def _pointwise(self, node: fx.Node) -> list[fx.Node]:
        """Return what a node computes with element by element; nothing for any other node."""
        row = self._rows.get(node)
        return self.operands(node) if row and (row.form in _POINTWISE or self.kind(node) in PASSES) else []
