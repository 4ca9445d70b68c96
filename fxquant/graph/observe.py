"""Fourth pass: a weight observer stands in the graph on the weight of every functional call that will be quantized.

Values that become integers get observers too, for calibration. In quantization-aware training what rounds stands in the
same places: that is the only difference, and `teach.py` does the rest. An observer sees the weight as (O, I), so that
dimension 0 is the output channel; where it is stored or taken as (I, O), transpositions stand around the observer.
Casts, to an input's dtype say, come after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx, nn

from fxquant.fake_quantize import FakeQuantize
from fxquant.graph import edit
from fxquant.graph.constants import recast, transpose
from fxquant.graph.fuse import is_relu
from fxquant.graph.plan.planner import Plan
from fxquant.graph.plan.targets import Target, product_input
from fxquant.graph.record import Site
from fxquant.graph.values import Edge, Values, function_of
from fxquant.learned import make_value_rounding, make_weight_rounding
from fxquant.operators import find_operator
from fxquant.operators.pools import resizing
from fxquant.operators.values import Form
from fxquant.qconfig import QConfig
from fxquant.ranges import Fixed
from fxquant.value_observers import InputMean, make_value_observer


def observe(
    module: fx.GraphModule,
    plan: Plan,
    tails: Mapping[str, fx.Node] | None = None,
    hooked: frozenset[str] = frozenset(),
) -> Plan:
    """Insert the observers, show each its weight once, and return the plan with their paths.

    tails: for training, the last node of each chain that is fused, by its first one's name; None: for calibration.
    hooked: modules that must stay, for their hooks.
    """
    sites = list(plan.sites)
    for number, target in plan.targets.items():
        site, node, weight = sites[number], target.node, target.weight
        path = edit.free_name(module, f"{site.path}_observer")
        observer = _stand_in(module, site, target, is_trained=tails is not None)
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
    if tails is None:
        observe_values(module, plan.values.edges)
        observe_inputs(module, plan)
    else:
        round_values(module, plan.values, tails)
        absorb_relus(module, hooked)
    module.recompile()
    return replace(plan, sites=tuple(sites))


def _stand_in(module: fx.GraphModule, site: Site, target: Target, is_trained: bool) -> nn.Module:
    """Return what stands on a call's weight: what rounds it in training, or an observer that has seen it."""
    tensor = edit.get_tensor(module, site.path)
    tensor = tensor.t() if tensor is not None and target.is_stored_transposed else tensor
    if is_trained and tensor is not None:
        return make_weight_rounding(site.qconfig, tensor)
    observer = make_weight_observer(site.qconfig)
    if tensor is not None:
        observer(tensor)  # convert quantizes by this range
    return observer


def make_weight_observer(qconfig: QConfig) -> nn.Module:
    """Return what stands on a call's weight."""
    return qconfig.make_observer() or nn.Identity()


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


def round_values(module: fx.GraphModule, values: Values, tails: Mapping[str, fx.Node]) -> None:
    """Insert what rounds after each value that becomes integers: for all readers where integers give it, and where
    floats do for those that compute with integers.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    specs = {edge.scale_of: edge.spec for edge in values.edges}
    for scale_of, spec in specs.items():
        name = str(nodes[scale_of].target) if nodes[scale_of].op == "call_module" else scale_of
        module.add_submodule(observer_path(scale_of), make_value_rounding(spec, repr(name)))
    for edge in values.edges:
        if not edge.is_moved:
            node = tails.get(edge.at, nodes[edge.at])
            readers = {nodes[call.node] for call in values.calls if edge.name in call.inputs}
            with module.graph.inserting_after(node):
                rounded = module.graph.call_module(observer_path(edge.scale_of), (node,))
            rounded.meta.update(node.meta)
            for user in list(node.users):
                if user is not rounded and (user in readers or not edge.is_float):
                    user.replace_input_with(node, rounded)
    paths = {edge.name: observer_path(edge.scale_of) for edge in values.edges}
    for call in values.calls:
        if call.form is Form.RESIZES:
            _round_means(module, nodes[call.node], call.rank, paths[call.inputs[0]])


def _round_means(module: fx.GraphModule, node: fx.Node, rank: int, path: str) -> None:
    """Insert what rounds the means that a linear interpolation gives. path: what rounded its operand."""
    resize = resizing(function_of(module, node)[1], rank)
    if resize is None:
        return
    source = node.args[0] if node.args else node.kwargs["input"]
    with module.graph.inserting_after(node):
        rounded = module.graph.call_module(path, (node, source), resize)
    rounded.meta.update(node.meta)
    node.replace_all_uses_with(rounded, lambda user: user is not rounded)


def absorb_relus(module: fx.GraphModule, hooked: frozenset[str]) -> None:
    """Let what rounds a value do the ReLU before it, which its clamp at 0 does too: a pass is saved each way."""
    for path, rounding in list(module.named_children()):
        calls = module.graph.find_nodes(op="call_module", target=path) if type(rounding) is FakeQuantize else []
        relu = calls[0].all_input_nodes[0] if len(calls) == 1 else None
        if relu is None or not is_relu(module, relu) or len(relu.users) > 1 or relu.target in hooked:
            continue
        if isinstance(rounding, FakeQuantize) and not isinstance(rounding.spec.range, Fixed):
            calls[0].replace_input_with(relu, relu.all_input_nodes[0])
            module.graph.erase_node(relu)
            rounding.rectifies = relu.name


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
