"""A model whose sites can be swapped one by one, each for any of its quantized forms, and a metric of what comes of it.

The float model is laid open once (see `sites`). A metric of the user's is asked about the whole model. The default one,
the error of the outputs, needs no more of a traced model than the nodes that follow what was swapped (see `replay`).
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxquant.debug.measure.replay import Replay, callers
from fxquant.debug.measure.sites import open_float, open_in_place, open_quantized
from fxquant.debug.report.table import site_name
from fxquant.errors import ArgumentError, CheckpointError, ExampleInputsError, ModelStateError
from fxquant.graph import edit
from fxquant.graph.calibrate import Moments, gather, profits
from fxquant.graph.call import as_arguments, check_data, run
from fxquant.graph.outputs import named_floats
from fxquant.graph.record import keep_record, need_stage
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.quantize_fx import convert_fx, convert_with, prepare_fx

Metric = Callable[[nn.Module], float]
Progress = Callable[[Iterable[Any]], Iterable[Any]]
Forms = Mapping[int, nn.Module]
"""What stands in the place of each site, by its number; of those that are missing, the float one."""

_CHUNK = 2**15
"""How many values are compared at once, in float64: as many as stay in a core's cache."""

NO_FLOATS = (
    "the model's outputs hold no tensor to compare, none whose values are floats (class indices say nothing of an "
    "error); let forward return its scores too"
)
"""What is told of a model whose outputs cannot be judged."""

_FINE = frozenset({"float", "float16", "int16"})
"""Schemes that lose next to nothing."""

Floats = Mapping[str, torch.Tensor]
"""The floats of an output, by their paths."""


class Variant(NamedTuple):
    """A model to be measured. base: one that it differs little from; many variants should share it."""

    forms: Forms
    base: Forms


class _Pass(NamedTuple):
    """A base's pass over one batch. wanted: the floats of the float model's output."""

    number: int
    base: Forms
    replay: Replay
    wanted: Floats


def need_number(start: float) -> None:
    """Raise ModelStateError where the metric of the float model is NaN."""
    if math.isnan(start):
        raise ModelStateError(
            "the metric of the float model is NaN, so that nothing can be measured against it; look for NaN in the "
            "model's weights, the data and the metric"
        )


def need_information(start: float, tried: Iterable[float], schemes: Iterable[str]) -> None:
    """Raise ArgumentError where a metric of the user's is 0 or NaN for the float model and all that was tried.

    schemes: that were tried. Those that lose next to nothing may well leave a metric at 0.
    """
    values = list(tried)
    is_nan = all(map(math.isnan, values))
    is_zero = not any(value for value in (start, *values) if not math.isnan(value))
    if values and (is_nan or (is_zero and not _FINE.issuperset(schemes))):
        raise ArgumentError(
            f"metric gives 0 or NaN for all {len(values)} quantized models that were tried, so that it tells none from "
            "another; let it count something that the model gives (is its data empty?), or leave it out"
        )


def _number(value: Any) -> float:
    """Return what a metric gave as a float, or raise ArgumentError."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"metric is a function of a model that gives a number, but it gave {type(value).__name__}: {error}"
        ) from error


class Trial:
    """A float model laid open, what a mapping makes of its sites, and a metric.

    Memory: with the default metric, one batch's values of all nodes; from the first whole pass on, also the float
    outputs of all batches.
    """

    def __init__(self, model: nn.Module, mapping: QConfigMapping, data: Iterable[Any], metric: Metric | None) -> None:
        if metric is not None and not callable(metric):
            raise ArgumentError(f"metric is a function of a model that gives a number, got {metric!r}")
        check_data(data)
        given = list(data)
        self.batches = [as_arguments(batch, model) for batch in given]
        if not self.batches:
            raise ExampleInputsError("data held no batch; was it a generator that had been used up?")
        self.first_batch = given[0]
        self._given = given
        self._moments: Moments | None = None
        self.prepared = self._prepare(model, mapping)
        self.quantized = convert_fx(self.prepared, check=False)
        self.record = need_stage(self.quantized, "quantized", "sensitivity", "a mapping that quantizes something")
        if not self.record.sites:
            raise ModelStateError("the mapping quantizes nothing of this model: there is nothing to try")
        self._float = open_float(model, self.record)
        opened = open_quantized(self.quantized, self.record)
        self.forms = dict(enumerate(opened.sites))
        own = {edit.identity(tensor) for site in opened.sites for tensor in _tensors(site).values()}
        others = {name: tensor for name, tensor in _tensors(opened.model).items() if edit.identity(tensor) not in own}
        self._other_sizes = _sizes(
            tensor if (shared := edit.get_tensor(self._float.model, name)) is None else shared  # by some site, maybe
            for name, tensor in others.items()
        )
        self._metric = metric
        is_pure = metric is None and not self.record.untraced  # such a module's own code may keep state
        self._callers = callers(self._float.model, self._float.sites) if is_pure else None
        self._kept: _Pass | None = None

    @property
    def is_default(self) -> bool:
        """Whether the metric is the default one, the relative RMS error of the outputs."""
        return self._metric is None

    def float_site(self, number: int) -> nn.Module | None:
        """Return a site's float module, None for a call."""
        return None if self.record.sites[number].call is not None else self._float.sites[number]

    def weights(self, number: int, name: str = "") -> tuple[torch.Tensor, ...]:
        """Return a site's float weights, or the one of a name: its parameters of two or more dimensions."""
        site = self.record.sites[number]
        if site.call is not None:
            held = {"": edit.get_tensor(self._float.model, site.path)}
        else:
            held = dict(self._float.sites[number].named_parameters(remove_duplicate=False))
        given = held.values() if not name else [held.get(name)]
        return tuple(tensor for tensor in given if tensor is not None and tensor.dim() > 1)

    @property
    def is_partial(self) -> bool:
        """Whether the metric needs no more than what follows a site, as far as is known."""
        return self._callers is not None

    def convert(self, model: nn.Module, mapping: QConfigMapping) -> nn.Module:
        """Return the model quantized as a mapping says, prepared with the first batch."""
        return convert_with(self._prepare(model, mapping), self._moments)

    def watch(self, qconfigs: Iterable[tuple[int, QConfig]]) -> None:
        """Let int4 weights be rounded with GPTQ from the data from now on, where these qconfigs make some.

        qconfigs: all that the sites, by number, will be tried with.
        """
        sites = [replace(self.record.sites[i], qconfig=qconfig) for i, qconfig in qconfigs]
        if any(profits(own) for site in sites for own in (site.qconfig, *dict(site.qconfig.parts).values()) if own):
            self._moments = gather(self.prepared, sites, self._given)

    def convert_sites(self, qconfigs: Mapping[int, QConfig]) -> nn.Module:
        """Return the model with some sites quantized, by number, as these qconfigs say."""
        record = need_stage(self.prepared, "prepared", "convert_sites", "prepare_fx")
        sites = tuple(replace(record.sites[i], qconfig=qconfigs[i]) for i in sorted(qconfigs))
        return convert_with(keep_record(edit.mirror(self.prepared), record.advance(sites=sites)), self._moments)

    def make_forms(self, qconfigs: Mapping[int, QConfig]) -> dict[int, nn.Module]:
        """Return some sites' forms, by number, under these qconfigs; of a tied weight they hold one."""
        model = self.convert_sites(qconfigs)
        opened = open_in_place(model, need_stage(model, "quantized", "make_forms", "convert_fx"))
        forms = dict(zip(sorted(qconfigs), opened.sites, strict=True))
        for i, form in forms.items():
            for weight in (name for name, own in qconfigs[i].parts if own is None):
                for tensor in self.weights(i, weight):
                    if tensor.dtype == torch.float32:  # convert made a copy, which would be tied to nothing
                        form._buffers[weight] = tensor.detach()
        return forms

    def bytes_with(self, forms: Forms) -> int:
        """Return what the model takes with these forms: each tensor once, and none that no site reads any more."""
        sizes = dict(self._other_sizes)
        for i, site in enumerate(self._float.sites):
            call = () if i in forms else self.weights(i)  # those of a call may stand outside of it, transposed
            sizes.update(_sizes((*_tensors(forms.get(i, site)).values(), *call)))
        return sum(sizes.values())

    def _prepare(self, model: nn.Module, mapping: QConfigMapping) -> nn.Module:
        args, kwargs = self.batches[0]
        return prepare_fx(model, mapping, args, example_kwargs=kwargs)

    def measure(self, forms: Forms) -> float:
        """Return the metric with some sites swapped, by a whole pass."""
        if self.is_default:
            _ = self._float_outputs  # while the model is float
        with self._swapped(forms) as root:
            return self.metric_of(root)

    def metric_of(self, model: nn.Module) -> float:
        """Return the metric of a whole model."""
        with torch.no_grad():
            if self._metric is not None:
                return _number(self._metric(model))
            return _relative(
                _error(run(model, batch, seed), wanted)
                for seed, (batch, wanted) in enumerate(zip(self.batches, self._float_outputs, strict=True))
            )

    def ends(self) -> list[float]:
        """Return what tells this model, metric and data from others: the metric of the float and the quantized model.

        The default metric needs more than float's, which is always 0: Σ y² of each batch's float outputs instead.
        """
        if self._metric is not None:
            return [self.measure({}), self.measure(self.forms)]
        with torch.no_grad():
            outputs = (named_floats(run(self._float.model, batch, seed)) for seed, batch in enumerate(self.batches))
            return [sum(_error(output, output)[1::2]) for output in outputs]

    def measure_all(
        self, variants: Mapping[str, Variant], notes: Notes | None = None, progress: Progress = iter
    ) -> dict[str, float]:
        """Return the metric of each variant, to the bit what `measure` gives. notes: what is measured already.

        progress: wraps the variants, or where partial passes will do, the pairs of a batch and a variant.
        """
        notes = notes or Notes(None, self)
        if self.is_partial:
            try:
                return self._measure_in_parts(variants, notes, progress)
            except _InexactError:
                self._callers = None
        whole = {}
        for key in progress(list(variants)):
            (whole[key],) = notes.ask(key, lambda forms=variants[key].forms: (self.measure(forms),))  # type: ignore[misc]
        return whole

    def _measure_in_parts(self, variants: Mapping[str, Variant], notes: Notes, progress: Progress) -> dict[str, float]:
        """Return the default metric of each variant by partial passes, batch by batch."""
        errors: dict[str, list[tuple[float, ...]]] = {key: [] for key in variants}
        for number, key in progress([(number, key) for number in range(len(self.batches)) for key in variants]):
            measure = functools.partial(self._part_error, number, variants[key])
            errors[key].append(notes.ask(f"{key}, batch {number}", measure))
        self._kept = None
        return {key: _relative(found) for key, found in errors.items()}

    def _part_error(self, number: int, variant: Variant) -> tuple[float, ...]:
        """Return the squared error of each of a variant's outputs on one batch, and the output's own square."""
        kept = self._pass_over(number, variant.base)
        swapped = [i for i in {**variant.base, **variant.forms} if variant.base.get(i) is not variant.forms.get(i)]
        assert self._callers is not None
        with self._swapped(variant.forms):
            got = kept.replay.output_with(set().union(*(self._callers[i] for i in swapped)))
        return _error(got, kept.wanted)

    def _pass_over(self, number: int, base: Forms) -> _Pass:
        """Return a base's pass over one batch; the last one is kept, as variants come by batch and base."""
        kept = self._kept
        if kept is None or kept.number != number or kept.base is not base:
            wanted = kept.wanted if kept is not None and kept.number == number else None
            self._kept = kept = None  # its values go before the next ones come
            batch = self.batches[number]
            if base and wanted is None:
                wanted = named_floats(run(self._float.model, batch, number))
            with self._swapped(base) as root:
                assert isinstance(root, fx.GraphModule)
                replay = Replay(root, batch, number)
            if not replay.is_exact:
                raise _InexactError
            if not base or wanted is None:
                wanted = named_floats(replay.output)
            self._kept = kept = _Pass(number, base, replay, wanted)
        return kept

    @contextmanager
    def _swapped(self, forms: Forms) -> Iterator[nn.Module]:
        """Let the float model have these forms for a while; gives its root, which may be one of them."""
        sites = self._float.sites
        root = _swap(self._float.model, {id(sites[i]): form for i, form in forms.items()})
        try:
            yield root
        finally:
            _swap(root, {id(form): sites[i] for i, form in forms.items()})

    @functools.cached_property
    def _float_outputs(self) -> list[Floats]:
        """The float outputs of all batches."""
        return [named_floats(run(self._float.model, batch, seed)) for seed, batch in enumerate(self.batches)]


class _InexactError(Exception):
    """A graph draws random numbers or writes into its values, so that no part of it can be run by itself."""


def _swap(root: nn.Module, forms: Mapping[int, nn.Module]) -> nn.Module:
    """Put others in the place of some modules, by their ids, wherever these stand; return the root, perhaps one."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = forms.get(id(child), child)
    return forms.get(id(root), root)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers, by name, tied ones under each."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _sizes(tensors: Iterable[torch.Tensor]) -> dict[tuple[Any, ...], int]:
    """Return the bytes of some tensors, tied ones once."""
    return {edit.identity(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}


def _error(got: Any, wanted: Floats) -> tuple[float, ...]:
    """Return Σ (y - ŷ)² and Σ y² of one output after another whose values are floats, or raise ExampleInputsError."""
    found = named_floats(got)
    if not wanted:
        raise ExampleInputsError(f"{NO_FLOATS}, or pass a metric of your own")
    if not any(tensor.numel() for tensor in wanted.values()):
        raise ExampleInputsError(
            "the model's outputs are empty on a batch of data: there is no error to speak of; leave that batch out, or "
            "pass a metric of your own"
        )
    sums: list[float] = []
    for name, expected in wanted.items():
        if name not in found or found[name].shape != expected.shape:
            shape = tuple(found[name].shape) if name in found else "missing"
            raise ExampleInputsError(
                f"output {name!r} is {tuple(expected.shape)} in float and {shape} with some sites quantized: it "
                "depends on the values, so that there is no tensor to compare; pass a metric of your own"
            )
        sums += _square_error(found[name].reshape(-1), expected.reshape(-1))
    return tuple(sums)


def _square_error(got: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return Σ (y - ŷ)² and Σ y² over the values that are finite in float; NaN where none of them is."""
    noise = signal = 0.0
    for ours, theirs in zip(torch.split(got, _CHUNK), torch.split(expected, _CHUNK), strict=True):
        y, x = ours.double(), theirs.double()
        square = float(x.square().sum())
        if not math.isfinite(square):  # masked logits are -inf
            known = x.isfinite()
            y, x = y[known], x[known]
            square = float(x.square().sum()) if len(x) else math.nan
        noise += float((y - x).square().sum())
        signal += square
    return noise, signal


def _relative(errors: Iterable[tuple[float, ...]]) -> float:
    """Return √(Σ noise / Σ signal), of batches, of the output that came off worst.

    One that is 0 in all batches has no relative error, and counts only where all are: then this is √Σ noise.
    """
    sums: list[float] = []
    for batch in errors:
        sums = [a + b for a, b in itertools.zip_longest(sums, batch, fillvalue=0.0)]
    pairs = list(zip(sums[::2], sums[1::2], strict=True))
    if not any(signal for _, signal in pairs):
        return math.sqrt(sum(noise for noise, _ in pairs))
    squares = [noise / signal for noise, signal in pairs if signal]
    return math.nan if any(map(math.isnan, squares)) else math.sqrt(max(squares))


def _is_same(end: float, other: float) -> bool:
    """Return whether two measured values are one but for float rounding, as by another number of threads."""
    return math.isclose(end, other, rel_tol=1e-4, abs_tol=1e-9) or (math.isnan(end) and math.isnan(other))


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values[:3]) + (", …" if len(values) > 3 else "")


class Notes:
    """Measured values, kept in a file as they come, so that an interrupted run goes on where it stopped.

    The file's first line names the sites and their qconfigs, and says what the model's ends come to (`Trial.ends`), by
    which a run is known again; each further line is one value's name and numbers, so that a line is all that a crash
    can cost.
    """

    def __init__(self, path: str | os.PathLike[str] | None, trial: Trial) -> None:
        self._path = None if path is None else Path(path)
        self._values: dict[str, tuple[float, ...]] = {}
        if self._path is None:
            return
        sites = [f"{site_name(site)}, {site.float_bytes} bytes: {site.qconfig}" for site in trial.record.sites]
        ends = trial.ends()
        about = {"sites": sites, "batches": len(trial.batches), "ends": ends}
        if not trial.is_default:
            self._values = {"float": (ends[0],), "quantized": (ends[1],)}
        try:
            if not self._path.exists():
                self._path.write_text(json.dumps(about) + "\n", encoding="utf-8")
                return
        except OSError as error:
            told = f"resume={str(path)!r} cannot be written: {error.strerror}"
            raise ArgumentError(f"{told}; give a file in a folder that is there") from error
        whole, _, torn = self._path.read_text(encoding="utf-8").rpartition("\n")
        try:
            kept, *values = map(json.loads, whole.split("\n"))
            self._values.update((str(key), tuple(map(float, numbers))) for key, numbers in values)
            is_ours = set(kept) == set(about)
            known = [float(end) for end in kept["ends"]] if is_ours else []
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self._path} is no file of sensitivity's; remove it to begin anew") from error
        if not is_ours:
            raise CheckpointError(f"{self._path} is no file of sensitivity's; remove it to begin anew")
        if {**kept, "ends": 0} != {**about, "ends": 0}:
            raise CheckpointError(f"{self._path} was kept for another model, mapping or data; remove it to begin anew")
        if len(known) != len(ends) or not all(map(_is_same, known, ends)):
            what = "Σ y² of each batch's float output" if trial.is_default else "the metric, float and quantized,"
            raise CheckpointError(
                f"{self._path} was kept for another metric, data or weights: {what} was {_listed(known)}, now it is "
                f"{_listed(ends)}; remove it to begin anew"
            )
        if torn:
            self._path.write_text(whole + "\n", encoding="utf-8")

    def ask(self, key: str, measure: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
        """Return the values that are kept, or measure them."""
        if key not in self._values:
            self._values[key] = measure()
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, self._values[key]]) + "\n")
        return self._values[key]
