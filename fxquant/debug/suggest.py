"""suggest_mapping: the smallest, or fastest, model whose metric stays within a budget.

Starts with every site quantized. While the metric is outside the budget, the site that does the most damage for what
its quantization saves (see `sensitivity`) is kept finer; at the end, whichever of those turn out not to be needed are
quantized again. Every step is measured on the whole model, and the result on the model that its mapping really gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx, nn

from fxquant.debug.profile import profile
from fxquant.debug.report import Column, Report
from fxquant.debug.sensitivity import Metric, Progress, Trial
from fxquant.debug.sites import open_quantized
from fxquant.debug.table import megabytes, shorten, site_name
from fxquant.errors import QConfigError, warn
from fxquant.graph import edit
from fxquant.graph.module import Left, Site, record_of
from fxquant.graph.tracer import SCOPE
from fxquant.nn.fused import linear_relu
from fxquant.operators import Operator
from fxquant.qconfig import QConfig, float16_dynamic_qconfig
from fxquant.qconfig_mapping import QConfigMapping, default_dynamic_qconfig_mapping


@dataclass(frozen=True, kw_only=True)
class SuggestionStep:
    """One step of the search, in its order. what: what was done; metric, bytes: of the whole model after it."""

    what: str
    metric: float
    bytes: int
    is_within: bool


@dataclass(frozen=True, kw_only=True)
class Suggestion(Report):
    """What suggest_mapping found: print it, show it in a notebook, or take its mapping.

    rows: the steps, whose bytes and metrics are the trade-off's curve. mapping, model: the result, and the quantized
    model that it gives (the float model itself where nothing can be quantized); metric, bytes: of that model, measured;
    kept: the sites kept finer, and as what.
    """

    rows: tuple[SuggestionStep, ...]
    mapping: QConfigMapping
    model: nn.Module
    metric: float
    bytes: int
    kept: tuple[tuple[str, str], ...]
    float_metric: float
    float_bytes: int
    budget: float
    is_within_budget: bool

    columns: ClassVar[tuple[Column, ...]] = (
        Column("step", "what", 44, lambda row: shorten(row.what, 44), is_number=False),
        Column("metric", "metric", 10, lambda row: f"{row.metric:.5g}"),
        Column("size", "bytes", 10, lambda row: megabytes(row.bytes)),
        Column("in budget", "is_within", 9, lambda row: "yes" if row.is_within else "no", is_number=False),
    )

    @property
    def footer(self) -> tuple[str, ...]:
        """The lines under the table: what came out."""
        verdict = "within" if self.is_within_budget else "OUTSIDE OF"
        kept = ", ".join(f"{name} ({choice})" for name, choice in self.kept) or "nothing"
        return (
            f"metric {self.metric:.5g}, float {self.float_metric:.5g}: {verdict} the budget of {self.budget:g}",
            f"{megabytes(self.float_bytes)} → {megabytes(self.bytes)}; kept finer: {kept}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all but the model as plain values; the mapping as it prints."""
        plain = replace(self, model=nn.Identity(), mapping=QConfigMapping())
        told = super(Suggestion, plain).to_dict()
        return {**told, "mapping": str(self.mapping), "model": None}

    def plot(self, axes: Any = None) -> Any:
        """Draw the curve, bytes against metric, on matplotlib axes (new ones when None), and return them."""
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.subplots()[1]
        axes.plot([step.bytes / 1e6 for step in self.rows], [step.metric for step in self.rows], "o-", label="steps")
        axes.plot([self.bytes / 1e6], [self.metric], "o", markersize=12, fillstyle="none", label="suggested")
        axes.axhline(self.float_metric, linestyle=":", color="gray", label="float")
        axes.set(xlabel="size of the model, MB", ylabel="metric")
        axes.legend()
        return axes


def suggest_mapping(
    model: nn.Module,
    data: Iterable[Any],
    metric: Metric | None = None,
    *,
    budget: float,
    minimize: str = "bytes",
    qconfig_mapping: QConfigMapping | None = None,
    higher_is_better: bool = False,
    progress: Progress = iter,
) -> Suggestion:
    """Return a mapping whose model is as small ("bytes") or as fast ("ms") as the budget allows.

    budget: how much worse than the float model's the metric may be, in the metric's own unit (for the default metric,
    the relative RMS error of the outputs itself). data, metric, higher_is_better, progress: as for `sensitivity`; data
    should be what the model meets. qconfig_mapping: where to start, everything quantized when None. Sites that are kept
    finer get float16 weights where their operator has that, bytes count and the budget allows it, else they stay float.

    The same arguments give the same mapping, but for "ms", which is measured. A result outside the budget, which only a
    negative one can bring about, is warned of. Raises QConfigError for another `minimize`, and what `sensitivity` does.
    """
    if minimize not in ("bytes", "ms"):
        raise QConfigError(f"minimize is 'bytes' or 'ms', got {minimize!r}")
    mapping = default_dynamic_qconfig_mapping() if qconfig_mapping is None else qconfig_mapping
    trial = Trial(model, mapping, data, metric)
    search = _Search(trial, model, mapping, budget, -1.0 if higher_is_better else 1.0, minimize)
    kept = set(search.run(progress))
    final = search.mapping_for(kept)
    is_float = kept == search.numbers and not search.halves
    quantized = model if is_float else trial.convert(model, final)
    record = record_of(quantized)
    done = {site.call or site.path for site in record.sites} if record is not None else set()
    assert done >= {search.name(i) for i in search.numbers - kept}
    value = trial.metric_of(quantized)
    found = Suggestion(
        rows=tuple(search.steps),
        mapping=final,
        model=quantized,
        metric=value,
        bytes=edit.byte_count(quantized),
        kept=tuple((site_name(search.sites[i]), search.chosen(i)) for i in sorted(kept)),
        float_metric=search.start,
        float_bytes=trial.record.float_bytes,
        budget=budget,
        is_within_budget=search.is_within(value),
    )
    if not found.is_within_budget:
        warn(f"suggest_mapping: the metric of the result, {value:.5g}, is outside of the budget of {budget:g}")
    return found


class _Search:
    """One search: sites by number, and the steps so far."""

    def __init__(
        self, trial: Trial, model: nn.Module, mapping: QConfigMapping, budget: float, sign: float, minimize: str
    ) -> None:
        self.trial, self.base, self.budget, self.sign = trial, mapping, budget, sign
        self.sites, self.numbers = trial.record.sites, set(range(len(trial.record.sites)))
        self.start = trial.measure(())
        self.whole_bytes = edit.byte_count(trial.quantized)
        self.steps: list[SuggestionStep] = []
        self.halves = self._halves(model) if minimize == "bytes" else {}
        self.savings = self._savings(model) if minimize == "ms" else self._saved_bytes()

    def run(self, progress: Progress) -> list[int]:
        """Return the numbers of the sites that must be kept finer."""
        if self.step("all sites quantized", set()):
            return []
        damages = {i: self.damage(self.trial.measure({i})) for i in map(int, progress(range(len(self.sites))))}
        kept = self._keep_finer(damages)
        if not self.steps[-1].is_within and self.halves:
            self.halves = {}  # float16 is not fine enough
            kept = self._keep_finer(damages)
        return self._take_back(kept) if self.steps[-1].is_within else kept

    def _keep_finer(self, damages: dict[int, float]) -> list[int]:
        """Return the sites to keep finer until the metric is within the budget, worst for their savings first."""
        worst_first = sorted(self.numbers, key=lambda i: (-damages[i] / max(self.savings[i], 1e-9), i))
        for count, i in enumerate(worst_first, 1):
            if self.step(f"{site_name(self.sites[i])} {self.chosen(i)}", set(worst_first[:count])):
                return worst_first[:count]
        return worst_first

    def _take_back(self, kept: list[int]) -> list[int]:
        """Return the sites of those that really are needed."""
        for i in reversed(kept[:-1]):
            fewer = [other for other in kept if other != i]
            kept = fewer if self.step(f"{site_name(self.sites[i])} quantized again", set(fewer)) else kept
        return kept

    def chosen(self, i: int) -> str:
        """Return how a report calls what a site gets that is kept finer."""
        return "float16" if i in self.halves else "float"

    def step(self, what: str, kept: set[int]) -> bool:
        """Measure the model with some sites kept finer; return whether it is within the budget."""
        value = self.trial.measure(self.numbers - kept, {i: self.halves[i][0] for i in kept if i in self.halves})
        size = self.whole_bytes + sum(self.finer_bytes(i) - self.sites[i].int_bytes for i in kept)
        self.steps.append(SuggestionStep(what=what, metric=value, bytes=size, is_within=self.is_within(value)))
        return self.is_within(value)

    def damage(self, value: float) -> float:
        """Return how much worse than float's a metric is; infinite for a NaN."""
        return math.inf if math.isnan(value) else self.sign * (value - self.start)

    def is_within(self, value: float) -> bool:
        """Return whether a metric is within the budget."""
        return self.damage(value) <= self.budget

    def name(self, i: int) -> str:
        """Return what a site's record goes by."""
        return self.sites[i].call or self.sites[i].path

    def choice(self, i: int) -> QConfig | None:
        """Return what a site gets that is kept finer."""
        return float16_dynamic_qconfig if i in self.halves else None

    def finer_bytes(self, i: int) -> int:
        """Return what it takes then."""
        return self.halves[i][1] if i in self.halves else self.sites[i].float_bytes

    def mapping_for(self, kept: set[int]) -> QConfigMapping:
        """Return the mapping that keeps some sites finer."""
        mapping = self.base.copy()
        for i in sorted(kept):
            self._set(mapping, self.sites[i], self.choice(i))
        return mapping

    def _set(self, mapping: QConfigMapping, site: Site, choice: QConfig | None) -> None:
        """Give a site an entry of its own."""
        if site.call is None:
            mapping.set_module_name(site.path, choice)
        else:
            mapping.set_module_name_object_type_order(*self._place(site), choice)

    def _place(self, site: Site) -> tuple[str, Any, int]:
        """Return a functional site's scope, function, and number among the candidates of both."""
        prepared, record = self.trial.prepared, self.trial.record
        assert isinstance(prepared, fx.GraphModule)
        nodes = {node.name: node for node in prepared.graph.nodes}
        entries: list[Site | Left] = [*record.sites, *record.left]
        in_order = sorted((str(entry.call) for entry in entries if entry.call in nodes), key=list(nodes).index)
        places = [_scope_and_function(nodes[call]) for call in in_order]
        own = in_order.index(str(site.call))
        return (*places[own], places[:own].count(places[own]))

    def _halves(self, model: nn.Module) -> dict[int, tuple[nn.Module, int]]:
        """Return the sites' forms with float16 weights, and their bytes, of those that have one."""
        mapping = self.base.copy()
        for site, operator in zip(self.sites, map(self._operator, self.sites), strict=True):
            if operator.accepts(float16_dynamic_qconfig):
                self._set(mapping, site, float16_dynamic_qconfig)
        halves = self.trial.convert(model, mapping)
        record = record_of(halves)
        assert record is not None
        opened = open_quantized(halves, record)
        found = {site.call or site.path: (opened.sites[i], site) for i, site in enumerate(record.sites)}
        return {
            i: (found[self.name(i)][0], found[self.name(i)][1].int_bytes)
            for i in self.numbers
            if self.name(i) in found and found[self.name(i)][1].qconfig == float16_dynamic_qconfig
        }

    def _operator(self, site: Site) -> Operator:
        """Return a site's row."""
        return next(row for row in self.trial.record.operators if row.name == site.operator)

    def _saved_bytes(self) -> dict[int, float]:
        return {i: self.finer_bytes(i) - self.sites[i].int_bytes for i in self.numbers}

    def _savings(self, model: nn.Module) -> dict[int, float]:
        """Return the milliseconds that each site's quantization saves on the first batch."""
        measured = profile(self.trial.quantized, self.trial.first_batch, float_model=model)
        saved = {(row.path, row.call): row.float_ms - row.ms for row in measured.rows}
        return {i: saved.get((site.path, site.call or ""), 0.0) for i, site in enumerate(self.sites)}


def _scope_and_function(node: fx.Node) -> tuple[str, Any]:
    return node.meta.get(SCOPE, ""), nn.functional.linear if node.target is linear_relu else node.target
