"""The schemes that suggest_mapping may give a weight, smallest first, and which of them mix best within a budget."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from fxquant.errors import QConfigError, nearest
from fxquant.graph.record import Site
from fxquant.operators import Operator
from fxquant.qconfig import (
    QConfig,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    int4_dynamic_qconfig,
    int16_dynamic_qconfig,
    uint4_weight_only_qconfig,
)

LADDER: dict[str, tuple[QConfig | None, ...]] = {
    "int4": (int4_dynamic_qconfig, uint4_weight_only_qconfig),
    "int4 of 32": (int4_dynamic_qconfig.with_group_size(32),),
    "int8": (default_dynamic_qconfig,),
    "int16": (int16_dynamic_qconfig,),
    "float16": (float16_dynamic_qconfig,),
    "float": (None,),
}
"""Each scheme's qconfigs, of which an operator gets the first that it accepts; None stays float."""

_SCHEMES = {"uint4": "int4", "uint8": "int8"}
_FRONT_POINTS = 400
"""How many mixtures are kept at each step: enough that neighbours differ by a quarter of a percent."""


def scheme_name(qconfig: QConfig | None) -> str:
    """Return the scheme that a qconfig is of: "int8", "float"."""
    if qconfig is None:
        return "float"
    name = _SCHEMES.get(qconfig.weight.dtype, qconfig.weight.dtype)
    return "int4 of 32" if qconfig.weight.group_size == 32 else name


def check_schemes(schemes: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the schemes to try, smallest first; raise QConfigError for one that there is not, or none."""
    chosen = tuple(LADDER) if schemes is None else tuple(schemes)
    for name in chosen:
        if isinstance(schemes, str) or name not in LADDER:
            wrong = schemes if isinstance(schemes, str) else name
            raise QConfigError(
                f"schemes is a tuple of some of {', '.join(map(repr, LADDER))}, got {wrong!r}"
                f"{'' if isinstance(schemes, str) else nearest(str(name), LADDER)}"
            )
    if not chosen:
        raise QConfigError("schemes is empty: name what a site may become, ('int8', 'float')")
    return tuple(name for name in LADDER if name in chosen)


def ladder_of(site: Site, row: Operator, schemes: Sequence[str], weight: str = "") -> Ladder:
    """Return what a site, or a weight of it, gets under each scheme that its operator accepts.

    Its own qconfig under that one's scheme. What the mapping leaves float stays so.
    """
    began, found = site.qconfig.of(weight), Ladder()
    if began is None:
        return {"float": None}
    for name in schemes:
        own = (began,) if name == scheme_name(began) else ()
        for qconfig in (*own, *LADDER[name]):
            if qconfig is None or row.accepts(qconfig):
                found[name] = qconfig and _fitted(site, qconfig, weight, is_own=name == scheme_name(began))
                break
    return found


def _fitted(site: Site, qconfig: QConfig, weight: str, is_own: bool) -> QConfig:
    """Return a scheme as a site, or a weight of it, can have it: beside what the site's weights have now."""
    if not weight:
        return replace(qconfig, parts=tuple(part for part in site.qconfig.parts if is_own or part[1] is None))
    owns = (site.qconfig, *(own for _, own in site.qconfig.parts if own is not None))
    ways = [own.activation for own in owns if own.activation is not None]
    given = qconfig.activation
    if given is None or not ways:
        return qconfig
    same = next((way for way in ways if way.dtype == given.dtype), replace(given, axis=ways[0].axis))
    return replace(qconfig, activation=same)


class Place(NamedTuple):
    """What can have a scheme of its own: a site, by its number, or one of its weights, by its name ("" for a site)."""

    site: int
    weight: str = ""


Unit = tuple[Place, ...]
"""What is decided by itself: a place, or all those that one weight stands in."""

Ladder = dict[str, QConfig | None]
"""The schemes that a place may have, smallest first, and what it gets under each."""


def places_of(number: int, row: Operator, module: nn.Module | None) -> list[Place]:
    """Return a site's places: its weights where each may have a scheme of its own. module: None for a call."""
    names = row.parts(module) if module is not None else ()
    return [Place(number, name) for name in names] if len(names) > 1 else [Place(number)]


def tie(ladders: Mapping[Place, Ladder], weights: Mapping[Place, Hashable]) -> dict[Unit, tuple[str, ...]]:
    """Return the units, and the schemes of each: places of one weight are one, under the schemes that all of them take.

    Two schemes for one weight would be two tables; the finer of them for both is one, and does less harm. weights: what
    tells a place's weights from others. Places of one weight that take no scheme in common stay units of their own.
    """
    groups: dict[Hashable, list[Place]] = {}
    for place in ladders:
        groups.setdefault(weights[place], []).append(place)
    units: dict[Unit, tuple[str, ...]] = {}
    for places in groups.values():
        common = tuple(name for name in ladders[places[0]] if all(name in ladders[place] for place in places))
        units.update({tuple(places): common} if common else {(place,): tuple(ladders[place]) for place in places})
    return units


class Option(NamedTuple):
    """One scheme for one unit: what it takes (bytes or ms), and what it does alone, as harms add up."""

    scheme: str
    cost: float
    harm: float


class Mixture(NamedTuple):
    """An option for each unit, by its number there. cost, harm: as the options' add up."""

    cost: float
    harm: float
    choice: tuple[int, ...]


def best_mixtures(units: Sequence[Sequence[Option]]) -> list[Mixture]:
    """Return the mixtures that no other beats in both cost and harm, cheapest first: a multiple-choice knapsack's.

    By dynamic programming over the units; where the mixtures become too many, every so-manieth is kept.
    """
    front = [Mixture(0.0, 0.0, ())]
    for options in units:
        grown = sorted(
            Mixture(mixture.cost + option.cost, mixture.harm + option.harm, (*mixture.choice, i))
            for mixture in front
            for i, option in enumerate(options)
        )
        front = grown[:1]
        for mixture in grown[1:]:
            if mixture.harm < front[-1].harm:
                front.append(mixture)
        if len(front) > _FRONT_POINTS:
            last = len(front) - 1
            front = [front[i * last // (_FRONT_POINTS - 1)] for i in range(_FRONT_POINTS)]
    return front
