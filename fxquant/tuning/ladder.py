"""The schemes that suggest_mapping may give a weight, smallest first, and their best mixtures."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from fxquant.errors import QConfigError, nearest
from fxquant.formats import FORMATS
from fxquant.graph.record import Site
from fxquant.operators import Operator
from fxquant.qconfig import BEST, QConfig


def _rungs() -> dict[str, tuple[QConfig | None, ...]]:
    """Return the schemes: a format that has a product and the tables' of as many bits; then its smallest groups."""
    rungs: dict[str, tuple[QConfig | None, ...]] = {}
    for known in sorted(FORMATS, key=lambda known: known.bits):
        if known.activation is None or known.name not in BEST:
            continue
        tables = (other.name for other in FORMATS if other.bits == known.bits and other.activation is None)
        rungs[known.name] = (BEST[known.name], *(BEST[name] for name in tables))
        if known.group_sizes:
            finest = min(known.group_sizes)
            rungs[f"{known.name} of {finest}"] = (BEST[known.name].with_group_size(finest),)
    return {**rungs, "float": (None,)}


LADDER = _rungs()
"""Each scheme's qconfigs, of which an operator gets the first that it accepts; None stays float. Smallest first."""

_FRONT_POINTS = 400
"""How many mixtures are kept after each unit: enough that neighbours differ by a quarter of a percent."""


def scheme_name(qconfig: QConfig | None) -> str:
    """Return the name of a qconfig's scheme: "int8", "float"."""
    if qconfig is None:
        return "float"
    name, size = qconfig.weight.dtype, qconfig.weight.group_size
    if name not in LADDER:  # of tables alone
        name = next(rung for rung, qconfigs in LADDER.items() if BEST[name] in qconfigs)
    return finer if (finer := f"{name} of {size}") in LADDER else name


def check_schemes(schemes: Sequence[str] | None, known: Iterable[str] = (), of: str = "") -> tuple[str, ...]:
    """Return the names of the schemes to try, smallest first; raise QConfigError for an unknown one, or none at all.

    known: those that there are, LADDER's by default; of: " of a static model", say.
    """
    names = tuple(known) or tuple(LADDER)
    chosen = names if schemes is None else tuple(schemes)
    for name in chosen:
        if isinstance(schemes, str) or name not in names:
            wrong = schemes if isinstance(schemes, str) else name
            raise QConfigError(
                f"schemes{of} is a tuple of some of {', '.join(map(repr, names))}, got {wrong!r}"
                f"{'' if isinstance(schemes, str) else nearest(str(name), names)}"
            )
    if not chosen:
        raise QConfigError("schemes is empty: name what a site may become, ('int8', 'float')")
    return tuple(name for name in names if name in chosen)


def ladder_of(site: Site, operator: Operator, schemes: Sequence[str], weight: str = "") -> Ladder:
    """Return the qconfig of a site, or of a weight of it, under each scheme that its operator accepts.

    Under its present scheme it keeps its qconfig. What the mapping leaves in float stays there.
    """
    present, ladder = site.qconfig.of(weight), Ladder()
    if present is None:
        return {"float": None}
    for name in schemes:
        is_present = name == scheme_name(present)
        for qconfig in (*((present,) if is_present else ()), *LADDER[name]):
            if qconfig is None or operator.accepts(qconfig):
                ladder[name] = qconfig and _fitted(site, qconfig, weight, is_present)
                break
    return ladder


def _fitted(site: Site, qconfig: QConfig, weight: str, is_present: bool) -> QConfig:
    """Return a scheme's qconfig adapted to the other weights of the site, which share its activation."""
    if not weight:
        return replace(qconfig, parts=tuple(part for part in site.qconfig.parts if is_present or part[1] is None))
    qconfigs = (site.qconfig, *(part for _, part in site.qconfig.parts if part is not None))
    activations = [each.activation for each in qconfigs if each.activation is not None]
    wanted = qconfig.activation
    if wanted is None or not activations:
        return qconfig
    same = next((each for each in activations if each.dtype == wanted.dtype), None)
    return replace(qconfig, activation=same or replace(wanted, axis=activations[0].axis))


class Place(NamedTuple):
    """What may have a scheme of its own: a site, by its number, or one of its weights, by name ("": the whole site)."""

    site: int
    weight: str = ""


Unit = tuple[Place, ...]
"""What gets one scheme: a place, or all places of a tied weight."""

Ladder = dict[str, QConfig | None]
"""The schemes that a place may have, smallest first, and its qconfig under each."""


def places_of(number: int, operator: Operator, module: nn.Module | None) -> list[Place]:
    """Return a site's places: its weights, if each may have its own scheme, or the site. module: None for a call."""
    names = operator.parts(module) if module is not None else ()
    return [Place(number, name) for name in names] if len(names) > 1 else [Place(number)]


def tie(ladders: Mapping[Place, Ladder], weights: Mapping[Place, Hashable]) -> dict[Unit, tuple[str, ...]]:
    """Return the units and their schemes. Places of a tied weight are one unit, with the schemes that all of them take.

    Two schemes for one weight would store it twice; the finer of them for both is smaller, and does less harm. weights:
    identifies each place's weights. Places of a tied weight without a common scheme stay units of their own.
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
    """One scheme for one unit: its cost (bytes or ms), and the harm that it does alone."""

    scheme: str
    cost: float
    harm: float


class Mixture(NamedTuple):
    """A choice of one option, by number, for each unit. cost, harm: the sums over the options."""

    cost: float
    harm: float
    choice: tuple[int, ...]


def best_mixtures(units: Sequence[Sequence[Option]]) -> list[Mixture]:
    """Return the mixtures that no other beats in both cost and harm, cheapest first: a multiple-choice knapsack.

    By dynamic programming over the units; of too many mixtures, an evenly spaced part is kept.
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
