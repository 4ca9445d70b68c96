"""Fourth pass: a weight observer stands in the graph on the weight of every functional call that will be quantized."""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn

from fxquant.graph import edit
from fxquant.graph.module import Site
from fxquant.graph.plan import Plan


def observe(module: fx.GraphModule, plan: Plan) -> tuple[Site, ...]:
    """Insert the observers, each shown its weight once, and return the plan's sites with their observers' paths."""
    placed = {id(site): site for site in plan.sites}
    for site, (node, weight) in plan.calls:
        path = edit.free_name(module, f"{site.path}_observer")
        observer = site.qconfig.make_observer() or nn.Identity()
        tensor = edit.get_tensor(module, site.path)
        if tensor is not None:
            observer(tensor)
        module.add_submodule(path, observer)
        with module.graph.inserting_before(node):
            observed = module.graph.call_module(path, (weight,))
        observed.meta.update(weight.meta)
        node.replace_input_with(weight, observed)
        placed[id(site)] = replace(site, observer=path)
    module.recompile()
    return tuple(placed[id(site)] for site in plan.sites)
