"""compare: what quantization costs in accuracy, site by site.

For a site's float output y and its quantized output ŷ, over all calls and elements:

    SQNR = 10 log10(Σ y² / Σ (y - ŷ)²) dB      relative RMS = √(Σ (y - ŷ)² / Σ y²)      max error = max |y - ŷ|

"accumulated": ŷ is what the site gives as it runs in the quantized model, on inputs that carry the errors of all before
it. "local": ŷ is what the quantized site gives for the float model's inputs, so the damage that it does itself.

peak, of the rows x_r of K values of the float site's input, says how far their largest values stick out:

    peak = √(Σ_r K max_k x_rk² / Σ_r Σ_k x_rk²)      1 where all are of one size; √K where one value is all there is

A row has 255 steps from end to end, so its largest values set the step for all: a peak twice as high costs 6 dB.
"""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fxquant.debug.measure.sites import first_tensor, open_float, open_quantized
from fxquant.debug.measure.trial import NO_FLOATS, Progress
from fxquant.debug.report.charts import Bar, bar_chart
from fxquant.debug.report.page import write
from fxquant.debug.report.report import Column, Report
from fxquant.debug.report.table import site_name
from fxquant.errors import ExampleInputsError
from fxquant.graph.call import each_batch, run
from fxquant.graph.outputs import Error, energy, named_floats, wide
from fxquant.graph.record import Site, need_stage

_SHOWN_OUTPUTS = 8


@dataclass(frozen=True, kw_only=True)
class CompareRow:
    """One site's errors; see the module's equations. NaN: it was never called, or its inputs are no floats.

    path, call, kind, operator: as in its Site. calls: how often it was compared; unpaired: calls of one model to which
    the other has none of the same shape, where code that branches on values took another way.
    """

    path: str
    call: str
    kind: str
    operator: str
    calls: int
    unpaired: int
    sqnr_db: float
    relative_rms: float
    max_error: float
    local_sqnr_db: float
    local_relative_rms: float
    local_max_error: float
    input_min: float
    input_max: float
    peak: float


@dataclass(frozen=True, kw_only=True)
class OutputRow:
    """One floating-point output's error. name: its path in what forward gives, "" where that is one tensor.

    batches: how many it was compared in: those in which both models give it, in one shape. Its errors are NaN where
    there is none, or the float model gives no finite value.
    """

    name: str
    batches: int
    sqnr_db: float
    relative_rms: float
    max_error: float


def _decibels(value: float) -> str:
    return "" if math.isnan(value) else "exact" if value == math.inf else f"{value:.1f} dB"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _range(row: CompareRow) -> str:
    return "" if math.isnan(row.input_min) else f"{row.input_min:.3g} … {row.input_max:.3g}"


@dataclass(frozen=True, kw_only=True)
class Comparison(Report):
    """Every site's error, worst first: print it, show it in a notebook, sort it, or walk its rows.

    batches: how many were run. outputs: the error of each output whose values are floats; output_sqnr_db,
    output_relative_rms, output_max_error: of the one that came off worst.
    """

    rows: tuple[CompareRow, ...]
    batches: int
    output_sqnr_db: float
    output_relative_rms: float
    output_max_error: float
    outputs: tuple[OutputRow, ...] = ()

    title: ClassVar[str] = "Comparison: the error of each site"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("site", "path", 24, site_name, is_number=False, is_name=True),
        Column("was", "kind", 12, lambda row: row.kind, is_number=False, is_name=True),
        Column("SQNR", "sqnr_db", 8, lambda row: _decibels(row.sqnr_db)),
        Column("local", "local_sqnr_db", 8, lambda row: _decibels(row.local_sqnr_db)),
        Column("RMS", "relative_rms", 7, lambda row: _number(100 * row.relative_rms) and f"{row.relative_rms:.2%}"),
        Column("max", "max_error", 8, lambda row: _number(row.max_error)),
        Column("input", "input_max", 14, _range),
        Column("peak", "peak", 5, lambda row: _number(row.peak)),
    )

    @property
    def footer(self) -> tuple[str, ...]:
        """The lines under the table: the output's error, and what the columns are."""
        what = "output" if len(self.outputs) <= 1 else f"the worst of {len(self.outputs)} outputs"
        batches = f"{self.batches} batch{'es' if self.batches != 1 else ''}"
        output = (
            f"{what}: SQNR {_decibels(self.output_sqnr_db)}, relative RMS {self.output_relative_rms:.2%}, max error "
            f"{_number(self.output_max_error)}; {batches}"
        )
        if math.isnan(self.output_max_error):
            has_pairs = any(row.batches for row in self.outputs)
            why = (
                "the float model gives only NaN and infinities"
                if has_pairs
                else "it has other shapes in the quantized model"
            )
            output = f"{what}: not compared, {why}; {batches}"
        missed = [site_name(row) for row in self.rows if not row.calls]
        apart = [f"{site_name(row)}: {row.unpaired}" for row in self.rows if row.unpaired]
        return (
            "SQNR, RMS (relative) and max (absolute) error as it runs; local: SQNR of the site alone, on float inputs",
            "input: the range of these; peak: how far a row's largest value sticks out, 1 where all are of one size",
            *([f"never called: {', '.join(missed)}"] if missed else ()),
            *([f"calls without a counterpart in the other model: {', '.join(apart)}"] if apart else ()),
            *self._each_output(),
            output,
        )

    def _each_output(self) -> list[str]:
        """Return a line that names the outputs and their SQNR, worst first, where there are several."""
        if len(self.outputs) <= 1:
            return []
        told = [f"{row.name} {_decibels(row.sqnr_db) or 'not compared'}" for row in self.outputs[:_SHOWN_OUTPUTS]]
        more = [f"… and {len(self.outputs) - len(told)} more: .outputs"] if len(self.outputs) > len(told) else []
        return [f"outputs, SQNR: {', '.join([*told, *more])}"]

    def figure(self) -> str:
        """Return the SVG drawing of plot."""
        bars = [Bar(site_name(row), row.sqnr_db, row.local_sqnr_db) for row in self.rows]
        return bar_chart("SQNR of each site, dB: as it runs, and local", ("as it runs", "local"), bars, _decibels)

    def plot(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return an SVG drawing, bars of each site's SQNR as it runs and local; write it where a path is given."""
        return write(path, self.figure())


class _Activation:
    """Running range and peak of one input."""

    def __init__(self) -> None:
        self.low, self.high, self.peaks, self.energy = math.inf, -math.inf, 0.0, 0.0

    def add(self, x: torch.Tensor) -> None:
        """Count another tensor's rows; those with a NaN or an infinity are left out."""
        rows = wide(x).reshape(-1, x.shape[-1] if x.dim() else 1)
        if not math.isfinite(energy(rows)):
            rows = rows[rows.isfinite().all(-1)]
        if rows.numel():
            low, high = rows.aminmax()
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
            self.peaks += rows.shape[-1] * energy(rows.abs().amax(-1))
            self.energy += energy(rows)

    @property
    def range(self) -> tuple[float, float]:
        return (self.low, self.high) if self.low <= self.high else (math.nan, math.nan)

    @property
    def peak(self) -> float:
        return math.sqrt(self.peaks / self.energy) if self.energy else math.nan


class _Watch:
    """What is seen of one site while both models run."""

    def __init__(self, site: Site, float_site: nn.Module, quantized_site: nn.Module) -> None:
        self.site, self.quantized_site, self.unpaired = site, quantized_site, 0
        self.accumulated, self.local, self.activation = Error(), Error(), _Activation()
        self.waiting: collections.deque[torch.Tensor] = collections.deque()  # float outputs of this batch
        # Before the user's own hooks, which may change what the site gave:
        float_site.register_forward_hook(self.see_float, prepend=True, with_kwargs=True)
        quantized_site.register_forward_hook(self.see_quantized, prepend=True)

    def see_float(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Compare the sites on the same inputs, and keep what the float one gave until the quantized model ran."""
        x, expected = first_tensor((args, kwargs)), first_tensor(output)
        if x is not None and x.is_floating_point():
            self.activation.add(x)
        got = first_tensor(self.quantized_site.forward(*args, **kwargs))
        if expected is not None and got is not None:
            self.local.add(expected, got)
            self.waiting.append(expected.detach().clone())  # forward may go on to write into it

    def see_quantized(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Compare with what the float model gave at the same call."""
        got = first_tensor(output)
        expected = self.waiting.popleft() if self.waiting else None
        if expected is None or got is None or expected.shape != got.shape:
            self.unpaired += 1
        else:
            self.accumulated.add(expected, got)

    def end_batch(self) -> None:
        """Forget what had no counterpart."""
        self.unpaired += len(self.waiting)
        self.waiting.clear()

    def row(self) -> CompareRow:
        """Return the sums so far."""
        low, high = self.activation.range
        return CompareRow(
            path=self.site.path,
            call=self.site.call or "",
            kind=self.site.kind,
            operator=self.site.operator,
            calls=self.accumulated.calls,
            unpaired=self.unpaired,
            sqnr_db=self.accumulated.sqnr_db,
            relative_rms=self.accumulated.relative_rms,
            max_error=self.accumulated.max_error,
            local_sqnr_db=self.local.sqnr_db,
            local_relative_rms=self.local.relative_rms,
            local_max_error=self.local.max_error,
            input_min=low,
            input_max=high,
            peak=self.activation.peak,
        )


class _Outputs:
    """What is seen of the models' outputs."""

    def __init__(self) -> None:
        self._errors: dict[str, Error] = {}

    def add(self, expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> None:
        """Count another batch's floats. One that the other model lacks, or has in another shape, is not compared."""
        for name, tensor in expected.items():
            found = got.get(name)
            if tensor.numel():
                error = self._errors.setdefault(name, Error())
                if found is not None and found.shape == tensor.shape:
                    error.add(tensor, found)

    def rows(self) -> tuple[OutputRow, ...]:
        """Return each output's error, worst first; raise ExampleInputsError where none holds a float."""
        if not self._errors:
            raise ExampleInputsError(f"compare: {NO_FLOATS}")
        rows = [
            OutputRow(
                name=name,
                batches=error.calls,
                sqnr_db=error.sqnr_db,
                relative_rms=error.relative_rms,
                max_error=error.max_error,
            )
            for name, error in self._errors.items()
        ]
        return tuple(sorted(rows, key=lambda row: (math.isnan(row.sqnr_db), row.sqnr_db)))

    def worst(self) -> Error:
        """Return the error of the output that came off worst; one that is 0 throughout says little, and comes last."""
        compared = (error for error in self._errors.values() if error.known)
        return min(compared, key=lambda error: (not error.signal, error.sqnr_db), default=Error())


def compare(
    float_model: nn.Module, quantized: nn.Module, data: Iterable[Any], *, progress: Progress = iter
) -> Comparison:
    """Return every site's error on some data: accumulated, as it runs, and local, fed with float inputs.

    quantized: the result of convert_fx, quantize_dynamic or load; float_model: what it was made from.
    data: an iterable of batches, each a tuple of one call's positional arguments, a dict of keywords, or one tensor;
    it is gone through once, and of a batch only sums are kept. progress: what to wrap it in, `tqdm` for a bar.

    Of a site that gives several tensors (an LSTM's states, attention's weights), the first is compared; of the model's
    outputs all whose values are floats, in tuples, dicts, dataclasses and the like. A fused site is compared with the
    fused float computation. Both models run as mirrors: neither is changed or hooked.

    Raises ModelStateError for models that do not belong together, ExampleInputsError for a batch that does not fit
    forward, for no batch at all, or where no output is floating-point (class indices alone).
    """
    record = need_stage(quantized, "quantized", "compare", "convert_fx(prepared) or quantize_dynamic(model)")
    ours, theirs = open_quantized(quantized, record), open_float(float_model, record)
    watches = list(map(_Watch, record.sites, theirs.sites, ours.sites))
    outputs, batches = _Outputs(), 0
    for arguments in each_batch(data, ours.model, progress):
        expected, got = (run(side.model, arguments, seed=batches) for side in (theirs, ours))
        batches += 1
        for watch in watches:
            watch.end_batch()
        outputs.add(named_floats(expected), named_floats(got))
    rows, worst = outputs.rows(), outputs.worst()
    comparison = Comparison(
        rows=tuple(watch.row() for watch in watches),
        batches=batches,
        output_sqnr_db=worst.sqnr_db,
        output_relative_rms=worst.relative_rms,
        output_max_error=worst.max_error,
        outputs=rows,
    )
    return comparison.sort("sqnr_db")
