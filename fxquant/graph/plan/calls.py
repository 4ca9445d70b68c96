"""Decisions about the functional calls of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from fxquant.graph import edit
from fxquant.graph.constants import asks_kind, constant_of, is_cast, is_transposition
from fxquant.graph.plan.decisions import Candidate, Decisions
from fxquant.graph.plan.reasons import refuse_call, why_no_form
from fxquant.graph.plan.rules import Rules, dynamic
from fxquant.graph.plan.targets import Target, call_name, example_shape, find_target, name_operands, pattern_of
from fxquant.graph.trace.fold import SOURCE, storage_of, written
from fxquant.graph.trace.trace import Traced
from fxquant.graph.trace.tracer import SCOPE
from fxquant.graph.why import Reason, Why, because
from fxquant.nn.fused import SPELT
from fxquant.operators import Operator, find_function_operator
from fxquant.qconfig_mapping import Rule


class CallWalk:
    """Decides for functional calls. targets: of those that are sites, by their number among the sites."""

    def __init__(self, traced: Traced, operators: Sequence[Operator], rules: Rules, decisions: Decisions) -> None:
        self.targets: dict[int, Target] = {}
        self._traced, self._operators, self._rules, self._decisions = traced, operators, rules, decisions
        self._changed = written(traced.module, traced.module.graph)  # the storages that the graph writes to

    def visit(self, node: fx.Node) -> None:
        """Decide for a call."""
        operator = self._static_operator(node) or find_function_operator(self._operators, node.target)
        target = find_target(operator, node) if operator is not None else None
        is_alone = target is not None and [*self._matrices(node)] == [target.weight.target]
        if operator is None or (pattern_of(operator, node).may_lack_weight and not is_alone):
            self._visit_other(node, operator)
            return
        function, scope = SPELT.get(node.target, node.target), node.meta.get(SCOPE, "")
        path = "" if target is None else str(target.weight.target)
        is_known = path in self._traced.names.tensors
        source = target.weight.meta.get(SOURCE, path) if target is not None and is_known else ""
        rule = self._rules.find(scope, scope, function, weights=(source,))[source]
        rule = rule if operator.is_static else dynamic(rule)
        if target is None or not is_known:
            unknown = Candidate(node.name, call_name(function), None, (), call=node.name)
            self._decisions.decide(unknown, rule, because(Why.NOT_REGISTERED))
            return
        tensor = edit.get_tensor(self._traced.module, path)
        assert tensor is not None, f"{path} was traced but is not in the graph module"
        reason = self._refuse(operator, rule, target, tensor)
        candidate = Candidate(path, call_name(function), operator, (tensor,), example_shape(node), node.name)
        if self._decisions.decide(candidate, rule, reason):
            self.targets[len(self._decisions.sites) - 1] = target

    def _static_operator(self, node: fx.Node) -> Operator | None:
        """Return the static operator of a call whose rule asks for that, and that it can be."""
        static = find_function_operator(self._operators, node.target, is_static=True)
        target = find_target(static, node) if static is not None else None
        path = "" if target is None else str(target.weight.target)
        if static is None or target is None or path not in self._traced.names.tensors:
            return None
        function, scope = SPELT.get(node.target, node.target), node.meta.get(SCOPE, "")
        rule = self._rules.peek(scope, function, target.weight.meta.get(SOURCE, path))
        if rule.qconfig is None or not rule.qconfig.is_static:
            return None
        if find_function_operator(self._operators, node.target) is None:
            return static
        tensor = edit.get_tensor(self._traced.module, path)  # a dynamic one takes what this one refuses, or says why
        is_refused = tensor is None or self._refuse_bias(static, target) or refuse_call(static, target, tensor)
        return None if is_refused or not static.accepts(rule.qconfig) else static

    @staticmethod
    def _refuse_bias(operator: Operator, target: Target) -> Reason | None:
        bias = name_operands(operator, target.node).get("bias")
        is_constant = bias is None or constant_of(bias) is not None
        return None if is_constant else because(Why.COMPUTED_BIAS)

    def _refuse(self, operator: Operator, rule: Rule, target: Target, tensor: torch.Tensor) -> Reason | None:
        """Return why a call with an operator stays float, or None."""
        reason = refuse_call(operator, target, tensor) if rule.qconfig is not None else None
        if reason is None and operator.is_static:
            reason = self._refuse_bias(operator, target)
        if reason is None and storage_of(tensor) in self._changed:
            return because(Why.WRITTEN)
        if reason is None and self._traced.keep.preserved.may_write(str(target.weight.target)):
            return because(Why.PRESERVED_WRITES)
        return reason

    def _visit_other(self, node: fx.Node, operator: Operator | None) -> None:
        """Report a call that reads a weight and that no operator covers: the weight stays float."""
        is_matrix = is_transposition(node) is not None or is_cast(node)
        if is_matrix and all(user.op in ("call_function", "call_method") for user in node.users):
            return  # the calls that use it are reported
        scope = node.meta.get(SCOPE, "")
        reason = why_no_form(node.target)
        if operator is not None:
            reason = because(Why.NOT_ALONE, pattern_of(operator, node).operand_of(operator.weights[0]))
        for path, tensor in self._matrices(node).items():
            if isinstance(tensor, nn.Parameter) or operator is not None:
                rule = self._rules.find(scope, scope, node.target)[""]
                candidate = Candidate(path, call_name(node.target), None, (tensor,), call=node.name)
                self._decisions.decide(candidate, rule, reason)

    def _matrices(self, node: fx.Node) -> dict[str, torch.Tensor]:
        """Return the constants of two or more dimensions whose values a call takes, by their paths."""
        constants = [constant_of(operand) for operand in node.all_input_nodes if not asks_kind(node, operand)]
        paths = [str(constant.source.target) for constant in constants if constant is not None]
        tensors = {path: edit.get_tensor(self._traced.module, path) for path in paths}
        return {path: tensor for path, tensor in tensors.items() if tensor is not None and tensor.dim() > 1}
