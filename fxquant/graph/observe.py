"""Fourth pass: a weight observer stands in the graph on the weight of every functional call that will be quantized.

An observer sees the weight as (O, I), so that dimension 0 is the output channel; where it is stored or taken as (I, O),
transpositions stand around the observer. Casts, to an input's dtype say, come after it.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn

from fxquant.graph import edit
from fxquant.graph.constants import recast, transpose
from fxquant.graph.plan.planner import Plan


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
    module.recompile()
    return replace(plan, sites=tuple(sites))
