"""sensitivity: what quantizing each site costs the whole model.

damage: how much worse than float the metric is with only this site quantized; gain: how much better than fully
quantized it is with only this site in float. Both are 0 for a harmless site. The sites' errors do not simply add up:
the damages show where to look first, the gains what keeping one site float would bring.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fxquant.debug.measure.metric import Metric, need_information, need_number
from fxquant.debug.measure.notes import Notes
from fxquant.debug.measure.replay import Variant
from fxquant.debug.measure.sites import Forms
from fxquant.debug.measure.trial import Trial
from fxquant.debug.report.report import Column, Report
from fxquant.debug.report.table import megabytes, shorten, site_fields, site_name
from fxquant.graph.record import Site
from fxquant.progress import Progress
from fxquant.qconfig_mapping import QConfigMapping


@dataclass(frozen=True, kw_only=True)
class SensitivityRow:
    """One site. alone, without: the metric with only this site quantized, and with all but this one."""

    path: str
    call: str
    kind: str
    operator: str
    saved_bytes: int
    alone: float
    without: float
    damage: float
    gain: float


def _value(value: float) -> str:
    return f"{value:.5g}"


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Report):
    """Every site's damage, worst first: print it, show it in a notebook, sort it, or read its lines.

    float_metric, quantized_metric: of the float model, and with all sites quantized.
    """

    rows: tuple[SensitivityRow, ...]
    float_metric: float
    quantized_metric: float
    higher_is_better: bool

    title: ClassVar[str] = "Sensitivity: what each site alone does to the metric"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("site", "path", 28, lambda row: shorten(site_name(row), 28), is_number=False),
        Column("was", "kind", 14, lambda row: shorten(row.kind, 14), is_number=False),
        Column("alone", "alone", 10, lambda row: _value(row.alone)),
        Column("damage", "damage", 10, lambda row: _value(row.damage)),
        Column("without", "without", 10, lambda row: _value(row.without)),
        Column("gain", "gain", 10, lambda row: _value(row.gain)),
        Column("saves", "saved_bytes", 9, lambda row: megabytes(row.saved_bytes)),
    )

    @property
    def footer(self) -> tuple[str, ...]:
        """The lines under the table: what the columns are, and the metric of both ends."""
        better = "higher" if self.higher_is_better else "lower"
        return (
            "alone: the metric with only this site quantized; damage: how much worse than float that is",
            "without: the metric with all but this site quantized; gain: how much better than with all that is",
            f"metric ({better} is better): float {_value(self.float_metric)}, all sites quantized "
            f"{_value(self.quantized_metric)}",
        )


def sensitivity(
    model: nn.Module,
    qconfig_mapping: QConfigMapping,
    data: Iterable[Any],
    metric: Metric | None = None,
    *,
    higher_is_better: bool = False,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = iter,
) -> Sensitivity:
    """Return what each site's quantization does to a metric, by itself and among all others.

    data: an iterable of batches, as for `compare`; it is kept, and its first batch is the example inputs. metric: a
    function of a model that gives a number, such as a task's loss or the cosine of embeddings; None: the relative RMS
    error of the outputs. higher_is_better: what the metric means. resume: a file for what was measured, so that an
    interrupted run can go on; a pass of the float model (or your metric of it and of the quantized one) shows whether
    a file is of the same run. progress: wraps the work, such as `tqdm` for a bar.

    For a traced model the default metric takes a float and a quantized pass per batch, whose values are kept
    meanwhile, and per site twice the nodes that follow it. Any other metric is called twice per site, and twice more.
    All run on mirrors: the model is not changed.

    Raises ExampleInputsError, ModelStateError if the mapping quantizes nothing or the float model's metric is NaN,
    ArgumentError for a metric that is 0 or NaN for everything, CheckpointError for a file of another run.
    """
    trial = Trial(model, qconfig_mapping, data, metric)
    values = trial.measure_all(variants_of(trial.forms), Notes(resume, trial).ask, progress)
    need_number(values["float"])
    if metric is not None:
        tried = [value for name, value in values.items() if name != "float"]
        need_information(values["float"], tried, {site.qconfig.weight.dtype for site in trial.record.sites})
    return _report(trial.record.sites, values, higher_is_better).sort("damage")


def _report(sites: Sequence[Site], values: Mapping[str, float], higher_is_better: bool) -> Sensitivity:
    """Return the report of measured values."""
    before, after = values["float"], values["quantized"]
    sign = -1.0 if higher_is_better else 1.0
    rows = tuple(
        SensitivityRow(
            **site_fields(site),
            saved_bytes=site.float_bytes - site.int_bytes,
            alone=values[f"alone {i}"],
            without=values[f"without {i}"],
            damage=sign * (values[f"alone {i}"] - before),
            gain=sign * (after - values[f"without {i}"]),
        )
        for i, site in enumerate(sites)
    )
    return Sensitivity(rows=rows, float_metric=before, quantized_metric=after, higher_is_better=higher_is_better)


def variants_of(forms: Forms) -> dict[str, Variant]:
    """Return what is measured, by the names it is kept under: first what is close to float, then to quantized."""
    nothing: Forms = {}
    return {
        "float": Variant(nothing, nothing),
        **{f"alone {i}": Variant({i: form}, nothing) for i, form in forms.items()},
        "quantized": Variant(forms, forms),
        **{f"without {i}": Variant({k: forms[k] for k in forms if k != i}, forms) for i in forms},
    }
