"""What a mapping's entries mean for a model, and which of them decides for a candidate and for its weights."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fxquant.errors import MappingNameError, QConfigError, nearest, warn
from fxquant.graph.trace.trace import Names
from fxquant.graph.why import Reason, Why, because
from fxquant.operators import Operator
from fxquant.qconfig_mapping import Entry, QConfigMapping, Rule, Setter, opt_out, opt_out_one, type_name

_PRECEDENCE = list(Setter)


def as_mapping(mapping: QConfigMapping | Mapping[str, Any]) -> QConfigMapping:
    """Return a mapping of the prepared model's own, or raise QConfigError for what is none."""
    if isinstance(mapping, QConfigMapping):
        return mapping.copy()
    if isinstance(mapping, Mapping):
        return QConfigMapping.from_dict(dict(mapping))
    theirs = (
        " (torch.ao's: import QConfigMapping from fxquant)" if type(mapping).__module__.startswith("torch.ao") else ""
    )
    raise QConfigError(
        f"qconfig_mapping must be a QConfigMapping or its dict form, got {type(mapping).__name__}{theirs}"
    )


def check_mapping(mapping: QConfigMapping, known: Names, functions: Iterable[Any] = ()) -> None:
    """Raise MappingNameError for a name or pattern that matches nothing in the model; warn of a type not in it."""
    modules = {path for path in known.aliases if path}
    names = modules | known.weights
    scopes = [key[0] for key in mapping.module_name_object_type_order_qconfigs]
    for what, named, allowed in (
        ("module or weight", mapping.module_name_qconfigs, names),
        ("module", scopes, modules),
    ):
        for name in named:
            if name and name not in allowed:
                is_vector = name in known.tensors - known.weights
                lacks = (
                    "which has fewer than two dimensions and stays float" if is_vector else "which is not in the model"
                )
                raise MappingNameError(f"the mapping names {what} {name!r}, {lacks}{nearest(name, allowed)}")
    for pattern in mapping.module_name_regex_qconfigs:
        probe = QConfigMapping().set_module_name_regex(pattern, None)
        if not any(probe.resolve(name, "", (), 0).entry.setter is Setter.MODULE_NAME_REGEX for name in (*names, "")):
            raise MappingNameError(
                f"the mapping's regular expression {pattern!r} matches no module or weight from its start (re.match)"
                f"{nearest(pattern, names)}"
            )
    present = known.types | set(functions)
    for object_type in mapping.object_type_qconfigs:
        if object_type not in present:
            warn(f"the mapping has an entry for {type_name(object_type)}, which occurs nowhere in the model")


class Rules:
    """Finds the mapping's entries for the candidates of a model, which come in the order in which they are counted."""

    def __init__(self, mapping: QConfigMapping, names: Names) -> None:
        self._mapping, self._names = mapping, names
        self._counts = collections.Counter[tuple[str, Any]]()

    def find(
        self, path: str, scope: str, target: Any, base: Any = None, is_whole: bool = False, weights: Iterable[str] = ()
    ) -> dict[str, Rule]:
        """Return the rules that decide: for the next candidate under "", for each of its weights under its path.

        base: the type that a subclass derives from, whose entries decide where there is none for its own. is_whole:
        whether the candidate is all that is at the path: no call, and no module with candidates inside.
        """
        types = (target,) if base is None or base is target else (target, base)
        rules = {weight: self._resolve(path, scope, types, weight) for weight in ("", *weights)}
        is_named = any(weight and rule.entry == Entry(Setter.MODULE_NAME, (weight,)) for weight, rule in rules.items())
        is_last = is_whole and not is_named  # else an entry for the path does not decide for all of the candidate
        out = opt_out(path) if is_last else opt_out_one(scope, target, self._counts[(scope, target)])
        self._counts.update((scope, each) for each in types)
        return {weight: rule._replace(opt_out=out) for weight, rule in rules.items()}

    def peek(self, scope: str, target: Any, weight: str) -> Rule:
        """Return the rule that decides for the next candidate's weight, which stays the next one."""
        return self._resolve(scope, scope, (target,), weight)

    def _resolve(self, path: str, scope: str, types: tuple[Any, ...], weight: str) -> Rule:
        """Return the rule that decides for a candidate, or a weight, by any of the names of a shared module."""
        aliases = [name for name in self._names.aliases.get(path, ()) if name != path]
        inner = weight.removeprefix(f"{path}.")
        names = [(path, weight), *((name, weight if inner == weight else f"{name}.{inner}") for name in aliases)]
        names.sort(key=lambda pair: pair[1] not in self._mapping.module_name_qconfigs)
        at = [(target, self._counts[(scope, target)]) for target in types]
        rules = [self._mapping.resolve(n, scope, (target,), number, w) for target, number in at for n, w in names]
        return min(rules, key=lambda rule: _PRECEDENCE.index(rule.entry.setter))

    def check_parts(self, path: str, module: nn.Module, rule: Rule, apart: Collection[str]) -> None:
        """Raise QConfigError for an entry by name or pattern for a part of a module that is quantized as one Site.

        apart: the names of the weights that may have schemes of their own.
        """
        weights = [name for name, weight in module.named_parameters() if weight.dim() > 1 and name not in apart]
        for name in [*(name for name, _ in module.named_modules() if name), *weights]:
            part = self._mapping.resolve(f"{path}.{name}" if path else name, "", (), 0)
            is_meant = part.entry.setter in (Setter.MODULE_NAME, Setter.MODULE_NAME_REGEX)
            if is_meant and part.qconfig != rule.qconfig:
                raise QConfigError(
                    f"{part.entry} decides for {name!r}, a part of {path!r}, for which {rule.entry} decides otherwise; "
                    f"a {type_name(type(module))} is quantized as a whole: name {path!r}"
                )

    def check_orders(self) -> None:
        """Raise MappingNameError for a set_module_name_object_type_order entry whose index is never reached."""
        for name, object_type, index in self._mapping.module_name_object_type_order_qconfigs:
            count = self._counts[(name, object_type)]
            if index >= count or index < 0:
                raise MappingNameError(
                    f"set_module_name_object_type_order({name!r}, {type_name(object_type)}, {index}): "
                    f"{name!r} has {count} quantizable {type_name(object_type)}, numbered from 0"
                )


def dynamic(rule: Rule) -> Rule:
    """Return what a rule says to an operator without a static form."""
    return rule if rule.qconfig is None else rule._replace(qconfig=rule.qconfig.as_dynamic)


def main_rule(default: Rule, rules: Iterable[Rule]) -> Rule:
    """Return the rule of a candidate whose weights have these: one that quantizes, if possible the default."""
    return min(rules, key=lambda rule: (rule.qconfig is None, rule != default), default=default)


def refusal(path: str, name: str, operator: Operator | None, rule: Rule, reason: Reason | None = None) -> Reason | None:
    """Return why a candidate or weight stays float under a rule, or None. reason: why it does under any.

    Raises QConfigError where the rule names it directly and its operator cannot take the qconfig.
    """
    if rule.qconfig is None:
        return because(Why.NO_ENTRY if rule.entry.setter is Setter.NONE else Why.ASKED)
    if reason is not None or operator is None or operator.accepts(rule.qconfig):
        return reason
    takes = "; ".join(scheme.name for scheme in operator.schemes)
    if rule.direct:
        raise QConfigError(
            f"{path!r} ({name}) cannot take the qconfig that {rule.entry} gives it: {rule.qconfig}. It takes: {takes}"
        )
    return because(Why.OTHER_QCONFIG, rule.qconfig, takes)


def join(path: str, label: str, default: Rule, rules: Mapping[str, Rule | None]) -> tuple[Rule, tuple[Entry, ...]]:
    """Return one rule for a module whose weights have these (None: float32), and the other entries that decided.

    default: the module's. Raises QConfigError where the weights' activations do not go together.
    """
    main = main_rule(default, filter(None, rules.values()))
    assert main.qconfig is not None
    _check_activations(path, label, rules)
    chosen = {name: rule and rule.qconfig for name, rule in rules.items()}
    parts = tuple((name, qconfig) for name, qconfig in chosen.items() if qconfig != main.qconfig)
    others = dict.fromkeys(rule.entry for rule in rules.values() if rule is not None and rule.entry != main.entry)
    return main._replace(qconfig=replace(main.qconfig, parts=parts)), tuple(others)


def _check_activations(path: str, label: str, rules: Mapping[str, Rule | None]) -> None:
    """Raise QConfigError unless the activations of a module's weights share their scales alike, and their range."""
    qconfigs = [(name, rule, rule.qconfig) for name, rule in rules.items() if rule is not None]
    activations = [(name, rule, part.activation) for name, rule, part in qconfigs if part and part.activation]
    for (name, rule, activation), (other_name, other_rule, other) in itertools.combinations(activations, 2):
        if activation.axis != other.axis or (activation.dtype == other.dtype and activation != other):
            raise QConfigError(
                f"{path!r} ({label}) quantizes its activations in one way, but {rule.entry} gives {name!r} "
                f"'{activation}', {other_rule.entry} gives {other_name!r} '{other}'; give both the same activation, "
                "or one of them a weight-only qconfig (float16_dynamic_qconfig) or None"
            )
