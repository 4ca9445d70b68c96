"""Decisions as plain values, and back: sites and skipped candidates as a checkpoint holds them.

Files that are older than the codes hold only sentences, which are kept as they are.
"""

from __future__ import annotations

from typing import Any

from fxquant.graph.record import Site, Skipped, Unfused
from fxquant.graph.values import Edge, FloatValue, IntegerCall, Values
from fxquant.graph.why import NotFused, Reason, Rounded, StaysFloat, Why
from fxquant.operators.values import Form
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import Entry, Setter
from fxquant.spec import TensorSpec

_OLD_NOTES = {
    "with error feedback": Rounded.GPTQ,
    "to nearest: it met no input in data": Rounded.NO_INPUT,
    "to nearest: its inputs in data were not finite, or too large": Rounded.NOT_FINITE,
}


def plain_site(site: Site) -> dict[str, Any]:
    """Return a site as JSON values."""
    return {
        **vars(site),
        "qconfig": site.qconfig.to_dict(),
        "entry": _plain_entry(site.entry),
        "part_entries": list(map(_plain_entry, site.part_entries)),
        "rounded": [rounded.name for rounded in site.rounded],
    }


def read_site(plain: dict[str, Any]) -> Site:
    """Return the site that JSON values describe; LookupError, TypeError or ValueError for others."""
    if "rule" in plain:
        notes = plain["rounding"]
        plain = {
            **{name: value for name, value in plain.items() if name not in ("rule", "part_rules", "rounding")},
            "entry": [Setter.OLD_FILE.name, plain["rule"]],
            "part_entries": [[Setter.OLD_FILE.name, rule] for rule in plain["part_rules"]],
            "rounded": [_OLD_NOTES[note].name for note in notes.split("; ")] if notes else [],
        }
    fields = {
        "qconfig": QConfig.from_dict(plain["qconfig"]),
        "entry": _read_entry(plain["entry"]),
        "shape": tuple(plain["shape"]),
        "part_entries": tuple(map(_read_entry, plain["part_entries"])),
        "rounded": tuple(Rounded[name] for name in plain["rounded"]),
    }
    return Site(**{**plain, **fields})


def plain_values(values: Values) -> dict[str, Any]:
    """Return the decisions about values as JSON values."""
    edges = [{**vars(edge), "spec": edge.spec.to_dict()} for edge in values.edges]
    return {
        "edges": edges,
        "calls": [{**vars(call), "form": call.form.name} for call in values.calls],
        "floats": [{**vars(value), "why": _plain_reason(value.why)} for value in values.floats],
    }


def read_values(plain: dict[str, Any]) -> Values:
    """Return the decisions that JSON values describe; LookupError or TypeError for others."""
    edges = tuple(Edge(**{**edge, "spec": TensorSpec.from_dict(edge["spec"])}) for edge in plain["edges"])
    calls = tuple(
        IntegerCall(
            **{
                **call,
                "form": Form[call["form"]],
                "inputs": tuple(call["inputs"]),
                "absorbed": tuple(call["absorbed"]),
            }
        )
        for call in plain["calls"]
    )
    floats = (FloatValue(**{**value, "why": _read_reason(StaysFloat, value["why"])}) for value in plain["floats"])
    return Values(edges, calls, tuple(floats))


def plain_skipped(skipped: Skipped) -> dict[str, Any]:
    """Return a skipped candidate as JSON values."""
    return {**vars(skipped), "why": _plain_reason(skipped.why), "entry": _plain_entry(skipped.entry)}


def read_skipped(plain: dict[str, Any]) -> Skipped:
    """Return the skipped candidate that JSON values describe; LookupError or TypeError for others."""
    if "rule" in plain:
        rest = {name: value for name, value in plain.items() if name not in ("rule", "reason")}
        plain = {**rest, "why": [Why.TOLD.name, plain["reason"]], "entry": [Setter.OLD_FILE.name, plain["rule"]]}
    return Skipped(**{**plain, "why": _read_reason(Why, plain["why"]), "entry": _read_entry(plain["entry"])})


def plain_unfused(unfused: Unfused) -> dict[str, Any]:
    """Return a chain that was not fused as JSON values."""
    return {"chain": list(unfused.chain), "why": _plain_reason(unfused.why)}


def read_unfused(plain: dict[str, Any]) -> Unfused:
    """Return the chain that JSON values describe; LookupError or TypeError for others."""
    why = plain["why"] if "why" in plain else [NotFused.USED_BESIDE.name, plain["used"]]
    return Unfused(chain=tuple(plain["chain"]), why=_read_reason(NotFused, why))


def _plain_reason(reason: Reason) -> list[str]:
    return [reason.why.name, *reason.details]


def _read_reason(codes: type[Why] | type[NotFused] | type[StaysFloat], plain: list[str]) -> Reason:
    return Reason(codes[plain[0]], tuple(plain[1:]))


def _plain_entry(entry: Entry) -> list[str | int]:
    return [entry.setter.name, *entry.key]


def _read_entry(plain: list[Any]) -> Entry:
    return Entry(Setter[plain[0]], tuple(plain[1:]))
