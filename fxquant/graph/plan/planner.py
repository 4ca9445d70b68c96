"""Third pass: the mapping and the operator table decide, once, what each candidate becomes and why.

A candidate is a module or call that holds a weight of two or more dimensions. Each becomes a Site, or is skipped with a
reason. The plan changes nothing, and no later pass decides again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from fxquant.graph import edit
from fxquant.graph.plan.calls import CallWalk
from fxquant.graph.plan.decisions import Decisions
from fxquant.graph.plan.modules import ModuleWalk
from fxquant.graph.plan.rules import Rules
from fxquant.graph.plan.targets import Target, find_target
from fxquant.graph.plan.values import plan_values
from fxquant.graph.preserve.preserve import NOTHING_PRESERVED
from fxquant.graph.record import NOTHING, Coverage, Record, Site, Skipped
from fxquant.graph.trace.trace import Traced, names_of
from fxquant.graph.values import NO_VALUES, Values
from fxquant.operators import Operator, find_operator
from fxquant.qconfig_mapping import QConfigMapping


@dataclass(frozen=True)
class Plan:
    """The decisions of a mapping and a table. targets: where the calls' weights are, by their sites' numbers."""

    mapping: QConfigMapping
    operators: tuple[Operator, ...]
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...] = ()
    coverage: Coverage = NOTHING
    targets: Mapping[int, Target] = field(default_factory=dict)
    values: Values = NO_VALUES

    def record(self, model: nn.Module, traced: Traced | None = None, **more: Any) -> Record:
        """Return the record of a model that is prepared by this plan. model: the float one; traced: its graph, if it
        has one.
        """
        of_graph = {} if traced is None else {**traced.kept, "constants": traced.constants, "untraced": traced.untraced}
        return Record(
            stage="prepared",
            is_traced=traced is not None,
            sites=self.sites,
            values=self.values,
            skipped=self.skipped,
            coverage=self.coverage,
            mapping=self.mapping,
            operators=self.operators,
            float_bytes=edit.byte_count(model),
            **{**of_graph, **more},
        )


def plan(traced: Traced, mapping: QConfigMapping, operators: Sequence[Operator]) -> Plan:
    """Return what each candidate of a graph, and of what preserved code alone uses, becomes and why.

    Raises QConfigError where an entry that names a candidate directly gives it a qconfig that its operator cannot take.
    """
    rules, decisions = Rules(mapping, traced.names), _decisions(traced.module, traced.keep.written)
    modules = ModuleWalk(traced.module, operators, traced.keep.preserved, rules, decisions, traced.hooked)
    calls = CallWalk(traced, operators, rules, decisions)
    for node in traced.module.graph.nodes:
        if node.op == "call_module":
            modules.visit_call(node)
        elif node.op in ("call_function", "call_method"):
            calls.visit(node)
    modules.visit_preserved()
    rules.check_orders()
    values = plan_values(traced.module, decisions.sites, decisions.skipped, traced.hooked, operators)
    return replace(_plan(mapping, operators, decisions, calls.targets), values=values)


def plan_modules(
    module: nn.Module, mapping: QConfigMapping, operators: Sequence[Operator], written: frozenset[str] = frozenset()
) -> Plan:
    """Return what each module of a tree becomes and why; functional calls are out of reach. Raises as `plan` does.

    written: the parameters that forward writes into.
    """
    rules, decisions = Rules(mapping, names_of(module)), _decisions(module, written)
    ModuleWalk(module, operators, NOTHING_PRESERVED, rules, decisions).visit("", module)
    rules.check_orders()
    return _plan(mapping, operators, decisions, {})


def replay(
    module: fx.GraphModule, sites: Sequence[Site], operators: Sequence[Operator], values: Values = NO_VALUES
) -> Plan:
    """Return the plan that holds these sites and values, taken elsewhere for the same architecture (a checkpoint's).

    Raises LookupError, saying what is missing, where the graph has no such module or call.
    """
    nodes, targets = {node.name: node for node in module.graph.nodes}, {}
    for number, site in enumerate(sites):
        if site.call is None:
            module.get_submodule(site.path)
            continue
        operator, node = find_operator(operators, site.operator), nodes.get(site.call)
        target = find_target(operator, node) if operator is not None and node is not None else None
        if target is None or target.weight.target != site.path:
            raise LookupError(f"no call {site.call!r} of {site.kind} on {site.path!r}")
        targets[number] = target
    _check_values(nodes.keys(), values)
    return Plan(QConfigMapping(), tuple(operators), tuple(sites), targets=targets, values=values)


def _check_values(nodes: Collection[str], values: Values) -> None:
    """Raise LookupError where a graph lacks a node that the values of another name."""
    names = {edge.at for edge in values.edges} | {n for call in values.calls for n in (call.node, *call.absorbed)}
    missing = sorted(names - set(nodes))
    if missing:
        raise LookupError(f"no value {missing[0]!r}")


def _plan(
    mapping: QConfigMapping, operators: Sequence[Operator], decisions: Decisions, targets: Mapping[int, Target]
) -> Plan:
    sites, skipped = tuple(decisions.sites), decisions.skipped
    return Plan(mapping, tuple(operators), sites, skipped, decisions.coverage, targets)


def _decisions(module: nn.Module, written: frozenset[str]) -> Decisions:
    """Return decisions, none taken yet, about a model whose forward writes into these parameters."""
    tensors = (edit.get_tensor(module, name) for name in written)
    return Decisions({edit.identity(tensor)[0] for tensor in tensors if tensor is not None})
