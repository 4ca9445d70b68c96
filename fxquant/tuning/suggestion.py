"""The report of suggest_mapping: the models that were measured, the suggested one, and why."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from fxquant.debug.report.page import write
from fxquant.debug.report.report import Column, Report
from fxquant.debug.report.table import first_few, megabytes
from fxquant.graph.record import record_of
from fxquant.graph.why import Rounded
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.tuning.curve import Dot, draw_curve

_SHOWN_SITES = 12
_AGAIN = "weights rounded by GPTQ: to get this model again, convert_fx(prepare_fx(model, found.mapping, …), data=data)"


@dataclass(frozen=True, kw_only=True)
class SuggestionStep:
    """One model of the trade-off curve. what: its schemes; metric, bytes: measured.

    ms: the sum of its sites' own, NaN if bytes are minimized; is_within: whether its metric is within the budget;
    is_chosen: whether it is the suggested one.
    """

    what: str
    metric: float
    bytes: int
    ms: float
    is_within: bool
    is_chosen: bool


@dataclass(frozen=True, kw_only=True)
class SuggestionSite:
    """One site, or a weight of one, that is kept finer or made coarser than in the mapping that the search began with.

    name: its path; scheme: what it gets; is_finer: whether it is kept finer; why: the figures behind that.
    """

    name: str
    scheme: str
    is_finer: bool
    why: str


@dataclass(frozen=True, kw_only=True)
class Suggestion(Report):
    """What suggest_mapping found: print it, show it in a notebook, or use its mapping.

    rows: the trade-off curve, all measured models, smallest (or fastest) first. mapping, model: the result, and the
    quantized model that it gives (the float model itself if nothing is quantized); metric, bytes: measured on it.
    sites: those kept finer and those made coarser, with the reasons.
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
        Column("measured", "what", 56, lambda step: step.what, is_number=False),
        Column("metric", "metric", 10, lambda step: f"{step.metric:.5g}"),
        Column("size", "bytes", 10, lambda step: _size(step.bytes)),
        Column("ms", "ms", 9, lambda step: "" if math.isnan(step.ms) else f"{step.ms:.3f}"),
        Column("in budget", "is_within", 9, lambda step: "yes" if step.is_within else "no", is_number=False),
        Column("", "is_chosen", 11, lambda step: "← suggested" if step.is_chosen else "", is_number=False),
    )

    @property
    def kept(self) -> tuple[tuple[str, str], ...]:
        """The sites, and weights of sites, that are kept finer, and their schemes."""
        return tuple((site.name, site.scheme) for site in self.sites if site.is_finer)

    @property
    def coarser(self) -> tuple[tuple[str, str], ...]:
        """The sites, and weights of sites, that are made coarser, and their schemes."""
        return tuple((site.name, site.scheme) for site in self.sites if not site.is_finer)

    @property
    def has_feedback(self) -> bool:
        """Whether any weights of the model were rounded by GPTQ, so that the mapping needs data to give it again."""
        record = record_of(self.model)
        return record is not None and any(Rounded.GPTQ in site.rounded for site in record.sites)

    @property
    def footer(self) -> tuple[str, ...]:
        """The lines under the table: the result, and the reasons for it."""
        verdict = "within" if self.is_within_budget else "OUTSIDE"
        sites = sorted(self.sites, key=lambda site: not site.is_finer)
        reasons = [f"{'finer' if s.is_finer else 'coarser'}: {s.name} {s.scheme}; {s.why}" for s in sites]
        return (
            f"metric {self.metric:.5g}, float {self.float_metric:.5g}: {verdict} the budget of {self.budget:g}",
            f"{megabytes(self.float_bytes)} → {megabytes(self.bytes)}, {self.float_bytes / max(self.bytes, 1):.2f}×",
            *([_AGAIN] if self.has_feedback else []),
            *first_few(reasons, _SHOWN_SITES, "sites"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model as plain values; the mapping as it prints."""
        plain = replace(self, model=nn.Identity(), mapping=QConfigMapping())
        return {**super(Suggestion, plain).to_dict(), "mapping": str(self.mapping), "model": None}

    def figure(self) -> str:
        """Return the curve as an SVG: the metric against megabytes or milliseconds, the suggested model ringed."""
        sign = -1.0 if self.higher_is_better else 1.0
        is_fast = self.minimize == "ms"
        places = [(step.ms if is_fast else step.bytes / 1e6, sign * step.metric) for step in self.rows]
        dots = [
            Dot(
                x=at[0],
                y=step.metric,
                label=f"{step.what}: {step.metric:.5g}, {megabytes(step.bytes)}",
                is_within=step.is_within,
                is_best=all(x > at[0] or y > at[1] or (x, y) == at for x, y in places),
                is_chosen=step.is_chosen,
            )
            for at, step in zip(places, self.rows, strict=True)
        ]
        limit = self.float_metric + sign * self.budget
        y_label = f"metric, {'higher' if self.higher_is_better else 'lower'} is better"
        return draw_curve(dots, limit, "milliseconds a call" if is_fast else "size of the model, MB", y_label)

    def plot(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the curve as an SVG, which any browser shows. path: where to write it."""
        return write(path, self.figure())


def _size(count: int) -> str:
    """Return a byte count with enough digits to distinguish two mixtures."""
    return f"{count / 1e6:.4g} MB" if count >= 100_000 else megabytes(count)
