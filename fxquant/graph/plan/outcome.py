"""Warnings about a plan: mapping entries that quantize nothing, and a model in which nothing is quantized.

A strict plan is an error if anything stays float that the mapping does not leave float.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from fxquant.errors import QConfigError, warn
from fxquant.graph.record import Record, Site, Skipped
from fxquant.graph.trace.trace import Names
from fxquant.graph.why import Why
from fxquant.learned import refuse_learned
from fxquant.qconfig_mapping import Entry, QConfigMapping, Setter, order_entry, type_name


def judge(model: str, record: Record, known: Names, functions: Iterable[Any] = (), *, strict: bool = False) -> None:
    """Warn of the mapping's entries that ask for a qconfig and quantize nothing; once, of a model with no site, and of
    static qconfigs for a model without a graph.

    strict: raise QConfigError, which lists them, where candidates stay float that the mapping does not ask to. Raises
    QConfigError too for step sizes to be learned where nothing will train.
    """
    mapping, skipped = record.mapping, record.skipped
    for site in () if record.is_trained else record.sites:
        refuse_learned(site.path, site.kind, site.qconfig)
    if strict:
        _refuse_unasked(model, record)
        _refuse_floats(model, record)
    if record.sites and not record.is_traced and mapping.has_static:
        warn(
            f"this {model} has no graph, and so no values to calibrate: its static qconfigs quantize activations as it "
            "runs (their as_dynamic); data calibrates nothing. torch.export can make a graph of most models: "
            "prepare_fx(torch.export.export(model, example_inputs).module(), qconfig_mapping, example_inputs)"
        )
    decided: list[Site | Skipped] = [*record.sites, *skipped]
    used = {entry for site in record.sites for entry in (site.entry, *site.part_entries)}
    entries = list(_asking(mapping, known.types | set(functions)))
    if not used:
        if entries or mapping.global_qconfig is not None:
            reasons = list(dict.fromkeys(f"{part.path or model} ({part.kind}): {part.reason}" for part in skipped))
            more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            why = "; ".join(reasons[:3]) + more or "no module or call in it has a weight of two or more dimensions"
            warn(f"nothing in this {model} is to be quantized: {why}")
        return
    for entry in entries:
        if entry not in used:
            parts = [part for part in skipped if part.entry == entry]
            reasons = [f"{part.path or model} ({part.kind}) stays float: {part.reason}" for part in parts]
            if reasons or not any(_covers(entry, part, known) for part in decided):
                why = reasons[0] if reasons else "nothing there has a weight that can be quantized"
                warn(f"the mapping's {entry} quantizes nothing: {why}; in all, {record.outcome}")


def _refuse_unasked(model: str, record: Record) -> None:
    """Raise QConfigError for the candidates that stay float unasked."""
    unasked = [part for part in record.skipped if part.why.why is not Why.ASKED]
    if unasked:
        lines = "".join(f"\n  {part.path or model} ({part.kind}): {part.reason}; {part.opt_out}" for part in unasked)
        raise QConfigError(
            f"strict: {len(unasked)} of {model}'s candidates would stay float, which the mapping does not ask for "
            f"({record.outcome}). Give it a qconfig that it takes, or accept it as float with the entry that ends its "
            f"line:{lines}"
        )


def _refuse_floats(model: str, record: Record) -> None:
    """Raise QConfigError for the values between static layers that stay float."""
    floats = record.values.floats
    if floats:
        lines = "".join(f"\n  {value}" for value in floats)
        raise QConfigError(
            f"strict: {len(floats)} of {model}'s values would stay float between integers. Give a layer that reads "
            f"them a dynamic qconfig, or None for float:{lines}"
        )


def _covers(entry: Entry, part: Site | Skipped, known: Names) -> bool:
    """Return whether an entry matches a candidate or one of its weights."""
    if entry.setter is Setter.OBJECT_TYPE:
        return entry.key == (part.kind,)
    if entry.setter not in (Setter.MODULE_NAME, Setter.MODULE_NAME_REGEX):
        return False
    named = str(entry.key[0])
    if entry.setter is Setter.MODULE_NAME:
        named = rf"{re.escape(named)}(\.|$)" if named else ""
    inside = f"{part.path}." if part.path else ""
    return any(re.match(named, path) for path in (part.path, *(p for p in known.weights if p.startswith(inside))))


def _asking(mapping: QConfigMapping, present: set[Any] | frozenset[Any]) -> Iterator[Entry]:
    """Yield the entries that ask for a qconfig, but for the global one and types that are not in the model."""
    for name, qconfig in mapping.module_name_qconfigs.items():
        if qconfig is not None:
            yield Entry(Setter.MODULE_NAME, (name,))
    for pattern, qconfig in mapping.module_name_regex_qconfigs.items():
        if qconfig is not None:
            yield Entry(Setter.MODULE_NAME_REGEX, (pattern,))
    for object_type, qconfig in mapping.object_type_qconfigs.items():
        if qconfig is not None and object_type in present:
            yield Entry(Setter.OBJECT_TYPE, (type_name(object_type),))
    for key, qconfig in mapping.module_name_object_type_order_qconfigs.items():
        if qconfig is not None:
            yield order_entry(*key)
