"""suggest_mapping: the smallest, or fastest, model whose metric stays within a budget. How: see `search`."""

from __future__ import annotations

import collections
import math
import numbers
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from fxquant.debug.measure.trial import Metric, Progress, Trial
from fxquant.debug.report.page import write
from fxquant.debug.report.report import Column, Report
from fxquant.debug.report.table import megabytes
from fxquant.errors import ArgumentError, QConfigError, each_warning_once, warn
from fxquant.graph import edit
from fxquant.graph.record import record_of
from fxquant.graph.why import Rounded
from fxquant.qconfig_mapping import QConfigMapping, default_dynamic_qconfig_mapping
from fxquant.tuning.curve import Dot, draw_curve
from fxquant.tuning.ladder import LADDER, check_schemes, scheme_name
from fxquant.tuning.mapping import by_name, by_type
from fxquant.tuning.search import Point, Search

_SHOWN_SITES = 12
_AGAIN = "int4 rounded with GPTQ: convert_fx(prepare_fx(model, found.mapping, …), data=data) gives it again"


@dataclass(frozen=True, kw_only=True)
class SuggestionStep:
    """One model of the trade-off curve. what: its schemes; metric, bytes: measured.

    ms: its sites' own added up, NaN where bytes are minimized; is_chosen: whether it is the one that is suggested.
    """

    what: str
    metric: float
    bytes: int
    ms: float
    is_within: bool
    is_chosen: bool


@dataclass(frozen=True, kw_only=True)
class SuggestionSite:
    """One site, or a weight of one, that is kept finer or made coarser than the mapping that was begun with has it.

    name: its path; scheme: what it gets; is_finer: than there; why: the figures that speak for it.
    """

    name: str
    scheme: str
    is_finer: bool
    why: str


@dataclass(frozen=True, kw_only=True)
class Suggestion(Report):
    """What suggest_mapping found: print it, show it in a notebook, or take its mapping.

    rows: the trade-off curve, all models that were measured, smallest (or fastest) first. mapping, model: the result,
    and the quantized model that it gives (the float model itself where nothing is quantized); metric, bytes: of that
    model, measured. sites: those kept finer, and those made coarser, with the reasons.
    """

    rows: tuple[SuggestionStep, ...]
    mapping: QConfigMapping
    model: nn.Module
    metric: float
    bytes: int
    sites: tuple[SuggestionSite, ...]
    float_metric: float
    float_bytes: int
    budget: float
    is_within_budget: bool
    minimize: str
    higher_is_better: bool

    title: ClassVar[str] = "Suggestion: size or time against the metric"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("measured", "what", 56, lambda row: row.what, is_number=False),
        Column("metric", "metric", 10, lambda row: f"{row.metric:.5g}"),
        Column("size", "bytes", 10, lambda row: _size(row.bytes)),
        Column("ms", "ms", 9, lambda row: "" if math.isnan(row.ms) else f"{row.ms:.3f}"),
        Column("in budget", "is_within", 9, lambda row: "yes" if row.is_within else "no", is_number=False),
        Column("", "is_chosen", 11, lambda row: "← suggested" if row.is_chosen else "", is_number=False),
    )

    @property
    def kept(self) -> tuple[tuple[str, str], ...]:
        """The sites, and weights of sites, that are kept finer, and as what."""
        return tuple((site.name, site.scheme) for site in self.sites if site.is_finer)

    @property
    def coarser(self) -> tuple[tuple[str, str], ...]:
        """Those that are made coarser, and as what."""
        return tuple((site.name, site.scheme) for site in self.sites if not site.is_finer)

    @property
    def has_feedback(self) -> bool:
        """Whether any weights of the model were rounded with GPTQ: without data the mapping gives another."""
        record = record_of(self.model)
        return record is not None and any(Rounded.GPTQ in site.rounded for site in record.sites)

    @property
    def footer(self) -> tuple[str, ...]:
        """The lines under the table: what came out, and why."""
        verdict = "within" if self.is_within_budget else "OUTSIDE OF"
        sites = sorted(self.sites, key=lambda site: not site.is_finer)
        told = [f"{'finer' if s.is_finer else 'coarser'}: {s.name} {s.scheme}; {s.why}" for s in sites[:_SHOWN_SITES]]
        more = [f"… and {len(sites) - len(told)} more: .sites"] if len(sites) > len(told) else []
        return (
            f"metric {self.metric:.5g}, float {self.float_metric:.5g}: {verdict} the budget of {self.budget:g}",
            f"{megabytes(self.float_bytes)} → {megabytes(self.bytes)}, {self.float_bytes / max(self.bytes, 1):.2f}×",
            *([_AGAIN] if self.has_feedback else []),
            *told,
            *more,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all but the model as plain values; the mapping as it prints."""
        plain = replace(self, model=nn.Identity(), mapping=QConfigMapping())
        told = super(Suggestion, plain).to_dict()
        return {**told, "mapping": str(self.mapping), "model": None}

    def figure(self) -> str:
        """Return the curve as an SVG: the metric against megabytes or milliseconds, the suggested model ringed."""
        sign = -1.0 if self.higher_is_better else 1.0
        is_fast = self.minimize == "ms"
        at = [(row.ms if is_fast else row.bytes / 1e6, sign * row.metric) for row in self.rows]
        dots = [
            Dot(
                x=at[i][0],
                y=row.metric,
                label=f"{row.what}: {row.metric:.5g}, {megabytes(row.bytes)}",
                is_within=row.is_within,
                is_best=all(x > at[i][0] or y > at[i][1] or (x, y) == at[i] for x, y in at),
                is_chosen=row.is_chosen,
            )
            for i, row in enumerate(self.rows)
        ]
        limit = self.float_metric + sign * self.budget
        y_label = f"metric, {'higher' if self.higher_is_better else 'lower'} is better"
        return draw_curve(dots, limit, "milliseconds a call" if is_fast else "size of the model, MB", y_label)

    def plot(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the curve as an SVG, which any browser shows; write it where a path is given."""
        return write(path, self.figure())


def _check_aims(budget: Any, minimize: str) -> None:
    """Raise QConfigError for another `minimize`, ArgumentError for a budget that is no number."""
    if minimize not in ("bytes", "ms"):
        raise QConfigError(f"minimize is 'bytes' or 'ms', got {minimize!r}")
    if not isinstance(budget, numbers.Real) or math.isnan(budget):
        raise ArgumentError(f"budget is how much worse than float's the metric may be, a number, got {budget!r}")


@each_warning_once()
def suggest_mapping(
    model: nn.Module,
    data: Iterable[Any],
    metric: Metric | None = None,
    *,
    budget: float,
    minimize: str = "bytes",
    schemes: Sequence[str] | None = None,
    qconfig_mapping: QConfigMapping | None = None,
    higher_is_better: bool = False,
    error_feedback: bool = True,
    progress: Progress = iter,
) -> Suggestion:
    """Return a mapping whose model is as small ("bytes") or as fast ("ms") as the budget allows.

    budget: how much worse than the float model's the metric may be, in the metric's own unit (for the default metric,
    the relative RMS error of the outputs itself). data, metric, higher_is_better, progress: as for `sensitivity`; data
    should be what the model meets. schemes: what a site, or a weight of one, may become, some of "int4" (embeddings:
    4-bit rows), "int4 of 32", "int8", "int16", "float16" and "float"; all when None, each where its operator has it.
    qconfig_mapping: what "int8" means for each, and what stays float; default_dynamic_qconfig for all when None.
    error_feedback: whether int4 weights are those of `convert_fx(prepared, data=data)`: a pass over data, and seconds
    for a large weight.

    Each site (for bytes, those of one tied weight together) is tried alone under its schemes, from the smallest up to
    the first that does little harm; then some 10 to 40 whole models are measured by passes over all data: `search`.

    The same arguments give the same mapping; of "ms" only what was timed varies, and equal timings give equal results.
    What is stated is measured on the model that the mapping really gives. A result outside the budget is warned of.
    Raises QConfigError for another `minimize` or scheme, and what `sensitivity` does.
    """
    _check_aims(budget, minimize)
    names = check_schemes(schemes)
    mapping = default_dynamic_qconfig_mapping() if qconfig_mapping is None else qconfig_mapping
    trial = Trial(model, mapping, data, metric)
    search = Search(trial, model, names, budget, -1.0 if higher_is_better else 1.0, minimize, error_feedback)
    for point in search.run(progress):
        final, quantized = _realize(trial, model, search, point, is_ours=qconfig_mapping is None)
        value = trial.metric_of(quantized)
        if search.is_within(value):
            break
    found = Suggestion(
        rows=_rows(search, point),
        mapping=final,
        model=quantized,
        metric=value,
        bytes=edit.byte_count(quantized),
        sites=_sites(search, point),
        float_metric=search.start,
        float_bytes=trial.record.float_bytes,
        budget=budget,
        is_within_budget=search.is_within(value),
        minimize=minimize,
        higher_is_better=higher_is_better,
    )
    if not found.is_within_budget:
        warn(
            f"suggest_mapping: the metric of the result, {value:.5g}, is outside of the budget of {budget:g}; it is "
            f"the nearest of {len(search.points)} models, float has {search.start:.5g}"
        )
    return found


def _realize(
    trial: Trial, model: nn.Module, search: Search, point: Point, is_ours: bool
) -> tuple[QConfigMapping, nn.Module]:
    """Return the mapping that gives a point's model, and that model. is_ours: whether entries for types may be made."""
    wanted = search.qconfigs(dict(zip(search.units, point.schemes, strict=True)))
    record = record_of(trial.prepared)
    assert record is not None
    for as_mapping in (by_type, by_name) if is_ours else (by_name,):
        mapping = as_mapping(trial.prepared, record, wanted)
        if not wanted:
            return mapping, model
        quantized = trial.convert(model, mapping)
        done = record_of(quantized)
        assert done is not None
        got = {(site.path, site.call): site.qconfig for site in done.sites}
        if got == {(record.sites[i].path, record.sites[i].call): qconfig for i, qconfig in wanted.items()}:
            break
    else:
        raise AssertionError(f"{mapping} does not decide as the search did")
    return mapping, quantized


def _rows(search: Search, chosen: Point) -> tuple[SuggestionStep, ...]:
    """Return the curve."""
    counts = collections.Counter(_told(search, point, chosen) for point in search.points)

    def tell(point: Point) -> str:
        told = _told(search, point, chosen)
        return told if counts[told] == 1 or point == chosen else _told(search, point, chosen, len(search.units))

    return tuple(
        SuggestionStep(
            what=tell(point),
            metric=point.metric,
            bytes=point.bytes,
            ms=point.ms,
            is_within=search.is_within(point.metric),
            is_chosen=point == chosen,
        )
        for point in sorted(search.points, key=lambda point: (search.cost(point), point.harm, point.schemes))
    )


def _told(search: Search, point: Point, chosen: Point, most: int = 2) -> str:
    """Return a mixture in words: "all int8", "encoder int4, rnn int8", "int4 ×12, int8 ×3", "suggested, but b int8".

    most: how many units may differ from the suggested mixture for the last form.
    """
    if len(set(point.schemes)) == 1:
        return f"all {point.schemes[0]}"
    told = [f"{search.name(u)} {s}" for u, s in zip(search.units, point.schemes, strict=True)]
    if len(told) <= 3:
        return ", ".join(told)
    other = [name for name, s, own in zip(told, point.schemes, chosen.schemes, strict=True) if s != own]
    if 0 < len(other) <= most:
        return f"suggested, but {', '.join(other)}"
    return ", ".join(f"{name} ×{point.schemes.count(name)}" for name in LADDER if name in point.schemes)


def _size(count: int) -> str:
    """Return a byte count with as many digits as tell two mixtures apart."""
    return f"{count / 1e6:.4g} MB" if count >= 100_000 else megabytes(count)


def _sites(search: Search, point: Point) -> tuple[SuggestionSite, ...]:
    """Return the units that are finer or coarser than where the search began, and the reasons."""
    order, found = list(LADDER), []
    for unit, scheme in zip(search.units, point.schemes, strict=True):
        alone = {name: search.alone[unit, name] for name in order[:-1] if (unit, name) in search.alone}
        costs = ", ".join(f"{search.harm(value):.3g} as {name}" for name, value in alone.items())
        who = "alone it" if len(unit) == 1 else f"{search.name(unit)} alone"
        why = f"{who} worsens the metric by {costs}" if costs else "not needed coarser"
        for place in unit:
            began = scheme_name(search.sites[place.site].qconfig.of(place.weight))
            if scheme != began:
                is_finer = order.index(scheme) > order.index(began)
                found.append(SuggestionSite(name=search.name((place,)), scheme=scheme, is_finer=is_finer, why=why))
    return tuple(found)
