"""compare: what quantization costs in accuracy, site by site.

For a site's float output y and quantized output ŷ, over all calls and elements:

    SQNR = 10 log10(Σ y² / Σ (y - ŷ)²) dB      relative RMS = √(Σ (y - ŷ)² / Σ y²)      max error = max |y - ŷ|

"accumulated": the quantized site runs on the quantized model's values, which carry the errors of all sites before it.
"local": it runs on the float model's values, so this is the error of the site alone.

peak says how far the largest values of the float site's input stick out, over its tokens x_t of K values:

    peak = √(Σ_t K max_k x_tk² / Σ_t Σ_k x_tk²)      1 if all values have one magnitude; √K if only one is not 0

A token is quantized in 255 steps, and its largest values set their size: twice the peak costs 6 dB.
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

from fxquant.debug.measure.activation import Activation
from fxquant.debug.measure.metric import NO_FLOATS
from fxquant.debug.measure.sites import OpenModel, first_tensor, open_float, open_quantized
from fxquant.debug.measure.static import End
from fxquant.debug.measure.values import ValueRow, watch_values
from fxquant.debug.report.charts import Bar, bar_chart
from fxquant.debug.report.page import write
from fxquant.debug.report.report import Column, Report
from fxquant.debug.report.table import decibels, first_few, site_fields, site_name
from fxquant.errors import ExampleInputsError
from fxquant.graph.call import each_batch, run
from fxquant.graph.outputs import Error, named_floats
from fxquant.graph.record import Site, need_stage
from fxquant.progress import Progress

_SHOWN_OUTPUTS = 8


@dataclass(frozen=True, kw_only=True)
class CompareRow:
    """One site's errors, by the equations above. NaN: it was never called, or its inputs are not floating-point.

    path, call, kind, operator: as in its Site. calls: how often it was compared. unpaired: calls in one model without
    one of the same shape in the other, as in code that branches on values.
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
    """One floating-point output's error. name: its path in forward's result, "" if that is one tensor.

    batches: those in which both models give it in the same shape, so that it was compared. Without any, or without a
    finite value in float, the errors are NaN.
    """

    name: str
    batches: int
    sqnr_db: float
    relative_rms: float
    max_error: float


def _figures(error: Error, prefix: str = "") -> dict[str, Any]:
    """Return an error's figures as fields, whose names begin with a prefix."""
    return {f"{prefix}{name}": getattr(error, name) for name in ("sqnr_db", "relative_rms", "max_error")}


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _range(row: CompareRow) -> str:
    return "" if math.isnan(row.input_min) else f"{row.input_min:.3g} … {row.input_max:.3g}"


@dataclass(frozen=True, kw_only=True)
class Comparison(Report):
    """Every site's error, worst first: print it, show it in a notebook, sort it, or read its lines.

    batches: how many were run. outputs: the errors of the floating-point outputs; output_sqnr_db, output_relative_rms,
    output_max_error: of the worst one. values: those of the integer values between a static model's sites, worst first.
    """

    rows: tuple[CompareRow, ...]
    batches: int
    output_sqnr_db: float
    output_relative_rms: float
    output_max_error: float
    outputs: tuple[OutputRow, ...] = ()
    values: tuple[ValueRow, ...] = ()

    title: ClassVar[str] = "Comparison: the error of each site"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("site", "path", 24, site_name, is_number=False, is_name=True),
        Column("was", "kind", 12, lambda row: row.kind, is_number=False, is_name=True),
        Column("SQNR", "sqnr_db", 8, lambda row: decibels(row.sqnr_db)),
        Column("local", "local_sqnr_db", 8, lambda row: decibels(row.local_sqnr_db)),
        Column("RMS", "relative_rms", 7, lambda row: _number(100 * row.relative_rms) and f"{row.relative_rms:.2%}"),
        Column("max", "max_error", 8, lambda row: _number(row.max_error)),
        Column("input", "input_max", 14, _range),
        Column("peak", "peak", 5, lambda row: _number(row.peak)),
    )

    @property
    def footer(self) -> tuple[str, ...]:
        """The lines under the table: what the columns mean, and the outputs' errors."""
        missed = [site_name(row) for row in self.rows if not row.calls]
        apart = [f"{site_name(row)}: {row.unpaired}" for row in self.rows if row.unpaired]
        each = [f"{row.name} {decibels(row.sqnr_db) or 'not compared'}" for row in self.outputs]
        values = [f"{row.name} {decibels(row.sqnr_db) or 'not compared'}" for row in self.values]
        return (
            "SQNR, RMS (relative) and max (absolute) error as it runs; local: SQNR of the site alone, on float inputs",
            "input: the range of these; peak: how far a token's largest value sticks out, 1 if all have one magnitude",
            *([f"never called: {', '.join(missed)}"] if missed else ()),
            *([f"calls without a counterpart in the other model: {', '.join(apart)}"] if apart else ()),
            *([f"values, SQNR: {', '.join(first_few(values, _SHOWN_OUTPUTS, 'values'))}"] if values else ()),
            *([f"outputs, SQNR: {', '.join(first_few(each, _SHOWN_OUTPUTS, 'outputs'))}"] if len(each) > 1 else ()),
            f"{self._worst_output()}; {self.batches} batch{'es' if self.batches != 1 else ''}",
        )

    def _worst_output(self) -> str:
        """Return the output's error, or why there is none."""
        name = "output" if len(self.outputs) <= 1 else f"the worst of {len(self.outputs)} outputs"
        if not math.isnan(self.output_max_error):
            figures = f"relative RMS {self.output_relative_rms:.2%}, max error {_number(self.output_max_error)}"
            return f"{name}: SQNR {decibels(self.output_sqnr_db)}, {figures}"
        if any(row.batches for row in self.outputs):
            return f"{name}: not compared, the float model gives only NaN and infinities"
        return f"{name}: not compared, it has other shapes in the quantized model"

    def figure(self) -> str:
        """Return the SVG drawing of plot."""
        bars = [Bar(site_name(row), row.sqnr_db, row.local_sqnr_db) for row in self.rows]
        return bar_chart("SQNR of each site, dB: as it runs, and local", ("as it runs", "local"), bars, decibels)

    def plot(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return an SVG drawing with bars for each site's SQNR, as it runs and local. path: where to write it."""
        return write(path, self.figure())


class _Watch:
    """Watches one site while both models run."""

    def __init__(self, number: int, site: Site, theirs: OpenModel, ours: OpenModel) -> None:
        self.site, self.form, self.unpaired = site, ours.form(number), 0
        self.accumulated, self.local, self.activation = Error(), Error(), Activation()
        self.waiting: collections.deque[torch.Tensor] = collections.deque()  # float outputs of this batch
        # Ahead of the user's own hooks, which may change the site's output:
        theirs.sites[number].register_forward_hook(self.see_float, prepend=True, with_kwargs=True)
        for end in theirs.ends_of(number):
            end.register_forward_hook(self.see_end, prepend=True)
        for end in ours.ends_of(number):
            end.register_forward_hook(self.see_quantized, prepend=True)

    def see_float(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Compare the sites on the same inputs."""
        x, expected = first_tensor((args, kwargs)), first_tensor(output)
        if x is not None and x.is_floating_point():
            self.activation.add(x)
        got = first_tensor(self.form.forward(*args, **kwargs))
        if expected is not None and got is not None:
            self.local.add(expected, got)

    def see_end(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Keep the float output until the quantized model has run: copied, for forward may go on to write into it."""
        if (expected := first_tensor(output)) is not None:
            self.waiting.append(expected.detach().clone())

    def see_quantized(self, end: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        """Compare with the float model's output of the same call."""
        got = end.real(output) if isinstance(end, End) else first_tensor(output)
        expected = self.waiting.popleft() if self.waiting else None
        if expected is None or got is None or expected.shape != got.shape:
            self.unpaired += 1
        else:
            self.accumulated.add(expected, got)

    def end_batch(self) -> None:
        """Drop the float outputs without a counterpart."""
        self.unpaired += len(self.waiting)
        self.waiting.clear()

    def row(self) -> CompareRow:
        """Return the sums so far."""
        low, high = self.activation.range
        return CompareRow(
            **site_fields(self.site),
            calls=self.accumulated.calls,
            unpaired=self.unpaired,
            **_figures(self.accumulated),
            **_figures(self.local, "local_"),
            input_min=low,
            input_max=high,
            peak=self.activation.peak,
        )


class _Outputs:
    """The errors of the models' outputs, by their names."""

    def __init__(self) -> None:
        self._errors: dict[str, Error] = {}

    def add(self, expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> None:
        """Count another batch's outputs. One that the other model lacks, or has in another shape, is not compared."""
        for name, tensor in expected.items():
            if tensor.numel():
                error = self._errors.setdefault(name, Error())
                if name in got and got[name].shape == tensor.shape:
                    error.add(tensor, got[name])

    def rows(self) -> tuple[OutputRow, ...]:
        """Return each output's error, worst first; raise ExampleInputsError if none is floating-point."""
        if not self._errors:
            raise ExampleInputsError(f"compare: {NO_FLOATS}")
        rows = [OutputRow(name=n, batches=error.calls, **_figures(error)) for n, error in self._errors.items()]
        return tuple(sorted(rows, key=lambda row: (math.isnan(row.sqnr_db), row.sqnr_db)))

    def worst(self) -> Error:
        """Return the error of the worst output. An output that is 0 throughout says little, and comes last."""
        compared = (error for error in self._errors.values() if error.known)
        return min(compared, key=lambda error: (not error.signal, error.sqnr_db), default=Error())


def compare(
    float_model: nn.Module, quantized: nn.Module, data: Iterable[Any], *, progress: Progress = iter
) -> Comparison:
    """Return every site's error on some data: accumulated, as it runs, and local, on the float model's inputs.

    quantized: the result of convert_fx, quantize_dynamic or load; float_model: what it was made from.
    data: an iterable of batches, each a tuple of one call's positional arguments, a dict of keywords, or one tensor.
    It is read once, and only sums are kept. progress: wraps the batches, such as `tqdm` for a bar.

    If a site gives several tensors (an LSTM's states, attention's weights), the first is compared. Of the model's
    outputs all floating-point ones are, in tuples, dicts, dataclasses and the like. A fused site is compared with the
    fused float computation. Both models run as mirrors: neither is changed or hooked.

    Raises ModelStateError for models that do not belong together, ExampleInputsError for a batch that does not fit
    forward, for no batch at all, or if no output is floating-point (class indices alone).
    """
    record = need_stage(quantized, "quantized", "compare", "convert_fx(prepared) or quantize_dynamic(model)")
    ours, theirs = open_quantized(quantized, record), open_float(float_model, record)
    watches = [_Watch(number, site, theirs, ours) for number, site in enumerate(record.sites)]
    values = watch_values(theirs.model, ours.model, record)
    outputs, batches = _Outputs(), 0
    for arguments in each_batch(data, ours.model, progress):
        expected, got = (run(side.model, arguments, seed=batches) for side in (theirs, ours))
        batches += 1
        for watch in watches:
            watch.end_batch()
        for value in values:
            value.end_batch()
        outputs.add(named_floats(expected), named_floats(got))
    comparison = Comparison(
        rows=tuple(watch.row() for watch in watches),
        batches=batches,
        outputs=outputs.rows(),
        values=tuple(sorted((value.row() for value in values), key=lambda row: (math.isnan(row.sqnr_db), row.sqnr_db))),
        **_figures(outputs.worst(), "output_"),
    )
    return comparison.sort("sqnr_db")
