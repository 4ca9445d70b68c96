"""What a mapping's entries mean for a model, and what they come to for one candidate and its weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fxquant.errors import MappingNameError, QConfigError, nearest, warn
from fxquant.graph.module import ASKED
from fxquant.graph.trace.trace import Names
from fxquant.operators import Operator
from fxquant.qconfig_mapping import QConfigMapping, Rule, type_name


def check_mapping(mapping: QConfigMapping, known: Names, functions: Iterable[Any] = ()) -> None:
    """Raise MappingNameError for a name or pattern that matches nothing in the model; warn of a type not in it."""
    modules = {path for path in known.aliases if path}
    names = modules | known.weights
    scopes = [key[0] for key in mapping.module_name_object_type_order_qconfigs]
    for told, given, there in (
        ("module or weight", mapping.module_name_qconfigs, names),
        ("module", scopes, modules),
    ):
        for name in given:
            if name and name not in there:
                is_vector = name in known.tensors - known.weights
                lacks = "which has no two dimensions and stays float" if is_vector else "which is not in the model"
                raise MappingNameError(f"the mapping names {told} {name!r}, {lacks}{nearest(name, there)}")
    for pattern in mapping.module_name_regex_qconfigs:
        probe = QConfigMapping().set_module_name_regex(pattern, None)
        if not any(probe.resolve(name, "", (), 0).text.startswith("module_name_regex") for name in (*names, "")):
            raise MappingNameError(
                f"the mapping's regular expression {pattern!r} matches no module or weight from its start (re.match)"
                f"{nearest(pattern, names)}"
            )
    present = known.kinds | set(functions)
    for kind in mapping.object_type_qconfigs:
        if kind not in present:
            warn(f"the mapping has an entry for {type_name(kind)}, which occurs nowhere in the model")


def rank(rule: Rule) -> int:
    """Return how far back a rule stands among several."""
    return next(place for place, start in enumerate(("module_name", "object_type", "")) if rule.text.startswith(start))


def main_rule(own: Rule, rules: Iterable[Rule]) -> Rule:
    """Return the rule that speaks for a candidate whose weights have these: one that quantizes, its own if there."""
    return min(rules, key=lambda rule: (rule.qconfig is None, rule != own), default=own)


def refusal(path: str, told: str, row: Operator | None, rule: Rule, reason: str | None = None) -> str | None:
    """Return why a candidate or weight stays float under a rule, or None. reason: why it does under any.

    Raises QConfigError where the rule names it directly and its operator cannot take the qconfig.
    """
    if rule.qconfig is None:
        return ASKED if rule.text != "no entry" else "no mapping entry covers it"
    if reason is not None or row is None or row.accepts(rule.qconfig):
        return reason
    takes = "; ".join(scheme.name for scheme in row.schemes)
    if rule.direct:
        raise QConfigError(
            f"{path!r} ({told}) cannot take the qconfig that {rule.text} gives it: {rule.qconfig}. It takes: {takes}"
        )
    return f"its qconfig ({rule.qconfig}) is for other operators; this one takes: {takes}"


def join(path: str, told: str, own: Rule, rules: Mapping[str, Rule | None]) -> tuple[Rule, tuple[str, ...]]:
    """Return one rule for a module whose weights have these (None: float32), and the other entries that decided.

    own: the module's. Raises QConfigError where the weights' activations do not go together.
    """
    main = main_rule(own, filter(None, rules.values()))
    assert main.qconfig is not None
    _check_activations(path, told, rules)
    chosen = {name: rule and rule.qconfig for name, rule in rules.items()}
    parts = tuple((name, qconfig) for name, qconfig in chosen.items() if qconfig != main.qconfig)
    others = dict.fromkeys(rule.text for rule in rules.values() if rule is not None and rule.text != main.text)
    return main._replace(qconfig=replace(main.qconfig, parts=parts)), tuple(others)


def _check_activations(path: str, told: str, rules: Mapping[str, Rule | None]) -> None:
    """Raise QConfigError unless the activations of a module's weights share their scales alike, and their range."""
    given = [(name, rule, rule.qconfig) for name, rule in rules.items() if rule is not None]
    ways = [(name, rule, qconfig.activation) for name, rule, qconfig in given if qconfig and qconfig.activation]
    for (name, rule, way), (other_name, other_rule, other) in itertools.combinations(ways, 2):
        if way.axis != other.axis or (way.dtype == other.dtype and way != other):
            raise QConfigError(
                f"{path!r} ({told}) quantizes its activations in one way, but {rule.text} gives {name!r} '{way}', "
                f"{other_rule.text} gives {other_name!r} '{other}'; give both the same activation, or one of them a "
                "weight-only qconfig (float16_dynamic_qconfig) or None"
            )
