"""The search behind suggest_mapping: what each scheme does alone, which mixtures that promises, what those really do.

1. Each unit (a site, or a weight of one, or all places of one weight) is measured alone under its schemes, from the
   cheapest up to the first whose harm is a small part of the budget.
2. A knapsack over these gives the mixtures that no other beats in cost and promised harm (see `ladder`).
3. Along those, the cheapest whose real metric is within the budget is found by bisection.
4. From there, single units are made cheaper, the greatest saving first, as long as the budget allows.

Harms of the outputs' relative RMS error add up as squares, as independent errors do; those of other metrics plainly.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from fxquant.debug.measure.profile import profile
from fxquant.debug.measure.trial import Forms, Progress, Trial, Variant, need_information, need_number
from fxquant.debug.report.table import site_name
from fxquant.errors import QConfigError
from fxquant.operators import find_row
from fxquant.qconfig import QConfig
from fxquant.tuning.ladder import Mixture, Option, Place, Unit, best_mixtures, ladder_of, places_of, tie

Schemes = tuple[str, ...]
"""A scheme for each unit, in the units' order."""

_NEGLIGIBLE = 0.25
"""The part of its even share of the budget below which a unit's harm is not worth a finer scheme's evaluation."""

_TRIES = 24
"""How many single changes are tried at the end."""


class Point(NamedTuple):
    """One mixture as measured. ms: added up from the sites' own, NaN where bytes are minimized."""

    schemes: Schemes
    metric: float
    harm: float
    bytes: int
    ms: float


class Search:
    """One search over a trial's units. points: what was measured, in that order; alone: each unit's metric a scheme."""

    def __init__(
        self,
        trial: Trial,
        model: nn.Module,
        schemes: Sequence[str],
        budget: float,
        sign: float,
        minimize: str,
        error_feedback: bool,
    ) -> None:
        self.trial, self.budget, self.sign = trial, budget, sign
        self.power = 2.0 if trial.is_default else 1.0
        self.start = trial.measure_all({"float": Variant({}, {})})["float"]
        need_number(self.start)
        self.is_fast = minimize == "ms"
        self.sites = trial.record.sites
        rows = [find_row(trial.record.operators, site.operator) for site in self.sites]
        assert None not in rows
        self.ladders = {
            place: ladder_of(site, row, schemes, place.weight)
            for i, (site, row) in enumerate(zip(self.sites, rows, strict=True))
            if row
            for place in (places_of(i, row, trial.float_site(i)) if not self.is_fast else [Place(i)])
        }
        empty = next((place for place, ladder in self.ladders.items() if not ladder), None)
        if empty is not None:
            told = f"{self.name((empty,))} ({self.sites[empty.site].kind})"
            raise QConfigError(f"schemes {tuple(schemes)} has none that {told} takes; add 'float'")
        held = {p: frozenset(weight.data_ptr() for weight in trial.weights(*p)) for p in self.ladders}
        self.schemes = tie(self.ladders, {p: p if self.is_fast else held[p] or p for p in self.ladders})
        self.units = list(self.schemes)
        self.points: list[Point] = []
        self.alone: dict[tuple[Unit, str], float] = {}
        self._forms: dict[tuple[int, QConfig], nn.Module] = {}
        if error_feedback:
            trial.watch(
                [(place.site, q) for place, ladder in self.ladders.items() for q in ladder.values() if q is not None]
            )
        self._ms = self._measure_ms(model) if self.is_fast else {}
        self._make_forms()

    def name(self, unit: Unit) -> str:
        """Return what a unit is called: "encoder+decoder" where these share a weight."""
        return "+".join(f"{site_name(self.sites[i])}.{weight}".removesuffix(".") for i, weight in unit)

    def is_within(self, value: float) -> bool:
        """Return whether a metric is within the budget."""
        return self.harm(value) <= self.budget

    def harm(self, value: float) -> float:
        """Return how much worse than float's a metric is; infinite for a NaN."""
        return math.inf if math.isnan(value) else self.sign * (value - self.start)

    def qconfigs(self, chosen: Mapping[Unit, str]) -> dict[int, QConfig]:
        """Return what each site gets; units that are not named stay float, and sites that do are missing."""
        names = {place: name for unit, name in chosen.items() for place in unit}
        own: dict[int, dict[str, QConfig | None]] = collections.defaultdict(dict)
        for place, ladder in self.ladders.items():
            own[place.site][place.weight] = ladder.get(names.get(place, "float"))
        wanted = {i: mixed(weights) for i, weights in own.items()}
        return {i: qconfig for i, qconfig in wanted.items() if qconfig is not None}

    def run(self, progress: Progress) -> list[Point]:
        """Search; return the points within the budget, best first, or if there are none the one that is nearest."""
        for share in (_NEGLIGIBLE, 0.0):  # where units together do more harm than they promised, all schemes count
            options = self._options(share, progress)
            found = self._bisect(best_mixtures(options), options)
            if found is not None:
                self._descend(found, options)
                break
        self._measure_reference()
        if not self.trial.is_default:  # a NaN is told with the result, which is outside of any budget
            schemes = {name for names in self.schemes.values() for name in names}
            tried = [*self.alone.values(), *(point.metric for point in self.points)]
            need_information(self.start, [value for value in tried if not math.isnan(value)], schemes)
        within = [point for point in self.points if point.harm <= self.budget]
        nearest = min(self.points, key=lambda point: (point.harm, self.cost(point)))
        return sorted(within, key=lambda point: (self.cost(point), point.harm, point.schemes)) or [nearest]

    def cost(self, point: Point) -> float:
        """Return what is minimized."""
        return point.ms if self.is_fast else point.bytes

    def _options(self, share: float, progress: Progress) -> list[list[Option]]:
        """Return each unit's options, cheapest first, each doing less harm than those before.

        share: the part of its even share of the budget that is little enough harm for a unit to look no further.
        """
        enough = share / len(self.units) * max(self.budget, 0.0) ** self.power
        ladders = [self._by_cost(unit) for unit in self.units]
        options: list[list[Option]] = [[] for _ in self.units]
        for rung in range(max(map(len, ladders))):
            wanted = {
                (unit, ladder[rung][1]): (ladder[rung][0], own)
                for unit, ladder, own in zip(self.units, ladders, options, strict=True)
                if rung < len(ladder) and (not own or own[-1].harm > enough)
            }
            self._measure_alone([key for key in wanted if key not in self.alone], progress)
            for key, (cost, own) in wanted.items():
                harm = max(self.harm(self.alone[key]), 0.0) ** self.power
                if not own or harm < own[-1].harm:
                    own.append(Option(key[1], cost, harm))
        return options

    def _measure_alone(self, keys: list[tuple[Unit, str]], progress: Progress) -> None:
        """Measure single units under single schemes, all else float."""
        base: Forms = {}
        variants = {f"{self.name(unit)} {scheme}": self._forms_of({unit: scheme}) for unit, scheme in keys}
        if variants:
            values = self.trial.measure_all({k: Variant(v, base) for k, v in variants.items()}, progress=progress)
            self.alone.update(zip(keys, values.values(), strict=True))

    def _by_cost(self, unit: Unit) -> list[tuple[float, str]]:
        """Return what a unit adds to the float model under each scheme, the cheapest first."""
        if self.is_fast:
            costs = [(self._ms[unit[0].site, scheme], scheme) for scheme in self.schemes[unit]]
        else:
            floats = self.trial.bytes_with({})
            costs = [
                (float(self.trial.bytes_with(self._forms_of({unit: scheme})) - floats), scheme)
                for scheme in self.schemes[unit]
            ]
        return sorted(costs, key=lambda pair: pair[0])

    def _bisect(self, front: list[Mixture], options: list[list[Option]]) -> Point | None:
        """Return the cheapest of the mixtures within the budget, taking it that dearer ones do less harm."""
        mixtures = [tuple(own[i].scheme for own, i in zip(options, m.choice, strict=True)) for m in front]
        cheapest, finest = self.measure(mixtures[0]), None
        if self.is_within(cheapest.metric):
            return cheapest
        low, high = 0, len(mixtures)
        while high - low > 1:
            middle = (low + high) // 2
            point = self.measure(mixtures[middle])
            low, high, finest = (low, middle, point) if self.is_within(point.metric) else (middle, high, finest)
        return finest

    def _descend(self, point: Point, options: list[list[Option]]) -> None:
        """Make single units cheaper for as long as the budget allows: what promises the greatest saving first."""
        seen = {found.schemes for found in self.points}
        for _ in range(_TRIES):
            moves = []
            for k, own in enumerate(options):
                now = next(option for option in own if option.scheme == point.schemes[k])
                for option in own:
                    schemes = (*point.schemes[:k], option.scheme, *point.schemes[k + 1 :])
                    harm = max(point.harm, 0.0) ** self.power + option.harm - now.harm
                    if option.cost < now.cost and schemes not in seen and self._is_hopeful(harm):
                        moves.append((option.cost - now.cost, option.harm - now.harm, schemes))
            if not moves:
                return
            tried = self.measure(min(moves)[2])
            seen.add(tried.schemes)
            point = tried if self.is_within(tried.metric) and self.cost(tried) < self.cost(point) else point

    def _is_hopeful(self, harm: float) -> bool:
        """Return whether a promised harm is near enough to the budget to try: errors may cancel, to about a half."""
        share: float = max(self.budget, 0.0) ** self.power
        return harm <= 2 * share

    def _measure_reference(self) -> None:
        """Measure what int8 alone comes to, where it may be used: one would want to know."""
        ladders = self.schemes.values()
        plain = tuple("int8" if len(ladder) > 1 else ladder[0] for ladder in ladders)
        if all(scheme in ladder for scheme, ladder in zip(plain, ladders, strict=True)):
            self.measure(plain)

    def measure(self, schemes: Schemes) -> Point:
        """Return what a mixture really does."""
        known = next((point for point in self.points if point.schemes == schemes), None)
        if known is not None:
            return known
        forms = self._forms_of(dict(zip(self.units, schemes, strict=True)))
        value = self.trial.measure(forms)
        ms = math.nan
        if self.is_fast:
            ms = self._ms[-1, ""] + sum(self._ms[u[0].site, s] for u, s in zip(self.units, schemes, strict=True))
        point = Point(schemes, value, self.harm(value), self.trial.bytes_with(forms), ms)
        self.points.append(point)
        return point

    def _forms_of(self, chosen: Mapping[Unit, str]) -> dict[int, nn.Module]:
        """Return the modules of the sites that do not stay float; units that are not named stay so."""
        return {i: self._form(i, qconfig) for i, qconfig in self.qconfigs(chosen).items()}

    def _form(self, i: int, qconfig: QConfig) -> nn.Module:
        if (i, qconfig) not in self._forms:
            self._forms[i, qconfig] = self.trial.make_forms({i: qconfig})[i]
        return self._forms[i, qconfig]

    def _make_forms(self) -> None:
        """Make all sites' forms under each scheme at once: one conversion each would take far longer."""
        for scheme in dict.fromkeys(name for names in self.schemes.values() for name in names if name != "float"):
            chosen = self._chosen(scheme)
            for i, form in self.trial.make_forms(chosen).items():
                self._forms[i, chosen[i]] = form

    def _measure_ms(self, model: nn.Module) -> dict[tuple[int, str], float]:
        """Return each site's milliseconds on the first batch under each scheme; under (-1, "") those elsewhere."""
        trial = self.trial
        whole = {(r.path, r.call): r for r in profile(trial.quantized, trial.first_batch, float_model=model).rows}
        places = [(site.path, site.call or "") for site in self.sites]
        found = {(i, "float"): whole[place].float_ms for i, place in enumerate(places)}
        found[-1, ""] = whole["elsewhere", ""].ms
        for scheme in dict.fromkeys(name for names in self.schemes.values() for name in names if name != "float"):
            chosen = self._chosen(scheme)
            rows = {(r.path, r.call): r.ms for r in profile(trial.convert_sites(chosen), trial.first_batch).rows}
            found.update({(i, scheme): rows[places[i]] for i in chosen})
        return found

    def _chosen(self, scheme: str) -> dict[int, QConfig]:
        """Return the sites that take a scheme, and their qconfigs."""
        return self.qconfigs({unit: scheme for unit, names in self.schemes.items() if scheme in names})


def mixed(weights: Mapping[str, QConfig | None]) -> QConfig | None:
    """Return the qconfig of a site whose weights get these, None where all stay float.

    What most of them have is the site's, the others' are its parts.
    """
    counts = collections.Counter(qconfig for qconfig in weights.values() if qconfig is not None)
    if not counts:
        return None
    common = counts.most_common(1)[0][0]
    parts = tuple((weight, qconfig) for weight, qconfig in weights.items() if qconfig != common)
    return replace(common, parts=parts) if parts else common
