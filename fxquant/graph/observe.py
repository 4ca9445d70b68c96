"""Fourth pass: a weight observer stands in the graph on the weight of every functional call that will be quantized.

An observer sees the weight as (O, I), so that dimension 0 is the output channel; where it is stored or taken as (I, O),
transpositions stand around the observer. Casts, to an input's dtype say, come after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx, nn

from fxquant.graph import edit
from fxquant.graph.constants import recast, transpose
from fxquant.graph.plan.planner import Plan
from fxquant.graph.plan.targets import product_input
from fxquant.graph.values import Edge
from fxquant.operators import find_operator
from fxquant.operators.values import Form
from fxquant.value_observers import InputMean, make_value_observer


def observe(module: fx.GraphModule, plan: Plan) -> Plan:
    """Insert the observers, show each its weight once, and return the plan with their paths."""
    sites = list(plan.sites)
    for number, target in plan.targets.items():
        site, node, weight = sites[number], target.node, target.weight
        path = edit.free_name(module, f"{site.path}_observer")
        observer = site.qconfig.make_observer() or nn.Identity()
        tensor = edit.get_tensor(module, site.path)
        if tensor is not None:
            observer(tensor.t() if target.is_stored_transposed else tensor)  # convert quantizes by this range
        module.add_submodule(path, observer)
        with module.graph.inserting_before(node):
            shown = transpose(module.graph, weight) if target.is_stored_transposed else weight
            observed = module.graph.call_module(path, (shown,))
            given = transpose(module.graph, observed) if target.is_taken_transposed else observed
            given = recast(module.graph, given, target.casts)
        observed.meta.update(weight.meta)
        node.replace_input_with(target.operand, given)
        edit.erase_dead(module.graph, [target.operand])
        sites[number] = replace(site, observer=path)
    observe_values(module, plan.values.edges)
    observe_inputs(module, plan)
    module.recompile()
    return replace(plan, sites=tuple(sites))


def observer_path(scale_of: str) -> str:
    """Return where the observer of a value stands, and of all that share its scale."""
    return f"{scale_of}_observer"


def observe_values(module: fx.GraphModule, edges: Sequence[Edge]) -> None:
    """Insert an observer after each value that becomes integers, one for all values that share a scale."""
    nodes = {node.name: node for node in module.graph.nodes}
    specs = {edge.scale_of: edge.spec for edge in edges}
    for scale_of, spec in specs.items():
        module.add_submodule(observer_path(scale_of), make_value_observer(spec))
    for edge in edges:
        if not edge.is_moved:
            node = nodes[edge.at]
            with module.graph.inserting_after(node):
                observed = module.graph.call_module(observer_path(edge.scale_of), (node,))
            observed.meta.update(node.meta)
            node.replace_all_uses_with(observed, lambda user, own=observed: user is not own)


def mean_path(node: str) -> str:
    """Return where the means of a product's input are measured."""
    return f"{node}_input_mean"


def observe_inputs(module: fx.GraphModule, plan: Plan) -> None:
    """Insert what measures the means of the static products' inputs."""
    nodes = {node.name: node for node in module.graph.nodes}
    sites = {site.call or site.path: site for site in plan.sites if site.is_static}
    for call in plan.values.calls:
        if call.form is Form.PRODUCT:
            node = nodes[call.node]
            site = sites[str(node.target) if node.op == "call_module" else node.name]
            operator = find_operator(plan.operators, site.operator)
            x, path = product_input(node, site, plan.operators), mean_path(node.name)
            module.add_submodule(path, InputMean(-1 if operator is not None and operator.has_rows else 1))
            with module.graph.inserting_before(node):
                measured = module.graph.call_module(path, (x,))
            measured.meta.update(x.meta)
            node.replace_input_with(x, measured)
