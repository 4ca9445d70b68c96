"""Decisions about modules: those that a graph calls, those of a tree, and those that preserved code alone uses."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import fx, nn
from torch.utils import _pytree as pytree

from fxquant.graph import edit
from fxquant.graph.layers import spelt_as
from fxquant.graph.plan.decisions import Candidate, Decisions
from fxquant.graph.plan.reasons import calls_children, refuse_module, why_hidden, why_unknown
from fxquant.graph.plan.rules import Rules, dynamic, main_rule
from fxquant.graph.plan.same import is_linear
from fxquant.graph.plan.targets import example_shape
from fxquant.graph.preserve.preserve import Preserved
from fxquant.graph.trace.leaves import base_of, redefined
from fxquant.graph.why import Reason, Why, because
from fxquant.nn import QuantizedModule
from fxquant.nn.fused import FLOAT_TYPES
from fxquant.operators import Operator, find_module_operator
from fxquant.qconfig_mapping import Rule, type_name

_NO_CONTAINERS = vars(nn.Module()).keys()


class _Type(NamedTuple):
    """What a module is. base: the table's type that it is or derives from; operator: what quantizes it.

    The type of a fused chain counts as the layer's, that of a layer which was written as a call is the function.
    """

    module_type: Any
    base: type[nn.Module] | None
    operator: Operator | None


class ModuleWalk:
    """Decides for modules, each once, and for those inside them. root: what holds them; hooked: those with hooks."""

    def __init__(
        self,
        root: nn.Module,
        operators: Sequence[Operator],
        preserved: Preserved,
        rules: Rules,
        decisions: Decisions,
        hooked: frozenset[str] = frozenset(),
    ) -> None:
        self._hooked = hooked
        self._root, self._operators, self._preserved = root, operators, preserved
        self._rules, self._decisions = rules, decisions
        self._tree = set(map(id, root.modules()))
        self._held = dict(_held_forwards(root))
        self._called: dict[str, nn.Module] = {}  # what the graph calls, by path
        self._entered: set[int] = set()  # the containers that were visited, which may stand at several paths
        self._done: set[int] = set()  # modules that preserved code need not be visited for
        self._in_graph, self._weights = _called_by_graph(root)  # the ids of modules, and of their weights
        self._is_kept = False  # whether what is visited is there for preserved code, beside the graph

    def visit_call(self, node: fx.Node) -> None:
        """Decide for the module that a node calls, unless an earlier one does."""
        path = str(node.target)
        if path not in self._called:
            self._called[path] = self._root.get_submodule(path)
            self.visit(path, self._called[path], shape=example_shape(node), is_called=True)

    def visit_preserved(self) -> None:
        """Decide for the modules and weights that preserved code alone uses, under names of the root."""
        self._done = {id(part) for module in self._called.values() for part in module.modules()}
        self._is_kept = True
        for name in self._preserved.kept:
            module, weight = self._root._modules.get(name), self._root._parameters.get(name)
            if module is not None:
                self.visit(name, module)
            elif weight is not None and weight.dim() > 1:
                rule = self._rules.find("", "", nn.Parameter, weights=(name,))[name]
                candidate = Candidate(name, type_name(nn.Parameter), None, (weight,))
                self._decisions.decide(candidate, rule, because(Why.USED_BESIDE))

    def visit(
        self,
        path: str,
        module: nn.Module,
        inside: Reason | None = None,
        shape: tuple[int, ...] = (),
        is_called: bool = False,
    ) -> None:
        """Decide for a module and for what lies inside it. inside: why it cannot be swapped, if so.

        is_called: whether the graph calls it itself, so that it may be static.
        """
        if isinstance(module, QuantizedModule) or id(module) in self._done:
            return
        if self._is_kept:
            self._done.add(id(module))  # and is swapped wherever it stands
        what = self._type(module)
        if what.operator is not None or any(weight.dim() > 1 for weight in module.parameters(recurse=False)):
            self._decide(path, module, what, inside, shape, is_called)
        if what.operator is None and id(module) not in self._entered:
            self._entered.add(id(module))  # what it holds is decided once, and swapped once
            self._visit_strays(path, module)
            self._visit_children(path, module, what, inside)

    def _type(self, module: nn.Module) -> _Type:
        base = base_of(module, self._operators) or (nn.Linear if is_linear(module, self._operators) else None)
        is_inherited = base is not None and not redefined(type(module), base)
        operator = find_module_operator(self._operators, base) if base is not None and is_inherited else None
        return _Type(spelt_as(module) or FLOAT_TYPES.get(type(module), type(module)), base, operator)

    def _decide(
        self,
        path: str,
        module: nn.Module,
        what: _Type,
        inside: Reason | None,
        shape: tuple[int, ...],
        is_called: bool,
    ) -> None:
        """Decide for a module by itself, whose weights may have rules of their own."""
        module_type, base, operator = what
        weights = _weights_of(path, module, operator)
        known = None if base is None else FLOAT_TYPES.get(base, base)
        is_whole = operator is not None or not any(True for _ in module.children())
        by_weight = self._rules.find(path, path.rpartition(".")[0], module_type, known, is_whole, weights)
        static = self._static_operator(what, by_weight[""])
        if not is_called and static is not None:
            if id(module) in self._in_graph:
                return  # the graph calls it too, and decides: a static layer takes floats from other code
            static = static if self._is_static_beside(module, what) else None
        is_hooked = static is not None and path in self._hooked
        if static is not None and not is_hooked:
            what = what._replace(operator=static)
        else:
            by_weight = {name: dynamic(rule) for name, rule in by_weight.items()}
        operator = what.operator
        rules = {name: by_weight[weight] for weight, name in weights.items()}
        rule = main_rule(by_weight[""], rules.values())
        reason = inside or why_hidden(module) or self._held.get(id(module)) or self._refuse(path, module, what)
        reason = because(Why.HOOKED) if reason is not None and is_hooked else reason
        tensors = tuple(module.parameters(recurse=operator is not None))  # a module inside counts itself
        shape = shape if operator is None or operator.has_rows else ()
        candidate = Candidate(path, type_name(module_type), operator, tensors, shape)
        if operator is not None and reason is None and len(set(rules.values())) > 1:
            tied = dict(module.named_parameters(remove_duplicate=False))
            self._decisions.decide_weights(candidate, rule, rules, tied)
        else:
            self._decisions.decide(candidate, rule, reason)
        if operator is not None:
            self._rules.check_parts(path, module, rule, rules)

    def _static_operator(self, what: _Type, rule: Rule) -> Operator | None:
        """Return the static operator of a module, where its rule asks for that."""
        if what.base is None or rule.qconfig is None or not rule.qconfig.is_static:
            return None
        operator = find_module_operator(self._operators, what.base, is_static=True)
        is_taken = operator is not None and (operator.accepts(rule.qconfig) or what.operator is None)
        return operator if is_taken else None

    def _is_static_beside(self, module: nn.Module, what: _Type) -> bool:
        """Return whether a module that the graph does not call becomes static, to keep integers alone of its weight: it
        is that of a layer in the graph, and there is no dynamic form.
        """
        has_other = what.operator is not None and refuse_module(what.operator, module) is None
        return not has_other and any(edit.identity(w) in self._weights for w in module.parameters(recurse=False))

    def _refuse(self, path: str, module: nn.Module, what: _Type) -> Reason | None:
        """Return why a module stays float under any rule, or None."""
        if what.operator is None:
            is_unknown = self._is_kept and what.base is None
            return because(Why.USED_BESIDE) if is_unknown else why_unknown(what.module_type, self._operators)
        reason = refuse_module(what.operator, module)
        if reason is None and any(self._preserved.may_write(_join(path, n)) for n, _ in module.named_parameters()):
            return because(Why.PRESERVED_WRITES)
        return reason

    def _visit_children(self, path: str, module: nn.Module, what: _Type, inside: Reason | None) -> None:
        shut = inside or why_hidden(module)
        if shut is None and not calls_children(module):
            shut = because(Why.READ_BY_PARENT, type_name(what.module_type))
        for name, child in module._modules.items():  # named_children skips the second name of a module
            if child is not None:
                self.visit(_join(path, name), child, shut)

    def _visit_strays(self, path: str, module: nn.Module) -> None:
        """Report the modules that a module has in a plain list, tuple or dict: they are outside the model's tree."""
        for name, held in vars(module).items():
            is_container = isinstance(held, (list, tuple, dict)) and name not in _NO_CONTAINERS
            for number, stray in enumerate(self._outside(pytree.tree_leaves(held) if is_container else [])):
                tensors = {t: None for part in self._outside(stray.modules()) for t in part.parameters(recurse=False)}
                weights = tuple(tensor for tensor in tensors if tensor.dim() > 1)
                if weights:
                    rule = self._rules.find("", path, type(stray))[""]
                    candidate = Candidate(f"{_join(path, name)}[{number}]", type_name(type(stray)), None, weights)
                    reason = because(Why.IN_A_CONTAINER, type(held).__name__, name)
                    self._decisions.decide(candidate, rule, reason)

    def _outside(self, parts: Any) -> list[nn.Module]:
        """Return the modules among some objects that are not in the tree; a weak proxy only looks like one."""
        return [part for part in parts if issubclass(type(part), nn.Module) and id(part) not in self._tree]


def _weights_of(path: str, module: nn.Module, operator: Operator | None) -> dict[str, str]:
    """Return the names of the weights of a module that may have rules of their own, by their paths."""
    matrices = [name for name, weight in module.named_parameters(recurse=False) if weight.dim() > 1]
    return {_join(path, name): name for name in (matrices if operator is None else operator.parts(module))}


def _called_by_graph(root: nn.Module) -> tuple[set[int], set[tuple[Any, ...]]]:
    """Return the ids of the modules that a graph calls, and what identifies their matrices; none of a tree."""
    nodes = root.graph.find_nodes(op="call_module") if isinstance(root, fx.GraphModule) else ()
    modules = [root.get_submodule(str(node.target)) for node in nodes]
    weights = {edit.identity(w) for module in modules for w in module.parameters(recurse=False) if w.dim() > 1}
    return set(map(id, modules)), weights


def _held_forwards(root: nn.Module) -> Iterator[tuple[int, Reason]]:
    """Yield each module whose forward is held by an attribute, and the reason: that forward would run with quantized
    weights.
    """
    for module in root.modules():
        for name, held in vars(module).items():
            for value in pytree.tree_leaves(held):
                while isinstance(value, functools.partial):
                    value = value.func
                owner = getattr(value, "__self__", None)
                if isinstance(value, types.MethodType) and isinstance(owner, nn.Module) and value == owner.forward:
                    yield id(owner), because(Why.HELD_FORWARD, name, type_name(type(module)))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
