"""suggest_mapping: the smallest or fastest model whose metric stays within a budget. `search` says how."""

from __future__ import annotations

import collections
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from fxquant.debug.measure.metric import Metric
from fxquant.debug.measure.trial import Trial
from fxquant.errors import ArgumentError, QConfigError, each_warning_once, warn
from fxquant.graph import edit
from fxquant.graph.record import record_of
from fxquant.progress import Progress
from fxquant.qconfig_mapping import QConfigMapping, default_dynamic_qconfig_mapping
from fxquant.tuning.ladder import LADDER, check_schemes, scheme_name
from fxquant.tuning.mapping import by_name, by_type
from fxquant.tuning.search import Point, Search
from fxquant.tuning.static import StaticSearch
from fxquant.tuning.suggestion import Suggestion, SuggestionSite, SuggestionStep


def _check_aims(budget: Any, minimize: str) -> None:
    """Raise QConfigError for an unknown `minimize`, ArgumentError for a budget that is not a number."""
    if minimize not in ("bytes", "ms"):
        raise QConfigError(f"minimize is 'bytes' or 'ms', got {minimize!r}")
    if not isinstance(budget, numbers.Real) or math.isnan(budget):
        raise ArgumentError(f"budget is how much worse than float the metric may be, a number, got {budget!r}")


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

    budget: how much worse than float the metric may be, in its own unit (for the default metric, the relative RMS error
    of the outputs itself). data, metric, higher_is_better, progress: as for `sensitivity`; data should be like what the
    model meets in use. schemes: what a site, or a weight of one, may become: some of "int3", "int3 of 32", "int4" (for
    embeddings 4-bit tables), "int4 of 32", "int8", "int16", "float16" and "float"; None: all that its operator has.
    qconfig_mapping: what "int8" means for each site, and what stays float; None: default_dynamic_qconfig for all.
    error_feedback: whether weights of 3 and 4 bits are rounded by GPTQ, as in `convert_fx(prepared, data=data)`, which
    takes one pass over data, and seconds for a large weight.

    Static sites stay so where the budget allows it; others become "dynamic int8", "int16" or "float": `tuning.static`.
    Each site (for bytes, all places of a tied weight together) is tried alone under its schemes, from the smallest up
    to the first that does little harm; then 10 to 40 whole models are measured by passes over all data: see `search`.

    The same arguments give the same mapping; for "ms", the same timings do. The figures are measured on the model that
    the mapping gives. Warns if the result is outside the budget. Raises QConfigError for an unknown `minimize` or
    scheme, and what `sensitivity` raises.
    """
    _check_aims(budget, minimize)
    mapping = default_dynamic_qconfig_mapping() if qconfig_mapping is None else qconfig_mapping
    trial = Trial(model, mapping, data, metric)
    aims = budget, -1.0 if higher_is_better else 1.0, minimize
    if trial.is_static:
        return _static_result(StaticSearch(trial, model, schemes, *aims), progress)
    search = Search(trial, model, check_schemes(schemes), *aims, error_feedback)
    search.run(progress)
    return _result(trial, model, search, is_ours=qconfig_mapping is None)


def _static_result(search: StaticSearch, progress: Progress) -> Suggestion:
    """Return what a search over static sites suggests, or the nearest, with a warning."""
    point = search.run(progress)
    if not search.is_within(point):
        _warn_outside(point.metric, search.budget, len(search.points), search.start)
    return Suggestion(
        rows=search.rows(point),
        mapping=point.mapping,
        model=point.model,
        metric=point.metric,
        bytes=point.bytes,
        sites=search.sites(point),
        float_metric=search.start,
        float_bytes=search.record.float_bytes,
        budget=search.budget,
        is_within_budget=search.is_within(point),
        minimize="ms" if search.is_fast else "bytes",
        higher_is_better=search.sign < 0,
    )


def _warn_outside(value: float, budget: float, count: int, start: float) -> None:
    warn(
        f"suggest_mapping: the metric of the result, {value:.5g}, is outside the budget of {budget:g}; it "
        f"is the nearest of {count} models, float has {start:.5g}"
    )


def _result(trial: Trial, model: nn.Module, search: Search, is_ours: bool) -> Suggestion:
    """Return what a finished search suggests, as measured, or the nearest, with a warning.

    is_ours: whether the mapping may have entries for types, or the user's entries are kept.
    """
    for point in search.best():
        mapping, quantized = _realize(trial, model, search, point, is_ours)
        value = trial.metric_of(quantized)
        if search.is_within(value):
            break
    else:
        _warn_outside(value, search.budget, len(search.points), search.start)
    return Suggestion(
        rows=_rows(search, point),
        mapping=mapping,
        model=quantized,
        metric=value,
        bytes=edit.byte_count(quantized),
        sites=_sites(search, point),
        float_metric=search.start,
        float_bytes=trial.record.float_bytes,
        budget=search.budget,
        is_within_budget=search.is_within(value),
        minimize="ms" if search.is_fast else "bytes",
        higher_is_better=search.sign < 0,
    )


def _realize(
    trial: Trial, model: nn.Module, search: Search, point: Point, is_ours: bool
) -> tuple[QConfigMapping, nn.Module]:
    """Return the mapping that gives a point's model, and that model."""
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
        raise AssertionError(f"{mapping} gives another model than the search measured")
    return mapping, quantized


def _rows(search: Search, chosen: Point) -> tuple[SuggestionStep, ...]:
    """Return the curve."""
    counts = collections.Counter(_describe(search, point, chosen) for point in search.points)

    def describe(point: Point) -> str:
        text = _describe(search, point, chosen)
        return text if counts[text] == 1 or point == chosen else _describe(search, point, chosen, len(search.units))

    return tuple(
        SuggestionStep(
            what=describe(point),
            metric=point.metric,
            bytes=point.bytes,
            ms=point.ms,
            is_within=search.is_within(point.metric),
            is_chosen=point == chosen,
        )
        for point in sorted(search.points, key=lambda point: (search.cost(point), point.harm, point.schemes))
    )


def _describe(search: Search, point: Point, chosen: Point, most: int = 2) -> str:
    """Return a mixture in words: "all int8", "encoder int4, rnn int8", "int4 ×12, int8 ×3", "suggested, but b int8".

    most: how many units may differ from the suggested mixture for the last form.
    """
    if len(set(point.schemes)) == 1:
        return f"all {point.schemes[0]}"
    units = [f"{search.name(u)} {s}" for u, s in zip(search.units, point.schemes, strict=True)]
    if len(units) <= 3:
        return ", ".join(units)
    other = [text for text, s, best in zip(units, point.schemes, chosen.schemes, strict=True) if s != best]
    if 0 < len(other) <= most:
        return f"suggested, but {', '.join(other)}"
    return ", ".join(f"{name} ×{point.schemes.count(name)}" for name in LADDER if name in point.schemes)


def _sites(search: Search, point: Point) -> tuple[SuggestionSite, ...]:
    """Return what is finer or coarser than in the mapping that the search began with, and the reasons."""
    order, sites = list(LADDER), []
    for unit, scheme in zip(search.units, point.schemes, strict=True):
        alone = {name: search.alone[unit, name] for name in order[:-1] if (unit, name) in search.alone}
        costs = ", ".join(f"{search.harm(value):.3g} as {name}" for name, value in alone.items())
        who = "alone it" if len(unit) == 1 else f"{search.name(unit)} alone"
        why = f"{who} worsens the metric by {costs}" if costs else "not needed coarser"
        for place in unit:
            before = scheme_name(search.sites[place.site].qconfig.of(place.weight))
            if scheme != before:
                is_finer = order.index(scheme) > order.index(before)
                sites.append(SuggestionSite(name=search.name((place,)), scheme=scheme, is_finer=is_finer, why=why))
    return tuple(sites)
