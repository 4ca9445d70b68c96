"""suggest_mapping for static models: which sites to leave finer than int8, for a budget.

Integers go from one static site to the next, so mixtures are measured as whole models, calibrated on the data:

1. All sites as the mapping has them. If that is within the budget, it is the answer: nothing static is cheaper.
2. Each site is measured alone, with everything else in float, which gives an order: the most harm first.
3. Bisection finds how many of them must become as fine as they can, float mostly, for the budget.
4. Each of those, the least harm first, is tried under its cheaper schemes, the cheapest first.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from fxquant.debug.measure.metric import need_number
from fxquant.debug.measure.replay import Variant
from fxquant.debug.measure.trial import Trial
from fxquant.debug.report.table import site_name
from fxquant.errors import QConfigError
from fxquant.graph import edit
from fxquant.graph.call import run
from fxquant.graph.record import Record, record_of
from fxquant.progress import Progress
from fxquant.qconfig import BEST, QConfig
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.tuning.ladder import check_schemes
from fxquant.tuning.mapping import by_name
from fxquant.tuning.suggestion import SuggestionSite, SuggestionStep

LADDER = ("int8", "dynamic int8", "int16", "float")
"""What a static site may become, cheapest first; "int8" is what the mapping gives it."""

_TRIES = 16
"""How many changes of single sites are tried at the end."""

_CALLS = 5
"""Of how many calls a model's time is the median."""

Schemes = tuple[str, ...]
"""A scheme for each site, in the sites' order."""


class Point(NamedTuple):
    """One measured model. ms: of a call with the first batch, NaN if bytes are minimized."""

    schemes: Schemes
    mapping: QConfigMapping
    model: nn.Module
    metric: float
    harm: float
    bytes: int
    ms: float


class StaticSearch:
    """A search over a trial's sites. points: the models measured so far; alone: each site's harm alone."""

    def __init__(
        self, trial: Trial, model: nn.Module, schemes: Sequence[str] | None, budget: float, sign: float, minimize: str
    ) -> None:
        self.trial, self.model, self.budget, self.sign = trial, model, budget, sign
        self.is_fast = minimize == "ms"
        record = record_of(trial.prepared)
        assert record is not None
        self.record: Record = record
        self.start = trial.measure_all({"float": Variant({}, {})})["float"]
        need_number(self.start)
        self.options = self._options(check_schemes(schemes, LADDER, " of a static model"))
        self.points: list[Point] = []
        self.alone: dict[int, float] = {}

    def _options(self, names: Sequence[str]) -> list[dict[str, QConfig | None]]:
        """Return each site's qconfigs by the schemes that it may have, cheapest first."""
        sites = self.record.sites
        present: dict[int, QConfig] = {i: site.qconfig for i, site in enumerate(sites)}
        dynamic = {i: site.qconfig.as_dynamic for i, site in enumerate(sites) if site.is_static}
        tried = {"dynamic int8": dynamic, "int16": dict.fromkeys(present, BEST["int16"])}
        taken = {name: self._taken(wanted) for name, wanted in tried.items() if name in names}
        found = []
        for i in present:
            each: dict[str, QConfig | None] = {"int8": present[i]} if "int8" in names or not sites[i].is_static else {}
            each.update({name: given[i] for name, given in taken.items() if i in given})
            each.update({"float": None} if "float" in names else {})
            if not each:
                raise QConfigError(f"schemes {tuple(names)} has none that {site_name(sites[i])} takes; add 'float'")
            found.append(each)
        return found

    def _taken(self, wanted: Mapping[int, QConfig]) -> dict[int, QConfig]:
        """Return which sites take these qconfigs, which are tried as those of all sites."""
        taken = {}
        for qconfig in dict.fromkeys(wanted.values()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what takes none of it
                record = record_of(self.trial.prepare(self.model, QConfigMapping().set_global(qconfig)))
            got = {(site.path, site.call): site.qconfig for site in record.sites} if record is not None else {}
            sites = {i: self.record.sites[i] for i in wanted if wanted[i] == qconfig}
            taken.update({i: qconfig for i, site in sites.items() if got.get((site.path, site.call)) == qconfig})
        return taken

    def is_within(self, point: Point) -> bool:
        """Return whether a model's metric is within the budget."""
        return point.harm <= self.budget

    def run(self, progress: Progress) -> Point:
        """Return the best model within the budget, or the nearest to it."""
        point = self.measure(tuple(next(iter(options)) for options in self.options))
        if not self.is_within(point):
            order = self._order(progress)
            point = self._descend(self._bisect(order), order)
        return point if self.is_within(point) else min(self.points, key=lambda each: (each.harm, self.cost(each)))

    def cost(self, point: Point) -> float:
        """Return what is minimized."""
        return point.ms if self.is_fast else point.bytes

    def _order(self, progress: Progress) -> list[int]:
        """Measure each site alone, and return those that can be finer, the most harm first."""
        forms = self.trial.forms
        values = self.trial.measure_all(
            {str(i): Variant({i: form}, {}) for i, form in forms.items()}, progress=progress
        )
        self.alone = {int(i): self.sign * (value - self.start) for i, value in values.items()}
        may = [i for i, options in enumerate(self.options) if len(options) > 1]
        return sorted(may, key=lambda i: (-self.alone[i], i))

    def _finest(self, numbers: Sequence[int]) -> Schemes:
        return tuple(list(each)[-1 if i in numbers else 0] for i, each in enumerate(self.options))

    def _bisect(self, order: Sequence[int]) -> Point:
        """Return the model with the fewest sites at their finest that is within the budget, if more do no harm."""
        low, high = 0, len(order)
        best = self.measure(self._finest(order))
        while high - low > 1 and self.is_within(best):
            middle = (low + high) // 2
            point = self.measure(self._finest(order[:middle]))
            low, high, best = (low, middle, point) if self.is_within(point) else (middle, high, best)
        return best

    def _descend(self, point: Point, order: Sequence[int]) -> Point:
        """Make single sites cheaper while the budget allows it, those that do the least harm first."""
        moves = self._moves(order, point.schemes)
        for i, scheme in [move for move, _ in zip(moves, range(_TRIES), strict=False)] if self.is_within(point) else ():
            order_of = list(self.options[i])
            if order_of.index(scheme) < order_of.index(point.schemes[i]):
                tried = self.measure((*point.schemes[:i], scheme, *point.schemes[i + 1 :]))
                point = tried if self.is_within(tried) and self.cost(tried) <= self.cost(point) else point
        return point

    def _moves(self, order: Sequence[int], schemes: Schemes) -> Iterator[tuple[int, str]]:
        finer = [i for i in reversed(order) if schemes[i] != next(iter(self.options[i]))]
        for i in finer:
            yield from ((i, scheme) for scheme in list(self.options[i])[:-1])

    def measure(self, schemes: Schemes) -> Point:
        """Return a model as measured."""
        known = next((point for point in self.points if point.schemes == schemes), None)
        if known is not None:
            return known
        given = [options[scheme] for options, scheme in zip(self.options, schemes, strict=True)]
        wanted = {i: qconfig for i, qconfig in enumerate(given) if qconfig is not None}
        mapping = by_name(self.trial.prepared, self.record, wanted)
        model = self.trial.calibrate(self.model, mapping) if wanted else self.model
        value = self.trial.metric_of(model)
        harm = self.sign * (value - self.start)
        ms = _milliseconds(model, self.trial) if self.is_fast else float("nan")
        harm = harm if harm == harm else float("inf")
        point = Point(schemes, mapping, model, value, harm, edit.byte_count(model), ms)
        self.points.append(point)
        return point

    def rows(self, chosen: Point) -> tuple[SuggestionStep, ...]:
        """Return the curve."""
        return tuple(
            SuggestionStep(
                what=self._describe(point.schemes),
                metric=point.metric,
                bytes=point.bytes,
                ms=point.ms,
                is_within=self.is_within(point),
                is_chosen=point is chosen,
            )
            for point in sorted(self.points, key=lambda point: (self.cost(point), point.harm))
        )

    def _describe(self, schemes: Schemes) -> str:
        finer = [(i, scheme) for i, scheme in enumerate(schemes) if scheme != next(iter(self.options[i]))]
        if not finer or len(set(schemes)) == 1:
            return f"all {schemes[0]}"
        if len(finer) <= 3:
            return "but " + ", ".join(f"{site_name(self.record.sites[i])} {scheme}" for i, scheme in finer)
        return ", ".join(f"{name} ×{schemes.count(name)}" for name in LADDER if name in schemes)

    def sites(self, point: Point) -> tuple[SuggestionSite, ...]:
        """Return what is finer than in the mapping that the search began with, and why."""
        return tuple(
            SuggestionSite(
                name=site_name(self.record.sites[i]),
                scheme=scheme,
                is_finer=True,
                why=f"alone it worsens the metric by {self.alone[i]:.3g} as int8" if i in self.alone else "",
            )
            for i, scheme in enumerate(point.schemes)
            if scheme != "int8"
        )


def _milliseconds(model: nn.Module, trial: Trial) -> float:
    """Return what a call with the first batch takes, the median of some."""
    times = []
    with torch.no_grad():
        for _ in range(_CALLS + 1):
            began = time.perf_counter()
            run(model, trial.batches[0], 0)
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[1:])
