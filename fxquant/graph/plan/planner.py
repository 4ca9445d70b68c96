"""Third pass: the mapping and the operator table decide, once, what each candidate becomes and why.

A candidate is a module or call that holds a weight of two or more dimensions. Each becomes a Site, or is left with a
reason. Nothing is changed here, and nothing later decides again.
"""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxquant.errors import MappingNameError, QConfigError
from fxquant.graph import edit
from fxquant.graph.constants import asks_kind, constant_of, is_cast, is_transposition
from fxquant.graph.module import ASKED, NOTHING, Coverage, Left, Site
from fxquant.graph.plan.reasons import (
    WHY_KEPT,
    WHY_SET,
    WHY_WRITTEN,
    calls_children,
    refuse_call,
    refuse_module,
    why_hidden,
    why_no_form,
    why_unknown,
)
from fxquant.graph.plan.rules import join, main_rule, rank, refusal
from fxquant.graph.plan.same import is_linear
from fxquant.graph.plan.targets import Target, call_name, example_shape, find_target
from fxquant.graph.preserve.preserve import Keep
from fxquant.graph.trace.fold import SOURCE, storage_of, written
from fxquant.graph.trace.leaves import base_of, redefined
from fxquant.graph.trace.trace import Names, Traced, names_of
from fxquant.graph.trace.tracer import SCOPE
from fxquant.nn import QuantizedModule
from fxquant.nn.fused import FLOAT_TYPES, SPELT
from fxquant.operators import Operator, find_function_row, find_module_row, find_row
from fxquant.qconfig_mapping import QConfigMapping, Rule, name_text, opt_out, opt_out_one, type_name


@dataclass
class Plan:
    """What was decided. calls: the functional sites' nodes, by the weight's path and the call's name."""

    sites: list[Site]
    left: list[Left]
    calls: list[tuple[Site, Target]]
    coverage: Coverage = NOTHING


class _Planner:
    """Walks a graph, or a module tree, once and collects the decisions."""

    def __init__(
        self,
        module: nn.Module,
        names: Names,
        mapping: QConfigMapping,
        operators: Sequence[Operator],
        keep: Keep,
    ) -> None:
        self.module, self.names, self.mapping, self.operators = module, names, mapping, operators
        self.plan = Plan([], [], [])
        self.counts: collections.Counter[tuple[str, Any]] = collections.Counter()
        self.weights: dict[tuple[Any, ...], tuple[int, bool]] = {}  # each one's bytes, and whether all take it as int8
        self.users: dict[tuple[Any, ...], list[Site | Left]] = {}  # what holds each weight
        self.changed: set[int] = set()  # the storages of tensors that the graph writes to
        self.tree = set(map(id, module.modules()))
        self.kept_forwards = dict(_kept_forwards(module))
        self.entered: set[int] = set()  # the containers that were visited, which may stand at several paths
        self.called: set[int] = set()  # the modules that the graph calls, and those inside them
        changed = (edit.get_tensor(module, name) for name in keep.written)
        self.written = {edit.identity(tensor)[0] for tensor in changed if tensor is not None}
        self.preserved = keep.preserved
        self.is_kept = False  # whether what is visited is there for preserved code, beside the graph

    def run(self, graph: fx.Graph) -> Plan:
        """Return the plan for every candidate of the graph, and those that preserved code alone uses."""
        seen: set[str] = set()
        self.changed = written(self.module, graph)
        for node in graph.nodes:
            if node.op == "call_module":
                if node.target not in seen:
                    seen.add(node.target)
                    shape = example_shape(node)
                    self.visit_module(node.target, self.module.get_submodule(node.target), shape=shape)
            elif node.op in ("call_function", "call_method"):
                self.visit_call(node)
        self.called = {id(part) for path in seen for part in self.module.get_submodule(path).modules()}
        self.is_kept = True
        for name in self.preserved.kept:
            self.visit_kept(name)
        return self.finish()

    def visit_kept(self, name: str) -> None:
        """Decide for what preserved code uses under a name of the root: a module and those inside it, or a tensor."""
        module, weight = self.module._modules.get(name), self.module._parameters.get(name)
        if module is not None:
            self.visit_module(name, module)
        elif weight is not None and weight.dim() > 1:
            rule = self.rules("", "", nn.Parameter, weights=(name,))[name]
            self.decide(name, nn.Parameter, None, rule, WHY_KEPT, [weight])

    def run_tree(self) -> Plan:
        """Return the plan for every module, whatever calls it."""
        self.visit_module("", self.module)
        return self.finish()

    def finish(self) -> Plan:
        """Return the plan, all candidates visited."""
        self.check_orders()
        self.tell_ties()
        done = sum(size for size, is_quantized in self.weights.values() if is_quantized)
        self.plan.coverage = Coverage(done, sum(size for size, _ in self.weights.values()))
        return self.plan

    def tell_ties(self) -> None:
        """Let what stays float say which site has its weight too, quantized: the model then keeps both."""
        for users in self.users.values():
            sites = [user.path for user in users if isinstance(user, Site)]
            for number, left in enumerate(self.plan.left if 0 < len(sites) < len(users) else ()):
                if left.reason != ASKED and any(user is left for user in users):
                    told = f"{left.reason}; its weight is that of {sites[0]!r} too, which is quantized: both are kept"
                    self.plan.left[number] = replace(left, reason=told)

    def visit_module(self, path: str, module: nn.Module, inside: str = "", shape: tuple[int, ...] = ()) -> None:
        """Decide for a leaf module and for what lies inside it. inside: why children cannot be swapped, if so."""
        if isinstance(module, QuantizedModule) or id(module) in self.called:
            return
        if self.is_kept:
            self.called.add(id(module))  # and is swapped wherever it stands
        kind = FLOAT_TYPES.get(type(module), type(module))
        base = base_of(module, self.operators) or (nn.Linear if is_linear(module, self.operators) else None)
        row = None if base is None or redefined(type(module), base) else find_module_row(self.operators, base)
        own = [name for name, weight in module.named_parameters(recurse=False) if weight.dim() > 1]
        if row is not None or own:
            known = None if base is None else FLOAT_TYPES.get(base, base)
            is_whole = row is not None or not any(True for _ in module.children())
            weights = {_join(path, name): name for name in (own if row is None else row.parts(module))}
            found = self.rules(path, path.rpartition(".")[0], kind, known, is_whole, weights)
            rules = {name: found[weight] for weight, name in weights.items()}
            rule = main_rule(found[""], rules.values())
            shut = inside or why_hidden(module) or self.kept_forwards.get(id(module), "")
            reason = shut or (refuse_module(row, module) if row else self.why_float(kind, base))
            if row is not None and reason is None and self.may_be_written(path, module):
                reason = WHY_SET
            seen = shape if row is None or row.has_rows else ()
            if row is not None and reason is None and len(set(rules.values())) > 1:
                self.decide_weights(path, kind, row, rule, rules, module, seen)
            else:
                held = module.parameters(recurse=row is not None)  # what is in a module without a row counts itself
                self.decide(path, kind, row, rule, reason, held, seen)
        if row is not None:
            self.check_parts(path, module, rule, rules)
        elif id(module) not in self.entered:  # else what it holds has been decided, and is swapped once
            self.entered.add(id(module))
            shut = inside or why_hidden(module)
            if not shut and not calls_children(module):
                shut = f"{type_name(kind)} reads its children's weights itself"
            self.visit_strays(path, module)
            for name, child in module._modules.items():  # named_children skips the second name of a module
                if child is not None:
                    self.visit_module(_join(path, name), child, shut)

    def may_be_written(self, path: str, module: nn.Module) -> bool:
        """Return whether preserved code may write into a parameter of a module, which then is no constant."""
        return any(self.preserved.may_write(_join(path, name)) for name, _ in module.named_parameters())

    def why_float(self, kind: type[nn.Module], base: type[nn.Module] | None) -> str:
        """Return why a module without a row stays float."""
        return WHY_KEPT if self.is_kept and base is None else why_unknown(kind, self.operators)

    def visit_strays(self, path: str, module: nn.Module) -> None:
        """Report the modules that a module has in a plain list, tuple or dict: they are no part of the model's tree."""
        own = vars(nn.Module())
        for name, held in vars(module).items():
            parts = pytree.tree_leaves(held) if isinstance(held, (list, tuple, dict)) and name not in own else []
            held_here = [part for part in parts if issubclass(type(part), nn.Module)]  # a weak proxy only looks so
            strays = [part for part in held_here if id(part) not in self.tree]
            for number, stray in enumerate(strays):
                outside = [part for part in stray.modules() if id(part) not in self.tree]
                held_there = dict.fromkeys(tensor for part in outside for tensor in part.parameters(recurse=False))
                weights = [weight for weight in held_there if weight.dim() > 1]
                if weights:
                    rule = self.rules("", path, type(stray))[""]
                    reason = (
                        f"it is in a plain {type(held).__name__}, self.{name}; put it into an nn.ModuleList or -Dict"
                    )
                    self.decide(f"{_join(path, name)}[{number}]", type(stray), None, rule, reason, weights)

    def check_parts(self, path: str, module: nn.Module, rule: Rule, apart: Collection[str]) -> None:
        """Raise QConfigError for an entry by name that wants a part of a module that is one Site otherwise.

        apart: the names of the weights that may have schemes of their own.
        """
        weights = [name for name, weight in module.named_parameters() if weight.dim() > 1 and name not in apart]
        for name in [*(name for name, _ in module.named_modules() if name), *weights]:
            part = self.mapping.resolve(_join(path, name), "", (), 0)
            if part.text.startswith("module_name") and part.qconfig != rule.qconfig:
                raise QConfigError(
                    f"{part.text} decides for {name!r}, a part of {path!r}, for which {rule.text} decides otherwise; a "
                    f"{type_name(type(module))} is quantized as a whole: name {path!r}"
                )

    def visit_call(self, node: fx.Node) -> None:
        """Decide for a functional call."""
        row = find_function_row(self.operators, node.target)
        target = find_target(row, node) if row is not None else None
        is_alone = target is not None and [*self.matrices(node)] == [target.weight.target]
        if row is None or (row.may_lack_weight and not is_alone):
            self.visit_other_call(node, row)
            return
        function = SPELT.get(node.target, node.target)
        scope, name = node.meta.get(SCOPE, ""), call_name(function)
        is_known = target is not None and target.weight.target in self.names.tensors
        path = str(target.weight.target) if target is not None and is_known else ""
        entry = target.weight.meta.get(SOURCE, path) if target is not None else path
        rule = self.rules(scope, scope, function, weights=(entry,))[entry]
        if target is None or not is_known:
            unknown = "its weight is no registered parameter or buffer"
            self.decide(node.name, name, None, rule, unknown, (), call=node.name)
            return
        tensor = edit.get_tensor(self.module, path)
        if tensor is None:
            raise AssertionError(f"{path} was traced but is not in the graph module")
        reason = refuse_call(row, target, tensor) if rule.qconfig is not None else None
        if reason is None and storage_of(tensor) in self.changed:
            reason = WHY_WRITTEN
        if reason is None and self.preserved.may_write(path):
            reason = WHY_SET
        site = self.decide(path, name, row, rule, reason, (tensor,), example_shape(node), call=node.name)
        if site is not None:
            self.plan.calls.append((site, target))

    def visit_other_call(self, node: fx.Node, row: Operator | None) -> None:
        """Report a call that reads a weight where no row takes it: what it computes with stays float."""
        is_matrix = is_transposition(node) is not None or is_cast(node)
        if is_matrix and all(user.op in ("call_function", "call_method") for user in node.users):
            return  # which is reported itself
        scope, name = node.meta.get(SCOPE, ""), call_name(node.target)
        reason = (
            why_no_form(name) if row is None else f"only a form of one constant, its {row.weights[0]!r}, is quantized"
        )
        for path, tensor in self.matrices(node).items():
            if isinstance(tensor, nn.Parameter) or row is not None:
                rule = self.rules(scope, scope, node.target)[""]
                self.decide(path, name, None, rule, reason, (tensor,), call=node.name)

    def matrices(self, node: fx.Node) -> dict[str, torch.Tensor]:
        """Return the constants of two or more dimensions whose values a call takes, by their paths."""
        constants = [constant_of(operand) for operand in node.all_input_nodes if not asks_kind(node, operand)]
        paths = [str(constant.source.target) for constant in constants if constant is not None]
        tensors = {path: edit.get_tensor(self.module, path) for path in paths}
        return {path: tensor for path, tensor in tensors.items() if tensor is not None and tensor.dim() > 1}

    def rules(
        self, path: str, scope: str, kind: Any, base: Any = None, is_whole: bool = False, weights: Iterable[str] = ()
    ) -> dict[str, Rule]:
        """Return the mapping entries that decide: for the candidate under "", for each of its weights under its path.

        base: the type that a subclass derives from, whose entries decide where there is none for its own. is_whole:
        whether the candidate is all that is at the path: no call, and no module with candidates inside.
        """
        kinds = (kind,) if base is None or base is kind else (kind, base)
        found = {weight: self.find_rule(path, scope, kinds, weight) for weight in ("", *weights)}
        is_named = any(weight and rule.text == name_text(weight) for weight, rule in found.items())
        is_last = is_whole and not is_named  # else an entry for the path does not decide for all of the candidate
        out = opt_out(path) if is_last else opt_out_one(scope, kind, self.counts[(scope, kind)])
        self.counts.update((scope, k) for k in kinds)
        return {weight: rule._replace(opt_out=out) for weight, rule in found.items()}

    def find_rule(self, path: str, scope: str, kinds: tuple[Any, ...], weight: str) -> Rule:
        """Return the entry that decides for a candidate, or a weight, by any of the names of a shared module."""
        aliases = [name for name in self.names.aliases.get(path, ()) if name != path]
        own = weight.removeprefix(f"{path}.")
        names = [(path, weight), *((name, weight if own == weight else _join(name, own)) for name in aliases)]
        names.sort(key=lambda pair: pair[1] not in self.mapping.module_name_qconfigs)
        at = [(kind, self.counts[(scope, kind)]) for kind in kinds]
        rules = [self.mapping.resolve(n, scope, (kind,), number, w) for kind, number in at for n, w in names]
        return min(rules, key=rank)

    def decide(
        self,
        path: str,
        kind: Any,
        row: Operator | None,
        rule: Rule,
        reason: str | None,
        tensors: Iterable[torch.Tensor],
        shape: tuple[int, ...] = (),
        call: str | None = None,
        part_rules: tuple[str, ...] = (),
    ) -> Site | None:
        """Record a Site and return it, or record why there is none. tensors: what the candidate holds."""
        told, held = kind if isinstance(kind, str) else type_name(kind), list(tensors)
        if reason is None and any(edit.identity(tensor)[0] in self.written for tensor in held):
            reason = WHY_WRITTEN
        reason = refusal(path, told, row, rule, reason)
        site = None
        if row is None or rule.qconfig is None or reason is not None:
            size = self.count(held, False)
            self.plan.left.append(
                Left(
                    path=path,
                    kind=told,
                    reason=reason or "",
                    rule=rule.text,
                    call=call,
                    float_bytes=size,
                    opt_out=rule.opt_out,
                )
            )
        else:
            site = Site(
                path=path,
                kind=told,
                operator=row.name,
                qconfig=rule.qconfig,
                rule=rule.text,
                call=call,
                float_bytes=self.count(held, True),
                opt_out=rule.opt_out,
                shape=shape,
                part_rules=part_rules,
            )
            self.plan.sites.append(site)
        for tensor in held:
            if tensor.dim() > 1:
                self.users.setdefault(edit.identity(tensor), []).append(site or self.plan.left[-1])
        return site

    def decide_weights(
        self,
        path: str,
        kind: Any,
        row: Operator,
        rule: Rule,
        rules: Mapping[str, Rule],
        module: nn.Module,
        shape: tuple[int, ...],
    ) -> None:
        """Record a Site of those weights of a module that their own rules quantize, and why the others stay float."""
        told, tensors = type_name(kind), dict(module.named_parameters(remove_duplicate=False))
        taken: dict[str, Rule | None] = dict(rules)
        for name, own in rules.items():
            weight = _join(path, name)
            reason = refusal(weight, told, row, own)
            if reason is not None:
                own = own._replace(opt_out=opt_out(weight))
                self.decide(weight, kind, None, own, reason, [tensors.pop(name)])
                taken[name] = None
        if any(taken.values()):
            main, others = join(path, told, rule, taken)
            self.decide(path, kind, row, main, None, tensors.values(), shape, part_rules=others)

    def count(self, tensors: Iterable[torch.Tensor], is_quantized: bool) -> int:
        """Return the bytes of a candidate's tensors, and enter the weights among them."""
        total = 0
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            total += size
            if tensor.dim() > 1:
                key = edit.identity(tensor)
                self.weights[key] = (size, is_quantized and self.weights.get(key, (0, True))[1])
        return total

    def check_orders(self) -> None:
        """Raise MappingNameError for a set_module_name_object_type_order entry whose index is never reached."""
        for name, kind, index in self.mapping.module_name_object_type_order_qconfigs:
            count = self.counts[(name, kind)]
            if index >= count or index < 0:
                raise MappingNameError(
                    f"set_module_name_object_type_order({name!r}, {type_name(kind)}, {index}): "
                    f"{name!r} has {count} quantizable {type_name(kind)}, numbered from 0"
                )


def _kept_forwards(root: nn.Module) -> Iterator[tuple[int, str]]:
    """Yield each module whose own forward an attribute holds, which would run on with quantized weights, and say so."""
    for module in root.modules():
        for name, held in vars(module).items():
            for value in pytree.tree_leaves(held):
                while isinstance(value, functools.partial):
                    value = value.func
                owner = getattr(value, "__self__", None)
                if isinstance(value, types.MethodType) and isinstance(owner, nn.Module) and value == owner.forward:
                    told = f"self.{name} of {type_name(type(module))} holds its forward; let it hold the module"
                    yield id(owner), told


def plan(traced: Traced, mapping: QConfigMapping, operators: Sequence[Operator]) -> Plan:
    """Return what each candidate becomes and why.

    Raises QConfigError where an entry that names a candidate directly gives it a qconfig that its operator cannot take.
    """
    return _Planner(traced.module, traced.names, mapping, operators, traced.keep).run(traced.module.graph)


def plan_modules(
    module: nn.Module, mapping: QConfigMapping, operators: Sequence[Operator], written: frozenset[str] = frozenset()
) -> Plan:
    """Return what each module of a tree becomes and why; functional calls are out of reach. Raises as `plan` does.

    written: the parameters that forward writes into.
    """
    return _Planner(module, names_of(module), mapping, operators, Keep(written=written)).run_tree()


def replay(module: fx.GraphModule, sites: Sequence[Site], operators: Sequence[Operator]) -> Plan:
    """Return the plan that holds these sites, taken elsewhere for the same architecture (a checkpoint's).

    Raises LookupError, saying what is missing, where the graph has no such module or call.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    calls = []
    for site in sites:
        if site.call is None:
            module.get_submodule(site.path)
            continue
        row, node = find_row(operators, site.operator), nodes.get(site.call)
        target = find_target(row, node) if row is not None and node is not None else None
        if target is None or target.weight.target != site.path:
            raise LookupError(f"no call {site.call!r} of {site.kind} on {site.path!r}")
        calls.append((site, target))
    return Plan(list(sites), [], calls)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
