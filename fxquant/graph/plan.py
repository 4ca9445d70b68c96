"""Third pass: the mapping and the operator table decide, once, what each candidate becomes and why.

A candidate is a module or call that holds a weight of two or more dimensions. Each becomes a Site, or is left with a
reason. Nothing is changed here, and nothing later decides again.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from fxquant.errors import MappingNameError, QConfigError
from fxquant.graph import edit
from fxquant.graph.constants import constant_of, is_transposition
from fxquant.graph.kinds import base_of, known_base, redefined
from fxquant.graph.module import NOTHING, Coverage, Left, Site
from fxquant.graph.reads import weights_read
from fxquant.graph.rules import join, main_rule, rank, refusal
from fxquant.graph.trace import SCOPE, Names, Traced, forward_of, names_of, wrapped_in
from fxquant.nn import QuantizedModule
from fxquant.nn.fused import FLOAT_TYPES, linear_relu
from fxquant.nn.transformer import PLAIN_FORWARDS
from fxquant.operators import Operator, find_function_row, find_module_row, find_row
from fxquant.operators.base import refuse_weight, sole_weight
from fxquant.qconfig_mapping import QConfigMapping, Rule, name_text, opt_out, opt_out_one, type_name


class Target(NamedTuple):
    """A functional call that a Site is about.

    node: the call. operand: what it takes as its weight. weight: the get_attr node which that is made of.
    is_stored_transposed, is_taken_transposed: whether the tensor, and what the call takes, are (I, O) and not (O, I).
    """

    node: fx.Node
    operand: fx.Node
    weight: fx.Node
    is_stored_transposed: bool
    is_taken_transposed: bool


@dataclass
class Plan:
    """What was decided. calls: the functional sites' nodes, by the weight's path and the call's name."""

    sites: list[Site]
    left: list[Left]
    calls: list[tuple[Site, Target]]
    coverage: Coverage = NOTHING


class _Planner:
    """Walks a graph, or a module tree, once and collects the decisions."""

    def __init__(self, module: nn.Module, names: Names, mapping: QConfigMapping, operators: Sequence[Operator]) -> None:
        self.module, self.names, self.mapping, self.operators = module, names, mapping, operators
        self.plan = Plan([], [], [])
        self.counts: collections.Counter[tuple[str, Any]] = collections.Counter()
        self.weights: dict[tuple[Any, ...], tuple[int, bool]] = {}  # each one's bytes, and whether all take it as int8
        self.entered: set[int] = set()  # the containers that were visited, which may stand at several paths

    def run(self, graph: fx.Graph) -> Plan:
        """Return the plan for every candidate of the graph."""
        seen: set[str] = set()
        for node in graph.nodes:
            if node.op == "call_module":
                if node.target not in seen:
                    seen.add(node.target)
                    shape = _example_shape(node)
                    self.visit_module(node.target, self.module.get_submodule(node.target), shape=shape)
            elif node.op in ("call_function", "call_method"):
                self.visit_call(node)
        return self.finish()

    def run_tree(self) -> Plan:
        """Return the plan for every module, whatever calls it."""
        self.visit_module("", self.module)
        return self.finish()

    def finish(self) -> Plan:
        """Return the plan, all candidates visited."""
        self.check_orders()
        done = sum(size for size, is_quantized in self.weights.values() if is_quantized)
        self.plan.coverage = Coverage(done, sum(size for size, _ in self.weights.values()))
        return self.plan

    def visit_module(self, path: str, module: nn.Module, inside: str = "", shape: tuple[int, ...] = ()) -> None:
        """Decide for a leaf module and for what lies inside it. inside: why children cannot be swapped, if so."""
        if isinstance(module, QuantizedModule):
            return
        kind = FLOAT_TYPES.get(type(module), type(module))
        base = base_of(module, self.operators)
        row = None if base is None or redefined(type(module), base) else find_module_row(self.operators, base)
        own = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        if row is not None or own:
            known = None if base is None else FLOAT_TYPES.get(base, base)
            is_whole = row is not None or not any(True for _ in module.children())
            weights = {_join(path, name): name for name in (row.parts if row is not None else sole_weight)(module)}
            found = self.rules(path, path.rpartition(".")[0], kind, known, is_whole, weights)
            rules = {name: found[weight] for weight, name in weights.items()}
            rule = main_rule(found[""], rules.values())
            shut = inside or _hidden(module)
            reason = shut or (row.refuse_module(module) if row else _unknown(kind, self.operators))
            if row is not None and reason is None and len(set(rules.values())) > 1:
                self.decide_weights(path, kind, row, rule, rules, module, shape)
            else:
                held = module.parameters(recurse=row is not None)  # what is in a module without a row counts itself
                self.decide(path, kind, row, rule, reason, held, shape)
        if row is not None:
            self.check_parts(path, module, rule, rules)
        elif id(module) not in self.entered:  # else what it holds has been decided, and is swapped once
            self.entered.add(id(module))
            shut = inside or _hidden(module)
            if not shut and not _calls_children(module):
                shut = f"{type_name(kind)} reads its children's weights itself"
            read = weights_read(module)
            for name, child in module._modules.items():  # named_children skips the second name of a module
                if child is None:
                    continue
                itself = f"the code of {type_name(kind)} reads self.{name}'s weight itself" if name in read else ""
                self.visit_module(_join(path, name), child, shut or itself)

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
        function = torch.nn.functional.linear if node.target is linear_relu else node.target
        scope, name = node.meta.get(SCOPE, ""), _call_name(function)
        is_known = target is not None and target.weight.target in self.names.tensors
        path = str(target.weight.target) if target is not None and is_known else ""
        rule = self.rules(scope, scope, function, weights=(path,))[path]
        if target is None or not is_known:
            unknown = "its weight is no registered parameter or buffer"
            self.decide(node.name, name, None, rule, unknown, (), call=node.name)
            return
        tensor = edit.get_tensor(self.module, path)
        if tensor is None:
            raise AssertionError(f"{path} was traced but is not in the graph module")
        reason = _refuse_call(row, target, tensor) if rule.qconfig is not None else None
        site = self.decide(path, name, row, rule, reason, (tensor,), _example_shape(node), call=node.name)
        if site is not None:
            self.plan.calls.append((site, target))

    def visit_other_call(self, node: fx.Node, row: Operator | None) -> None:
        """Report a call that reads a weight where no row takes it: what it computes with stays float."""
        if is_transposition(node) and all(user.op in ("call_function", "call_method") for user in node.users):
            return  # which is reported itself
        scope, name = node.meta.get(SCOPE, ""), _call_name(node.target)
        reason = _no_form(name) if row is None else f"only a form of one constant, its {row.weights[0]!r}, is quantized"
        for path, tensor in self.matrices(node).items():
            if isinstance(tensor, nn.Parameter) or row is not None:
                rule = self.rules(scope, scope, node.target)[""]
                self.decide(path, name, None, rule, reason, (tensor,), call=node.name)

    def matrices(self, node: fx.Node) -> dict[str, torch.Tensor]:
        """Return the constants of two or more dimensions that a call takes, by their paths."""
        constants = [constant_of(operand) for operand in node.all_input_nodes]
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
        told = kind if isinstance(kind, str) else type_name(kind)
        reason = refusal(path, told, row, rule, reason)
        site = None
        if row is None or rule.qconfig is None or reason is not None:
            size = self.count(tensors, False)
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
                float_bytes=self.count(tensors, True),
                opt_out=rule.opt_out,
                shape=shape,
                part_rules=part_rules,
            )
            self.plan.sites.append(site)
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


def plan(traced: Traced, mapping: QConfigMapping, operators: Sequence[Operator]) -> Plan:
    """Return what each candidate becomes and why.

    Raises QConfigError where an entry that names a candidate directly gives it a qconfig that its operator cannot take.
    """
    return _Planner(traced.module, traced.names, mapping, operators).run(traced.module.graph)


def plan_modules(module: nn.Module, mapping: QConfigMapping, operators: Sequence[Operator]) -> Plan:
    """Return what each module of a tree becomes and why; functional calls are out of reach. Raises as `plan` does."""
    return _Planner(module, names_of(module), mapping, operators).run_tree()


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


def find_target(row: Operator, node: fx.Node) -> Target | None:
    """Return where a row's call takes its weight, None if that is no constant."""
    operands = name_operands(row, node)
    operand = operands.get(row.weights[0])
    constant = constant_of(operand)
    if operand is None or constant is None:
        return None
    is_taken_transposed = row.is_transposed(operands)
    return Target(node, operand, constant.source, constant.is_transposed != is_taken_transposed, is_taken_transposed)


def name_operands(row: Operator, node: fx.Node) -> dict[str, Any]:
    """Return a call's operands by the names that its row gives them."""
    return {**dict(zip(row.operands, node.args, strict=False)), **node.kwargs}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _example_shape(node: fx.Node) -> tuple[int, ...]:
    """Return the rows, inputs and outputs of a call on the example inputs; indices count as inputs of that size."""
    given = next((n.meta.get("tensor_meta") for n in node.all_input_nodes if constant_of(n) is None), None)
    x, y = _first_tensor(given), _first_tensor(node.meta.get("tensor_meta"))
    if x is None or y is None or not len(x.shape) * len(y.shape) * y.shape.numel():
        return ()
    outputs = y.shape[-1]
    return y.shape.numel() // outputs, x.shape[-1] if x.dtype.is_floating_point else outputs, outputs


def _first_tensor(meta: Any) -> TensorMetadata | None:
    """Return the first tensor in what was recorded of a value."""
    parts = pytree.tree_leaves(meta, is_leaf=lambda part: isinstance(part, TensorMetadata))
    return next((part for part in parts if isinstance(part, TensorMetadata)), None)


def _calls_children(module: nn.Module) -> bool:
    """Return whether a module calls its children, so that they may be swapped: a user's forward, a container's, or one
    of torch's transformers', which `avoid_fast_path` keeps from reading their weights.
    """
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, AveragedModel)):
        return True
    if isinstance(module, nn.MultiheadAttention):  # a subclass's own forward may call super's
        return False
    forward = forward_of(module)
    module_name = getattr(forward, "__module__", None) or ""  # the forward of a GraphModule has none
    return forward in PLAIN_FORWARDS or not module_name.startswith("torch.")


def _hidden(module: nn.Module) -> str:
    """Return why a module's type does not say what it computes, if so."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled to TorchScript; put the nn.Module that it was made from in its place"
    if wrapped_in(module):
        return f"{type(module).__name__} is a wrapper; put what it holds, its .{wrapped_in(module)}, in its place"
    return "its forward was replaced on the instance" if "forward" in vars(module) else ""


def _refuse_call(row: Operator, target: Target, tensor: torch.Tensor) -> str | None:
    """Return why a call of a row stays float, or None."""
    operands = name_operands(row, target.node)
    if tensor.dim() != 2 and (target.is_stored_transposed or target.is_taken_transposed):
        return f"its weight is {tensor.dim()}-D, not 2-D"
    if len(target.node.args) > len(row.operands) or not operands.keys() <= set(row.operands):
        return f"it is called with more than {', '.join(row.operands)}"
    if sum(operand is target.operand for operand in operands.values()) > 1:
        return "its weight is its input too"
    examples = fx.node.map_arg(operands, lambda node: node.meta.get("tensor_meta"))
    return row.refuse_call(examples) or refuse_weight(tensor.t() if target.is_stored_transposed else tensor)


def _unknown(kind: type[nn.Module], operators: Sequence[Operator]) -> str:
    """Return why a weight-bearing module without a row stays float."""
    known = known_base(kind, operators)
    if known is not None:
        own = "has a forward of its own" if kind.forward is not known.forward else "redefines"
        names = "" if kind.forward is not known.forward else f" {', '.join(redefined(kind, known))}"
        return f"it is a subclass of {type_name(known)} that {own}{names}"
    if not kind.forward.__module__.startswith("torch."):
        return "its forward is not traced, so calls with weights of its own are out of reach"
    return _no_form(type_name(kind))


def _no_form(name: str) -> str:
    """Return why a module or call that no row knows stays float."""
    library, _, kind = name.lower().partition(".")
    if library in ("nn", "torch") and "conv" in kind:
        return f"{name} has no dynamic form: convolutions stay float under a dynamic qconfig"
    if library in ("nn", "torch") and kind == "bilinear":
        return f"{name} multiplies two inputs with each other; only forms of one input are quantized"
    return f"there is no quantized form of {name}"


def _call_name(target: Any) -> str:
    """Return a function as one would write it, a method as .name()."""
    if isinstance(target, str):
        return f".{target}()"
    return type_name(target) if not isinstance(target, torch._ops.OpOverload) else str(target)
