"""Fifth pass: each site's operator converts it; modules are swapped, calls become operators of fxquant."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import fx, nn

from fxquant.graph import edit
from fxquant.graph.calibrate import Rounding, to_nearest
from fxquant.graph.constants import constant_of, is_cast
from fxquant.graph.convert.invariant import bring_products
from fxquant.graph.convert.values import convert_values
from fxquant.graph.plan.targets import name_operands
from fxquant.graph.record import Site
from fxquant.graph.references import repoint
from fxquant.graph.values import NO_VALUES, Values
from fxquant.graph.why import Rounded
from fxquant.nn import QuantizedModule
from fxquant.nn.stored import identity
from fxquant.nn.transformer import avoid_fast_path
from fxquant.numerics import QuantizedTensor
from fxquant.observers import Observer
from fxquant.operators import Call, Operator, find_operator
from fxquant.qconfig import QConfig


class WeightCache:
    """Quantizes each weight and module once for each qconfig: tied weights stay one tensor, a shared module one module.

    rounding: for weights that are not cached yet; None: to nearest.
    """

    def __init__(self, rounding: Rounding | None = None) -> None:
        self._done: dict[tuple[Any, ...], tuple[torch.Tensor, QuantizedTensor, Rounded]] = {}
        self._modules: dict[tuple[int, QConfig], tuple[nn.Module, nn.Module, tuple[Rounded, ...]]] = {}
        self._round: Rounding = rounding or (lambda *weight: (to_nearest(*weight), Rounded.TO_NEAREST))
        self._of_calls: list[tuple[nn.Module, nn.Module]] = []
        self._rounded: list[Rounded] = []

    def quantize(self, weight: torch.Tensor, qconfig: QConfig, observer: Observer | None = None) -> QuantizedTensor:
        """Return a quantized weight: the same tensors for the same weight and qconfig.

        observer: has measured the weight's range already.
        """
        key = self._key(weight, qconfig)
        if key not in self._done:  # the weight is kept so that its key is not reused
            self._done[key] = (weight, *self._round(weight, qconfig, observer))
        _, quantized, rounded = self._done[key]
        self._rounded.append(rounded)
        return quantized

    def take_rounded(self) -> tuple[Rounded, ...]:
        """Return how the weights were rounded since the last call, each way once, apart from simply to nearest."""
        ways, self._rounded = dict.fromkeys(self._rounded), []
        return tuple(rounded for rounded in ways if rounded is not Rounded.TO_NEAREST)

    def convert(self, float_module: nn.Module, qconfig: QConfig, operator: Operator) -> nn.Module:
        """Return an operator's quantized form of a module: the same for the same module and qconfig."""
        key = id(float_module), qconfig
        if key not in self._modules:  # the float module is kept so that its id is not reused
            module = operator.convert_module(float_module, qconfig, self.quantize).train(False)
            self._modules[key] = float_module, module, self.take_rounded()
        _, module, rounded = self._modules[key]
        self._rounded += rounded
        return module

    @property
    def converted(self) -> dict[int, nn.Module]:
        """The float module that each quantized one was made from, by the latter's id."""
        made = {id(module): float_module for float_module, module, _ in self._modules.values()}
        return {**made, **{id(module): float_module for float_module, module in self._of_calls}}

    def convert_call(self, float_module: nn.Module, site: Site, operator: Operator, weight: QuantizedTensor) -> Any:
        """Return the quantized module of a static call, which has this weight."""
        module = operator.convert_module(float_module, site.qconfig, lambda *_: weight).train(False)
        self._of_calls.append((float_module, module))
        return module

    def stand_in(self, root: nn.Module) -> None:
        """Replace each converted module under its further names too."""
        forms = {id(float_module): module for float_module, module, _ in self._modules.values()}
        for parent in list(root.modules()):
            for name, child in parent._modules.items():
                if id(child) in forms:
                    parent._modules[name] = forms[id(child)]

    def settle(self, root: nn.Module) -> None:
        """Turn stale references to a converted module into its replacement, or itself if they cannot change."""
        standing = set(map(id, root.modules()))
        swapped = {id(old): new for old, new, _ in self._modules.values() if id(old) not in standing}
        repoint(root.modules(), swapped)  # first, as a weak reference alone does not keep the float module
        for float_module, module, _ in self._modules.values():
            if id(float_module) not in standing:
                with contextlib.suppress(TypeError):  # a type with __slots__ cannot change
                    float_module.__class__ = type(module)
                    float_module.__dict__ = module.__dict__

    def give(self, weight: torch.Tensor, qconfig: QConfig, quantized: QuantizedTensor) -> None:
        """Take a weight's integers under a qconfig from elsewhere."""
        self._done[self._key(weight, qconfig)] = (weight, quantized, Rounded.TO_NEAREST)

    def _key(self, weight: torch.Tensor, qconfig: QConfig) -> tuple[Any, ...]:
        return *identity(weight), qconfig.weight, qconfig.weight_observer, qconfig.gptq


def convert(
    module: fx.GraphModule,
    sites: tuple[Site, ...],
    operators: tuple[Operator, ...],
    cache: WeightCache | None = None,
    batch_invariant: bool | None = None,
    values: Values = NO_VALUES,
) -> tuple[Site, ...]:
    """Rewrite in place and return the sites with their bytes after.

    cache: integers that are known already; batch_invariant: as for `bring_products`. values: which of the graph's
    become integers; CalibrationError where what they are was not observed.
    """
    cache = cache or WeightCache()
    nodes, done = {node.name: node for node in module.graph.nodes}, []
    observers = {site.observer: module.get_submodule(site.observer) for site in sites if site.observer is not None}
    for site in sites:
        if site.observer is None:
            rescue_reads(module, site.path)
            done.append(_convert_module(module, site, operators, cache))
        else:
            done.append(_convert_call(module, nodes[str(site.call)], observers[site.observer], site, operators, cache))
    convert_values(module, values, cache.converted)
    cache.stand_in(module)  # preserved code may use the other names
    cache.settle(module)
    _keep_swapped_called(module)
    if sites or batch_invariant:  # without sites the model stays the same, to the bit
        bring_products(module, batch_invariant)
    module.recompile()
    return tuple(done)


def convert_modules(
    root: nn.Module,
    sites: tuple[Site, ...],
    operators: tuple[Operator, ...],
    cache: WeightCache | None = None,
    batch_invariant: bool | None = None,
) -> tuple[nn.Module, tuple[Site, ...]]:
    """Swap the modules of a tree in place; return its root, which may be one of them, and the sites with bytes."""
    cache = cache or WeightCache()
    if [site.path for site in sites] != [""]:
        done = tuple(_convert_module(root, site, operators, cache) for site in sites)
        cache.settle(root)
        _keep_swapped_called(root)
        bring_products(root, batch_invariant)
        return root, done
    holder = nn.ModuleDict({"root": root})
    (site,) = sites
    alone = _convert_module(holder, replace(site, path="root"), operators, cache)
    bring_products(holder, batch_invariant)
    return holder["root"], (replace(alone, path=""),)


def _keep_swapped_called(root: nn.Module) -> None:
    """Turn off torch's transformer fast path only where it would read a quantized module's weights."""
    for module in root.modules():
        if any(isinstance(part, QuantizedModule) for part in module.modules()):
            avoid_fast_path(module)


def _operator(operators: tuple[Operator, ...], site: Site) -> Operator:
    operator = find_operator(operators, site.operator)
    if operator is None:
        raise AssertionError(f"the plan names operator {site.operator!r}, which is not in the table")
    return operator


def _convert_module(module: nn.Module, site: Site, operators: tuple[Operator, ...], cache: WeightCache) -> Site:
    """Swap one module."""
    float_module = module.get_submodule(site.path)
    quantized = cache.convert(float_module, site.qconfig, _operator(operators, site))
    edit.swap_module(module, site.path, quantized)
    floats = [quantized.get_buffer(name) for name, qconfig in site.qconfig.parts if qconfig is None]
    size = edit.byte_count(quantized) - sum(tensor.nbytes for tensor in floats)
    return replace(site, int_bytes=size, rounded=cache.take_rounded())


def rescue_reads(module: fx.GraphModule, path: str) -> None:
    """Move a tensor that other nodes read, a call's integers too, out of a module that is about to be swapped.

    An unused read (of `weight.shape`, say) is removed: the quantized module may have no tensor of that name.
    """
    for node in module.graph.find_nodes(op="get_attr"):
        if str(node.target).startswith(f"{path}."):
            tensor = edit.get_tensor(module, str(node.target))
            if not node.users:
                module.graph.erase_node(node)
            elif tensor is not None:
                kept = edit.free_name(module, str(node.target).replace(".", "_"), tensor)
                edit.set_tensor(module, kept, tensor)
                node.target = kept


def _observes(observer: nn.Module, qconfig: QConfig) -> TypeGuard[Observer]:
    """Return whether a module is this qconfig's observer: a search changes the qconfigs of prepared sites."""
    wanted = qconfig.make_observer()
    return isinstance(observer, Observer) and type(observer) is type(wanted) and observer.spec == qconfig.weight


def _convert_call(
    module: fx.GraphModule,
    node: fx.Node,
    observer: nn.Module,  # which stood in a module that may have been swapped since
    site: Site,
    operators: tuple[Operator, ...],
    cache: WeightCache,
) -> Site:
    """Rewrite one functional call: the node keeps its name, place and stack trace."""
    graph = module.graph
    function: Any = node.target
    (observed,) = graph.find_nodes(op="call_module", target=site.observer)
    operator = _operator(operators, site)
    name = operator.weights[0]
    operands = name_operands(operator, node)
    cast = [operand for key, operand in operands.items() if key != name and is_cast(operand)]
    weight = operands[name]
    path, tensor = _observed_weight(module, observed)
    quantized = cache.quantize(tensor, site.qconfig, observer if _observes(observer, site.qconfig) else None)
    size = sum(part.numel() * part.element_size() for part in quantized.tensors if part is not None)
    if operator.is_static:
        known = {key: _value(module, operand) for key, operand in operands.items() if key != "input"}
        stand_in = operator.stand_in(function, {**known, name: tensor})
        edit.call_new_module(module, node, cache.convert_call(stand_in, site, operator, quantized), operands["input"])
        cast = [part for part in operands.values() if isinstance(part, fx.Node) and part is not weight]
    else:
        with graph.inserting_before(node):
            nodes = _place(module, graph, path, quantized)
        # Casts are dropped: the operators compute in float32 and return their input's dtype.
        operands = {key: _uncast(operand) for key, operand in operands.items()}
        operands.update({name: nodes[0], f"{name}_scale": nodes[1], f"{name}_zero_point": nodes[2]})
        like = torch.empty_like(tensor, device="meta")
        node.target, kwargs = operator.convert_function(Call(function, operands, {name: like}, site.qconfig))
        node.op, node.args, node.kwargs = "call_function", (), kwargs  # it may have been a method
    edit.erase_dead(graph, [weight, *(node for node in cast if not node.users)])
    module.delete_submodule(str(site.observer))  # it may stand inside a leaf, which is kept whole
    return replace(site, int_bytes=size, rounded=cache.take_rounded())


def _observed_weight(module: nn.Module, observed: fx.Node) -> tuple[str, torch.Tensor]:
    """Return the path of the weight that an observer is shown, and the weight as (O, I)."""
    shown = constant_of(observed.args[0])
    assert shown is not None, observed
    path = str(shown.source.target)  # not the site's: a swap of the module around it may have moved it
    tensor = edit.get_tensor(module, path)
    assert tensor is not None, path
    return path, tensor.t() if shown.is_transposed else tensor


def _value(module: nn.Module, operand: Any) -> Any:
    """Return a constant operand's tensor, anything else as it is."""
    constant = constant_of(operand) if isinstance(operand, fx.Node) else None
    return operand if constant is None else edit.get_tensor(module, str(constant.source.target))


def _uncast(operand: Any) -> Any:
    """Return a constant vector that is cast to an input's dtype as it is stored; anything else unchanged."""
    constant = constant_of(operand) if is_cast(operand) else None
    return operand if constant is None or constant.is_transposed else constant.source


def _place(module: fx.GraphModule, graph: fx.Graph, path: str, quantized: QuantizedTensor) -> list[fx.Node | None]:
    """Return get_attr nodes of a quantized weight's tensors, stored beside the float weight."""
    nodes: list[fx.Node | None] = []
    names = (path + quantized.format.suffix, f"{path}_scale", f"{path}_zero_point")
    for part, wanted in zip(quantized.tensors, names, strict=True):
        if part is None:
            nodes.append(None)
            continue
        target = edit.free_name(module, wanted, part)
        if edit.get_tensor(module, target) is None:
            edit.set_tensor(module, target, part)
        nodes.append(graph.get_attr(target))
    return nodes
