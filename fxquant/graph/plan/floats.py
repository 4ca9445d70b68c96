"""The values that stay float between integers, and why: nothing is left float silently."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import fx

from fxquant.graph import edit
from fxquant.graph.plan.operands import is_float
from fxquant.graph.plan.targets import call_name
from fxquant.graph.values import FloatValue
from fxquant.graph.why import Reason, StaysFloat, because
from fxquant.operators.values import find_value_operator


def find_floats(
    nodes: Sequence[fx.Node],
    made: Collection[fx.Node],
    quantized: Collection[fx.Node],
    calls: Collection[str],
    wanted: Collection[fx.Node],
    kind_of: Callable[[fx.Node], Any],
    sites: Collection[str],
) -> tuple[FloatValue, ...]:
    """Return what computes with floats that come from integers and become integers again.

    made: the nodes that give integers; quantized: those whose floats become integers; calls: the names of the nodes
    that compute with integers; wanted: those that some reader wants as integers; sites: the paths and names of the
    candidates, which are reported as such.
    """
    after: set[fx.Node] = set()  # of integers
    for node in nodes:
        reads = node.all_input_nodes
        if node.name not in calls and any(x in made or x.name in calls or x in after for x in reads):
            after.add(node)
    before: set[fx.Node] = set()  # integers again
    for node in reversed(nodes):
        if node in quantized or any(user in before for user in node.users if user.name not in calls):
            before.add(node)
    return tuple(
        FloatValue(
            node=node.name,
            path=str(node.target) if node.op == "call_module" else "",
            kind=call_name(kind_of(node)),
            why=_why(node, kind_of(node), after, wanted),
            source=edit.node_frame(node),
        )
        for node in nodes
        if node in after and node in before and is_float(node) and _computes(node, sites)
    )


def _computes(node: fx.Node, sites: Collection[str]) -> bool:
    """Return whether a node is more than a reading of another, and no candidate."""
    if not node.op.startswith("call_") or node.target in (getattr, operator.getitem):
        return False
    return node.name not in sites and not (node.op == "call_module" and node.target in sites)


def _why(node: fx.Node, kind: Any, after: Collection[fx.Node], wanted: Collection[fx.Node]) -> Reason:
    if find_value_operator(kind) is None:
        return because(StaysFloat.NO_FORM)
    if any(read in after for read in node.all_input_nodes):
        return because(StaysFloat.READS_FLOATS)
    return because(StaysFloat.OTHER_ARGUMENTS if node in wanted else StaysFloat.READ_AS_FLOATS)
