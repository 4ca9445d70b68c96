"""Decisions about single sites, written as a mapping that a person would write: the rule first, then the exceptions."""

from __future__ import annotations

import collections
from dataclasses import replace
from typing import Any

from torch import fx, nn

from fxquant.graph.record import Record, Site, Skipped
from fxquant.graph.trace.tracer import SCOPE
from fxquant.nn.fused import FLOAT_TYPES, SPELT
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import QConfigMapping

Choices = dict[int, QConfig]
"""What each site gets, by its number in the record; those that stay float are missing."""


def by_type(prepared: nn.Module, record: Record, choices: Choices) -> QConfigMapping:
    """Return the default mapping with an entry for each type that mostly gets something else, and the rest by name."""
    wanted = {i: choices.get(i) for i in range(len(record.sites))}
    mapping = record.mapping.copy()
    common: dict[int, QConfig | None] = {}
    types = {i: _object_type(prepared, site) for i, site in enumerate(record.sites)}
    for object_type in dict.fromkeys(types.values()):
        numbers = [i for i in types if types[i] is object_type]
        counts = collections.Counter(_plain(wanted[i]) for i in numbers)
        first = max(counts, key=lambda qconfig: (counts[qconfig], qconfig == mapping.global_qconfig))
        common.update(dict.fromkeys(numbers, first))
        if first != mapping.global_qconfig:
            mapping.set_object_type(object_type, first)
    return _with_exceptions(prepared, record, mapping, wanted, common)


def by_name(prepared: nn.Module, record: Record, choices: Choices) -> QConfigMapping:
    """Return the record's mapping with an entry of its own for each site that gets something else."""
    wanted = {i: choices.get(i) for i in range(len(record.sites))}
    before: dict[int, QConfig | None] = {i: site.qconfig for i, site in enumerate(record.sites)}
    return _with_exceptions(prepared, record, record.mapping.copy(), wanted, before)


def _with_exceptions(
    prepared: nn.Module,
    record: Record,
    mapping: QConfigMapping,
    wanted: dict[int, QConfig | None],
    before: dict[int, QConfig | None],
) -> QConfigMapping:
    """Add an entry for each site, and each weight of one, that would not get what is wanted."""
    for i, site in enumerate(record.sites):
        qconfig = wanted[i]
        named = dict.fromkeys(name for whole in (site.qconfig, qconfig) if whole is not None for name, _ in whole.parts)
        if _plain(qconfig) != _plain(before[i]):
            if site.call is None:
                mapping.set_module_name(site.path, _plain(qconfig))
            else:
                mapping.set_module_name_object_type_order(*_place(prepared, record, site), _plain(qconfig))
        for weight in named:
            part = None if qconfig is None else qconfig.of(weight)
            mapping.set_module_name(f"{site.path}.{weight}" if site.path else weight, part)
    return mapping


def _plain(qconfig: QConfig | None) -> QConfig | None:
    """Return what a site gets but for those of its weights that have a qconfig of their own."""
    return replace(qconfig, parts=()) if qconfig is not None else None


def _object_type(prepared: nn.Module, site: Site) -> Any:
    """Return the type or function that an entry for all sites like this one names."""
    if site.call is None:
        module_type = type(prepared.get_submodule(site.path))
        return FLOAT_TYPES.get(module_type, module_type)
    assert isinstance(prepared, fx.GraphModule)
    return _scope_and_function(next(node for node in prepared.graph.nodes if node.name == site.call))[1]


def _place(prepared: nn.Module, record: Record, site: Site) -> tuple[str, Any, int]:
    """Return a functional site's scope, function, and number among the candidates of both."""
    assert isinstance(prepared, fx.GraphModule)
    nodes = {node.name: node for node in prepared.graph.nodes}
    entries: list[Site | Skipped] = [*record.sites, *record.skipped]
    in_order = sorted((str(entry.call) for entry in entries if entry.call in nodes), key=list(nodes).index)
    places = [_scope_and_function(nodes[call]) for call in in_order]
    at = in_order.index(str(site.call))
    return (*places[at], places[:at].count(places[at]))


def _scope_and_function(node: fx.Node) -> tuple[str, Any]:
    return node.meta.get(SCOPE, ""), SPELT.get(node.target, node.target)
