"""What a plan came to: mapping entries that quantize nothing are told, and a model in which nothing is quantized.

A strict plan leaves nothing float that the mapping does not ask to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from fxquant.errors import QConfigError, warn
from fxquant.graph.module import ASKED, Left, Record, Site
from fxquant.graph.trace.trace import Names
from fxquant.qconfig_mapping import QConfigMapping, order_text, type_name


def judge(model: str, record: Record, known: Names, functions: Iterable[Any] = (), *, strict: bool = False) -> None:
    """Warn of the mapping's entries that ask for a qconfig and quantize nothing; once, of a model with no site.

    strict: raise QConfigError, which lists them, where candidates stay float that the mapping does not ask to.
    """
    mapping, left = record.mapping, record.left
    if strict:
        _refuse_left(model, record)
    decided: list[Site | Left] = [*record.sites, *left]
    used = {rule for site in record.sites for rule in (site.rule, *site.part_rules)}
    entries = list(_entries(mapping, known.kinds | set(functions)))
    if not used:
        if entries or mapping.global_qconfig is not None:
            reasons = list(dict.fromkeys(f"{part.path or model} ({part.kind}): {part.reason}" for part in left))
            more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            why = "; ".join(reasons[:3]) + more or "no module or call in it has a weight of two or more dimensions"
            warn(f"nothing in this {model} is to be quantized: {why}")
        return
    for entry in entries:
        if entry.text not in used:
            own = [part for part in left if part.rule == entry.text]
            reasons = [f"{part.path or model} ({part.kind}) stays float: {part.reason}" for part in own]
            if reasons or not any(entry.covers(part, known) for part in decided):
                why = reasons[0] if reasons else "nothing there has a weight that can be quantized"
                warn(f"the mapping's {entry.text} quantizes nothing: {why}; in all, {record.outcome}")


def _refuse_left(model: str, record: Record) -> None:
    """Raise QConfigError for the candidates that stay float unasked."""
    unasked = [part for part in record.left if part.reason != ASKED]
    if unasked:
        told = "".join(f"\n  {part.path or model} ({part.kind}): {part.reason}; {part.opt_out}" for part in unasked)
        raise QConfigError(
            f"strict: {len(unasked)} of {model}'s candidates would stay float, which the mapping does not ask for "
            f"({record.outcome}). Give it a qconfig that it takes, or accept it as float by its line's entry:{told}"
        )


class _Entry(NamedTuple):
    """An entry of a mapping, as rules name it, and what it speaks of: paths that match, or a type's name."""

    text: str
    paths: str | None = None
    kind: str | None = None

    def covers(self, part: Site | Left, known: Names) -> bool:
        """Return whether the entry speaks of a candidate or of a weight of it."""
        inside = f"{part.path}." if part.path else ""
        paths = (part.path, *(path for path in known.weights if path.startswith(inside)))
        return part.kind == self.kind or (self.paths is not None and any(re.match(self.paths, path) for path in paths))


def _entries(mapping: QConfigMapping, present: set[Any] | frozenset[Any]) -> Iterator[_Entry]:
    """Yield the entries that ask for a qconfig, but for the global one and types that are not in the model."""
    for name, qconfig in mapping.module_name_qconfigs.items():
        if qconfig is not None:
            yield _Entry(f"module_name {name!r}", rf"{re.escape(name)}(\.|$)" if name else "")
    for pattern, qconfig in mapping.module_name_regex_qconfigs.items():
        if qconfig is not None:
            yield _Entry(f"module_name_regex {pattern!r}", pattern)
    for kind, qconfig in mapping.object_type_qconfigs.items():
        if qconfig is not None and kind in present:
            yield _Entry(f"object_type {type_name(kind)}", kind=type_name(kind))
    for key, qconfig in mapping.module_name_object_type_order_qconfigs.items():
        if qconfig is not None:
            yield _Entry(order_text(*key))
