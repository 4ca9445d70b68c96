"""sensitivity: what each site's quantization costs the whole model.

damage: how much worse the metric gets when this site alone is quantized; gain: how much better than fully quantized it
gets when this site alone stays float. Both are 0 where a site does no harm. Errors of sites do not simply add up: the
damages say where to look first, the gains what leaving one site float would bring.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fxquant.debug.report import Column, Report
from fxquant.debug.sites import first_tensor, open_float, open_quantized
from fxquant.debug.table import megabytes, shorten, site_name
from fxquant.errors import CheckpointError, ExampleInputsError, ModelStateError
from fxquant.graph.call import as_arguments, run
from fxquant.graph.module import Record, need_stage
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.quantize_fx import convert_fx, prepare_fx

Metric = Callable[[nn.Module], float]
Progress = Callable[[Iterable[Any]], Iterable[Any]]


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
    """Every site's damage, worst first: print it, show it in a notebook, sort it, or walk its rows.

    float_metric, quantized_metric: of the float model, and with all sites quantized.
    """

    rows: tuple[SensitivityRow, ...]
    float_metric: float
    quantized_metric: float
    higher_is_better: bool

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
        """The lines under the table: the metric of both ends."""
        better = "higher" if self.higher_is_better else "lower"
        return (
            f"metric ({better} is better): float {_value(self.float_metric)}, all sites quantized "
            f"{_value(self.quantized_metric)}",
        )


class Trial:
    """A model whose sites can be quantized one by one: the float model, laid open, and what its sites can become."""

    def __init__(self, model: nn.Module, mapping: QConfigMapping, data: Iterable[Any], metric: Metric | None) -> None:
        if isinstance(data, torch.Tensor):
            raise ExampleInputsError(
                f"data is an iterable of batches, got one tensor {tuple(data.shape)}; pass [tensor]"
            )
        batches = list(data)
        self._batches = [as_arguments(batch, model) for batch in batches]
        if not self._batches:
            raise ExampleInputsError("data held no batch; was it a generator that had been used up?")
        self.first_batch = batches[0]
        self.prepared = self._prepare(model, mapping)
        self.quantized = convert_fx(self.prepared)
        self.record = need_stage(self.quantized, "quantized", "sensitivity", "a mapping that quantizes something")
        if not self.record.sites:
            raise ModelStateError("the mapping quantizes nothing of this model: there is nothing to try")
        self._float = open_float(model, self.record)
        self._sites = open_quantized(self.quantized, self.record).sites
        self._metric = metric if metric is not None else self._output_error()

    def convert(self, model: nn.Module, mapping: QConfigMapping) -> nn.Module:
        """Return the model quantized as a mapping says, prepared with the first batch."""
        return convert_fx(self._prepare(model, mapping))

    def _prepare(self, model: nn.Module, mapping: QConfigMapping) -> nn.Module:
        args, kwargs = self._batches[0]
        return prepare_fx(model, mapping, args, example_kwargs=kwargs)

    def measure(self, quantized: Collection[int], others: Mapping[int, nn.Module] | None = None) -> float:
        """Return the metric with some sites quantized, by number, and some of the others replaced."""
        chosen = {**{i: self._sites[i] for i in quantized}, **(others or {})}
        root, undo = self._float.model, []
        try:
            for i, module in chosen.items():
                root = _swap(root, self._float.sites[i], module)
                undo.append((module, self._float.sites[i]))
            return self.metric_of(root)
        finally:
            for new, old in reversed(undo):
                root = _swap(root, new, old)

    def metric_of(self, model: nn.Module) -> float:
        """Return the metric of a whole model."""
        with torch.no_grad():
            return float(self._metric(model))

    def _output_error(self) -> Metric:
        """Return the default metric, the relative RMS error of the outputs; the float outputs are computed once."""
        expected = [first_tensor(run(self._float.model, batch, seed)) for seed, batch in enumerate(self._batches)]

        def error(model: nn.Module) -> float:
            noise = signal = 0.0
            for seed, (batch, wanted) in enumerate(zip(self._batches, expected, strict=True)):
                got = first_tensor(run(model, batch, seed))
                if wanted is None or got is None or got.shape != wanted.shape:
                    raise ExampleInputsError("the model's outputs hold no tensor to compare; pass a metric of your own")
                noise += float((got.double() - wanted.double()).square().sum())
                signal += float(wanted.double().square().sum())
            return math.sqrt(noise / signal) if signal else math.sqrt(noise)

        return error


def _swap(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put a module in the place of another, wherever that stands; return the root, which may be the new one."""
    if root is old:
        return new
    for parent in root.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return root


class _Notes:
    """Measured values, kept in a file as they come, so that an interrupted run goes on where it stopped."""

    def __init__(self, path: str | os.PathLike[str] | None, record: Record) -> None:
        self._path = None if path is None else Path(path)
        self._sites = [site_name(site) for site in record.sites]
        self._values: dict[str, float] = {}
        if self._path is not None and self._path.exists():
            try:
                kept = json.loads(self._path.read_text(encoding="utf-8"))
                self._values, sites = dict(kept["values"]), kept["sites"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{self._path} is no file of sensitivity's; remove it to begin anew") from error
            if sites != self._sites:
                raise CheckpointError(f"{self._path} was kept for another model or mapping; remove it to begin anew")

    def ask(self, key: str, measure: Callable[[], float]) -> float:
        """Return the value that is kept, or measure it."""
        if key not in self._values:
            self._values[key] = measure()
            if self._path is not None:
                draft = self._path.with_name(self._path.name + ".part")
                draft.write_text(json.dumps({"sites": self._sites, "values": self._values}), encoding="utf-8")
                draft.replace(self._path)
        return self._values[key]


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

    data: an iterable of batches, as `compare` takes them; it is kept, and its first batch is the example inputs.
    metric: a function of a model that gives a number, which may be anything: a task's loss, the cosine of embeddings;
    the relative RMS error of the outputs when None. higher_is_better: what the metric means. resume: a file that keeps
    what was measured, to go on after an interruption. progress: what to wrap the sites in, `tqdm` for a bar.

    Runs the metric twice a site and twice more, on mirrors: the model is not changed. Raises ExampleInputsError,
    ModelStateError where the mapping quantizes nothing, CheckpointError for a file of another run.
    """
    trial = Trial(model, qconfig_mapping, data, metric)
    sites, notes = trial.record.sites, _Notes(resume, trial.record)
    every, sign = set(range(len(sites))), -1.0 if higher_is_better else 1.0
    before = notes.ask("float", lambda: trial.measure(()))
    after = notes.ask("quantized", lambda: trial.measure(every))
    rows = []
    for i in progress(range(len(sites))):
        site, index = sites[i], int(i)
        alone = notes.ask(f"alone {index}", lambda index=index: trial.measure({index}))  # type: ignore[misc]
        without = notes.ask(f"without {index}", lambda index=index: trial.measure(every - {index}))  # type: ignore[misc]
        rows.append(
            SensitivityRow(
                path=site.path,
                call=site.call or "",
                kind=site.kind,
                operator=site.operator,
                saved_bytes=site.float_bytes - site.int_bytes,
                alone=alone,
                without=without,
                damage=sign * (alone - before),
                gain=sign * (after - without),
            )
        )
    found = Sensitivity(
        rows=tuple(rows), float_metric=before, quantized_metric=after, higher_is_better=higher_is_better
    )
    return found.sort("damage")
