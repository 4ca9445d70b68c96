"""Fourth pass of quantization-aware training: what the quantized model will round, the prepared one rounds.

`observe` puts what rounds on values and on the weights of calls. Here modules get their trained forms, the chains that
are fused are taken apart again, so that each part trains under the user's name, and constants that forward chose by
`self.training` follow the mode. `lower.py` goes the way back, before convert.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant.errors import QConfigError, warn
from fxquant.graph import edit
from fxquant.graph.observe import observe
from fxquant.graph.plan.planner import Plan
from fxquant.graph.plan.targets import Target, name_operands
from fxquant.graph.record import Fusion, Site
from fxquant.nn.fused import FLOAT_TYPES, linear_relu
from fxquant.nn.modes import ByMode
from fxquant.nn.trained_product import TrainedProduct
from fxquant.operators import Operator, find_operator
from fxquant.qconfig import QConfig
from fxquant.ranges import Fixed, Learned, MinMax, MovingAverage
from fxquant.rounding import FakeQuantizeTokens


class Constant(NamedTuple):
    """An argument that forward chose by `self.training`. node: the call's name; place: its number among the leaves."""

    node: str
    place: int
    in_training: Any
    in_eval: Any


def constants_by_mode(in_eval: fx.Graph, in_training: fx.Graph) -> list[Constant] | None:
    """Return the plain arguments in which two graphs of one model differ; None where they differ in more."""
    pairs = list(zip(in_eval.nodes, in_training.nodes, strict=False))
    if len(in_eval.nodes) != len(in_training.nodes):
        return None
    same = {theirs: ours for ours, theirs in pairs}
    found = []
    for ours, theirs in pairs:
        a, b = flat_arguments(ours), flat_arguments(theirs)
        if (ours.op, ours.target) != (theirs.op, theirs.target) or len(a) != len(b):
            return None
        for place, (one, other) in enumerate(zip(a, b, strict=True)):
            if isinstance(one, fx.Node) or isinstance(other, fx.Node):
                if same.get(other) is not one:
                    return None
            elif type(one) is not type(other) or one != other:
                found.append(Constant(ours.name, place, other, one))
    return found


def flat_arguments(node: fx.Node) -> list[Any]:
    """Return the leaves of a node's arguments."""
    leaves: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: leaves.append(leaf))
    return leaves


def put_argument(node: fx.Node, place: int, value: Any) -> None:
    """Replace one of the leaves of a node's arguments."""
    leaves = iter(range(len(flat_arguments(node))))
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda leaf: value if next(leaves) == place else leaf
    )
    node.args, node.kwargs = args, kwargs


def teach(
    module: fx.GraphModule,
    plan: Plan,
    fusions: Sequence[Fusion],
    parts: Mapping[str, nn.Module],
    constants: Sequence[Constant],
    hooked: frozenset[str] = frozenset(),
) -> Plan:
    """Rewrite a fused graph in place, so that it trains, and return the plan with what stands on its weights.

    parts: the modules by their paths before they were fused; hooked: those that must stay, for their hooks.
    """
    _check_ranges(plan.sites)
    follow_mode(module, constants)
    tails, norms = take_apart(module, fusions, parts)
    for site in plan.sites:
        if site.call is None:
            train_module(module, site, plan.operators, norms)
    for number, target in plan.targets.items():
        _round_input(module, plan.sites[number], target, plan.operators)
    return observe(module, plan, tails, hooked)


def _check_ranges(sites: Sequence[Site]) -> None:
    """Raise QConfigError for a way to choose ranges that needs all data at once."""
    for site in sites:
        activation = site.qconfig.activation
        follows = activation is None or isinstance(
            activation.range, (MovingAverage, MinMax, Fixed, Learned, type(None))
        )
        if site.is_static and activation is not None and not follows:
            raise QConfigError(
                f"{site.path!r} ({site.kind}) has a qconfig for calibration, from {site.rule}: its range "
                f"{activation.range} needs all data at once, and cannot follow training. Use "
                "default_qat_qconfig_mapping(), or range=MovingAverage()"
            )


def follow_mode(module: fx.GraphModule, constants: Sequence[Constant]) -> None:
    """Let arguments that forward chose by `self.training` follow the mode."""
    nodes = {node.name: node for node in module.graph.nodes}
    for constant in constants:
        node = nodes.get(constant.node)
        if node is None:
            continue
        path = edit.free_name(module, f"{constant.node}_by_mode")
        module.add_submodule(path, ByMode(constant.in_training, constant.in_eval))
        with module.graph.inserting_before(node):
            put_argument(node, constant.place, module.graph.call_module(path))


def take_apart(
    module: fx.GraphModule, fusions: Sequence[Fusion], parts: Mapping[str, nn.Module]
) -> tuple[dict[str, fx.Node], dict[str, str]]:
    """Take fused chains apart; return each one's last node by the first one's name, and its BatchNorm's path by the
    layer's.
    """
    tails: dict[str, fx.Node] = {}
    norms: dict[str, str] = {}
    for fusion in fusions:
        path, second = fusion.chain[:2]
        if isinstance(parts.get(second), _BatchNorm):
            norms[path] = second
        calls = calls_of(module, path)
        for node in calls:
            tail, has_relu = node, node.target is linear_relu
            if node.op == "call_module":
                has_relu = type(module.get_submodule(path)) in FLOAT_TYPES
            if path in norms:
                if second not in dict(module.named_modules(remove_duplicate=False)):
                    module.add_submodule(second, parts[second])
                tail = _append(module, tail, "call_module", second)
            if has_relu:
                tail = _append(module, tail, "call_function", F.relu)
            if node.op == "call_function":
                node.target = F.linear
            tails[node.name] = tail
        if calls and calls[0].op == "call_module":
            edit.swap_module(module, path, _apart(module, parts[path]))
    return tails, norms


def _apart(module: nn.Module, part: nn.Module) -> nn.Module:
    """Return a part; where a module beside the graph calls it too, a twin with the same tensors: a site of its own."""
    if not any(child is part for parent in module.modules() for child in parent._modules.values()):
        return part
    twin = copy.copy(part)
    for name in ("_parameters", "_buffers", "_modules"):
        vars(twin)[name] = dict(vars(part)[name])
    return twin


def calls_of(module: fx.GraphModule, path: str) -> list[fx.Node]:
    """Return the first nodes of a fused chain, by its path: the calls of a module, or one call of a function."""
    return [n for n in module.graph.nodes if path == (n.target if n.op == "call_module" else n.name)]


def _append(module: fx.GraphModule, node: fx.Node, op: str, target: Any) -> fx.Node:
    """Insert a call after a node, for all that read it."""
    with module.graph.inserting_after(node):
        call = module.graph.create_node(op, target, (node,))
    call.meta.update(node.meta)
    node.replace_all_uses_with(call, lambda user: user is not call)
    return call


def train_module(
    module: nn.Module, site: Site, operators: Sequence[Operator], norms: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Put a module's trained form in its place, wherever it stands."""
    operator = find_operator(operators, site.operator)
    assert operator is not None, site.operator
    if operator.train_module is None:
        warn(
            f"{site.path!r} ({site.kind}) trains in float and is rounded by convert_fx alone: the operator "
            f"{operator.name!r} has no form for training (Operator.train_module)"
        )
        return
    layer = module.get_submodule(site.path)
    trained = operator.train_module(layer, site.qconfig)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is layer:
                parent._modules[name] = trained
    if site.path in norms and isinstance(trained, TrainedProduct) and isinstance(module, fx.GraphModule):
        norm: Any = module.get_submodule(norms[site.path])
        trained.precede(norm)
        (node,) = [n for n in module.graph.nodes if n.op == "call_module" and n.target == site.path]
        with module.graph.inserting_before(node):
            gamma = None if norm.weight is None else module.graph.get_attr(f"{norms[site.path]}.weight")
            node.args = (*node.args, gamma, module.graph.get_attr(f"{norms[site.path]}.running_var"))


def _round_input(module: fx.GraphModule, site: Site, target: Target, operators: Sequence[Operator]) -> None:
    """Put what rounds tokens on the input of a call that will quantize them as it runs."""
    operator = find_operator(operators, site.operator)
    assert operator is not None, site.operator
    spec, x = _tokens_of(site.qconfig), name_operands(operator, target.node).get("input")
    if spec is None or not isinstance(x, fx.Node) or operator.name.startswith("embedding"):
        return
    path = edit.free_name(module, f"{target.node.name}_input_rounding")
    module.add_submodule(path, FakeQuantizeTokens(spec))
    with module.graph.inserting_before(target.node):
        rounded = module.graph.call_module(path, (x,))
    rounded.meta.update(x.meta)
    target.node.replace_input_with(x, rounded)


def _tokens_of(qconfig: QConfig) -> Any:
    activation = qconfig.activation
    return activation if activation is not None and activation.dynamic and activation.is_integer else None
