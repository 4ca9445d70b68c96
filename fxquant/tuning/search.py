"""The search behind suggest_mapping.

1. Each unit (a site, a weight of one, or all places of a tied weight) is measured alone under its schemes, from the
   cheapest up to the first whose harm is a small part of the budget.
2. A knapsack over these gives the mixtures that no other beats in both cost and predicted harm (see `ladder`).
3. Bisection finds the cheapest of them whose measured metric is within the budget.
4. From there, single units are made cheaper, the largest saving first, while the budget allows it.

Harms add up as squares for the outputs' relative RMS error, as independent errors do; for other metrics as they are.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from fxquant.debug.measure.metric import need_information, need_number
from fxquant.debug.measure.profile import profile
from fxquant.debug.measure.replay import Variant
from fxquant.debug.measure.sites import Forms
from fxquant.debug.measure.trial import Trial
from fxquant.debug.report.table import site_name
from fxquant.errors import QConfigError
from fxquant.operators import find_operator
from fxquant.progress import Progress
from fxquant.qconfig import QConfig
from fxquant.tuning.ladder import Ladder, Mixture, Option, Place, Unit, best_mixtures, ladder_of, places_of, tie

Schemes = tuple[str, ...]
"""A scheme for each unit, in the units' order."""

_NEGLIGIBLE = 0.25
"""A unit whose harm is below this part of its equal share of the budget is not tried under finer schemes."""

_TRIES = 24
"""How many changes of single units are tried at the end."""


class Point(NamedTuple):
    """One measured mixture. ms: the sum of the sites' own, NaN if bytes are minimized."""

    schemes: Schemes
    metric: float
    harm: float
    bytes: int
    ms: float


class Search:
    """A search over a trial's units. points: the mixtures measured so far; alone: the metric of single units."""

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
        self.ladders = {place: ladder for i in range(len(self.sites)) for place, ladder in self._ladders(i, schemes)}
        held = {p: frozenset(weight.data_ptr() for weight in trial.weights(*p)) for p in self.ladders}
        self.schemes = tie(self.ladders, {p: p if self.is_fast else held[p] or p for p in self.ladders})
        self.units = list(self.schemes)
        self._quantizing = {name: None for names in self.schemes.values() for name in names if name != "float"}
        self.points: list[Point] = []
        self.alone: dict[tuple[Unit, str], float] = {}
        self._forms: dict[tuple[int, QConfig], nn.Module] = {}
        if error_feedback:
            trial.watch(
                [(place.site, q) for place, ladder in self.ladders.items() for q in ladder.values() if q is not None]
            )
        self._ms = self._measure_ms(model) if self.is_fast else {}
        self._make_forms()

    def _ladders(self, i: int, schemes: Sequence[str]) -> Iterator[tuple[Place, Ladder]]:
        """Yield a site's places and their ladders, or raise QConfigError for one that takes none of the schemes."""
        site = self.sites[i]
        operator = find_operator(self.trial.record.operators, site.operator)
        assert operator is not None, site.operator
        for place in [Place(i)] if self.is_fast else places_of(i, operator, self.trial.float_site(i)):
            ladder = ladder_of(site, operator, schemes, place.weight)
            if not ladder:
                name = f"{self.name((place,))} ({site.kind})"
                raise QConfigError(f"schemes {tuple(schemes)} has none that {name} takes; add 'float'")
            yield place, ladder

    def name(self, unit: Unit) -> str:
        """Return the name of a unit: "encoder+decoder" if these share a weight."""
        return "+".join(f"{site_name(self.sites[i])}.{weight}".removesuffix(".") for i, weight in unit)

    def is_within(self, value: float) -> bool:
        """Return whether a metric is within the budget."""
        return self.harm(value) <= self.budget

    def harm(self, value: float) -> float:
        """Return how much worse than float a metric is; infinite for a NaN."""
        return math.inf if math.isnan(value) else self.sign * (value - self.start)

    def qconfigs(self, chosen: Mapping[Unit, str]) -> dict[int, QConfig]:
        """Return the sites' qconfigs, without those that stay float, as the units do that are not named."""
        names = {place: name for unit, name in chosen.items() for place in unit}
        weights: dict[int, dict[str, QConfig | None]] = collections.defaultdict(dict)
        for place, ladder in self.ladders.items():
            weights[place.site][place.weight] = ladder.get(names.get(place, "float"))
        return {i: qconfig for i, parts in weights.items() if (qconfig := mixed(parts)) is not None}

    def run(self, progress: Progress) -> None:
        """Measure mixtures until the best are known."""
        for share in (_NEGLIGIBLE, 0.0):  # if units do more harm together than predicted, try all their schemes
            options = self._options(share, progress)
            point = self._bisect(best_mixtures(options), options)
            if point is not None:
                self._descend(point, options)
                break
        self._measure_reference()
        if not self.trial.is_default:  # the warning about the result, outside any budget, shows a NaN
            tried = [*self.alone.values(), *(point.metric for point in self.points)]
            schemes = {name for names in self.schemes.values() for name in names}
            need_information(self.start, [value for value in tried if not math.isnan(value)], schemes)

    def best(self) -> list[Point]:
        """Return the points within the budget, cheapest first, or if there are none the nearest."""
        within = [point for point in self.points if point.harm <= self.budget]
        nearest = min(self.points, key=lambda point: (point.harm, self.cost(point)))
        return sorted(within, key=lambda point: (self.cost(point), point.harm, point.schemes)) or [nearest]

    def cost(self, point: Point) -> float:
        """Return what is minimized."""
        return point.ms if self.is_fast else point.bytes

    def _options(self, share: float, progress: Progress) -> list[list[Option]]:
        """Return each unit's options, cheapest first, each with less harm than those before.

        share: a unit is tried no further once its harm is at most this part of its equal share of the budget.
        """
        enough = share / len(self.units) * max(self.budget, 0.0) ** self.power
        ladders = [self._by_cost(unit) for unit in self.units]
        options: list[list[Option]] = [[] for _ in self.units]
        for rung in range(max(map(len, ladders))):
            wanted = {
                (unit, ladder[rung][1]): (ladder[rung][0], known)
                for unit, ladder, known in zip(self.units, ladders, options, strict=True)
                if rung < len(ladder) and (not known or known[-1].harm > enough)
            }
            self._measure_alone([key for key in wanted if key not in self.alone], progress)
            for key, (cost, known) in wanted.items():
                harm = max(self.harm(self.alone[key]), 0.0) ** self.power
                if not known or harm < known[-1].harm:
                    known.append(Option(key[1], cost, harm))
        return options

    def _measure_alone(self, keys: list[tuple[Unit, str]], progress: Progress) -> None:
        """Measure single units under single schemes, with everything else in float."""
        base: Forms = {}
        variants = {f"{self.name(unit)} {scheme}": self._forms_of({unit: scheme}) for unit, scheme in keys}
        if variants:
            values = self.trial.measure_all({k: Variant(v, base) for k, v in variants.items()}, progress=progress)
            self.alone.update(zip(keys, values.values(), strict=True))

    def _by_cost(self, unit: Unit) -> list[tuple[float, str]]:
        """Return what a unit adds to the float model under each scheme, cheapest first."""
        floats = 0 if self.is_fast else self.trial.bytes_with({})

        def cost(scheme: str) -> float:
            if self.is_fast:
                return self._ms[unit[0].site, scheme]
            return float(self.trial.bytes_with(self._forms_of({unit: scheme})) - floats)

        return sorted(((cost(scheme), scheme) for scheme in self.schemes[unit]), key=lambda pair: pair[0])

    def _bisect(self, front: list[Mixture], options: list[list[Option]]) -> Point | None:
        """Return the cheapest of the mixtures within the budget, assuming that dearer ones do less harm."""
        mixtures = [tuple(unit[i].scheme for unit, i in zip(options, m.choice, strict=True)) for m in front]
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
        """Make single units cheaper while the budget allows it, the largest predicted saving first."""
        seen = {known.schemes for known in self.points}
        for _ in range(_TRIES):
            moves = [move for move in self._moves(point, options) if move[2] not in seen]
            if not moves:
                return
            tried = self.measure(min(moves)[2])
            seen.add(tried.schemes)
            point = tried if self.is_within(tried.metric) and self.cost(tried) < self.cost(point) else point

    def _moves(self, point: Point, options: list[list[Option]]) -> Iterator[tuple[float, float, Schemes]]:
        """Yield cheaper mixtures, a unit apart, with their savings (negative) and added harms, that may be good enough.

        Their predicted harm may be twice the budget, as errors may cancel, to about a half.
        """
        most = 2 * max(self.budget, 0.0) ** self.power
        for k, unit in enumerate(options):
            now = next(option for option in unit if option.scheme == point.schemes[k])
            for option in unit:
                harm = max(point.harm, 0.0) ** self.power + option.harm - now.harm
                if option.cost < now.cost and harm <= most:
                    schemes = (*point.schemes[:k], option.scheme, *point.schemes[k + 1 :])
                    yield option.cost - now.cost, option.harm - now.harm, schemes

    def _measure_reference(self) -> None:
        """Measure the model in int8 alone, if that may be used, for comparison."""
        ladders = self.schemes.values()
        plain = tuple("int8" if len(ladder) > 1 else ladder[0] for ladder in ladders)
        if all(scheme in ladder for scheme, ladder in zip(plain, ladders, strict=True)):
            self.measure(plain)

    def measure(self, schemes: Schemes) -> Point:
        """Return a mixture as measured."""
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
        """Return the modules of the sites that do not stay float, as the units do that are not named."""
        return {i: self._form(i, qconfig) for i, qconfig in self.qconfigs(chosen).items()}

    def _form(self, i: int, qconfig: QConfig) -> nn.Module:
        if (i, qconfig) not in self._forms:
            self._forms[i, qconfig] = self.trial.make_forms({i: qconfig})[i]
        return self._forms[i, qconfig]

    def _make_forms(self) -> None:
        """Make all sites' forms under each scheme at once: a conversion for each site would take far longer."""
        for scheme in self._quantizing:
            chosen = self._chosen(scheme)
            for i, form in self.trial.make_forms(chosen).items():
                self._forms[i, chosen[i]] = form

    def _measure_ms(self, model: nn.Module) -> dict[tuple[int, str], float]:
        """Return each site's milliseconds on the first batch under each scheme; under (-1, "") those elsewhere."""
        trial, batch = self.trial, self.trial.data[0]
        whole = {(r.path, r.call): r for r in profile(trial.quantized, batch, float_model=model).rows}
        places = [(site.path, site.call or "") for site in self.sites]
        times = {(i, "float"): whole[place].float_ms for i, place in enumerate(places)}
        times[-1, ""] = whole["elsewhere", ""].ms
        for scheme in self._quantizing:
            chosen = self._chosen(scheme)
            lines = {(r.path, r.call): r.ms for r in profile(trial.convert_sites(chosen), batch).rows}
            times.update({(i, scheme): lines[places[i]] for i in chosen})
        return times

    def _chosen(self, scheme: str) -> dict[int, QConfig]:
        """Return the qconfigs of the sites that a scheme may be given to."""
        return self.qconfigs({unit: scheme for unit, names in self.schemes.items() if scheme in names})


def mixed(weights: Mapping[str, QConfig | None]) -> QConfig | None:
    """Return the qconfig of a site whose weights get these, None if all stay float.

    The most common one is the site's; the others become its parts.
    """
    counts = collections.Counter(qconfig for qconfig in weights.values() if qconfig is not None)
    if not counts:
        return None
    common = counts.most_common(1)[0][0]
    parts = tuple((weight, qconfig) for weight, qconfig in weights.items() if qconfig != common)
    return replace(common, parts=parts) if parts else common
