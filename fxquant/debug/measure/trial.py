"""A model whose sites can be swapped one by one, each for any of its quantized forms, and a metric of the result.

The float model is opened up once (see `sites`). A user's metric is called with the whole model. The default one, the
error of the outputs, needs only the nodes of a traced model that follow what was swapped (see `replay`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxquant.debug.measure.metric import Floats, Metric, call_metric, relative_rms, squared_errors
from fxquant.debug.measure.replay import InexactError, PartialPasses, Variant, partial_passes
from fxquant.debug.measure.sites import Forms, OpenModel, open_float, open_in_place, open_quantized
from fxquant.errors import ArgumentError, ModelStateError
from fxquant.graph import edit
from fxquant.graph.calibrate import Hessians, gather, uses_gptq
from fxquant.graph.call import check_data, each_batch, run
from fxquant.graph.outputs import named_floats
from fxquant.graph.record import keep_record, need_stage, record_of
from fxquant.progress import Progress
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.quantize_fx import convert_fx, convert_with, prepare_fx

Ask = Callable[[str, Callable[[], tuple[float, ...]]], tuple[float, ...]]
"""Gives the values of a name: known ones, or what the function measures."""


class Trial:
    """A float model opened up, the quantized forms that a mapping gives its sites, and a metric.

    Memory: with the default metric, one batch's values of all nodes; from the first whole pass on, also the float
    outputs of all batches.
    """

    def __init__(self, model: nn.Module, mapping: QConfigMapping, data: Iterable[Any], metric: Metric | None) -> None:
        if metric is not None and not callable(metric):
            raise ArgumentError(f"metric is a function of a model that gives a number, got {metric!r}")
        check_data(data)
        self.data, self._metric = list(data), metric
        self.batches = list(each_batch(self.data, model))
        self._hessians: Hessians | None = None
        self.prepared = self.prepare(model, mapping)
        self.quantized = self._calibrated(self.prepared)
        self.record = need_stage(self.quantized, "quantized", "sensitivity", "a mapping that quantizes something")
        if not self.record.sites:
            raise ModelStateError("the mapping quantizes nothing of this model: there is nothing to try")
        self._float = open_float(model, self.record)
        opened = open_quantized(self.quantized, self.record)
        self.forms: Forms = {number: opened.form(number) for number in range(len(opened.sites))}
        self._other_sizes = self._sizes_outside(opened)
        is_pure = metric is None and not self.record.untraced  # the code of an untraced module may keep state
        self._partial: PartialPasses | None = partial_passes(self._float, self.batches) if is_pure else None

    @property
    def is_static(self) -> bool:
        """Whether any site is static."""
        return any(site.is_static for site in self.record.sites)

    @property
    def is_default(self) -> bool:
        """Whether the metric is the default one, the relative RMS error of the outputs."""
        return self._metric is None

    @property
    def is_partial(self) -> bool:
        """Whether the metric needs no more than what follows a site, as far as is known."""
        return self._partial is not None

    def float_site(self, number: int) -> nn.Module | None:
        """Return a site's float module, None for a call."""
        return None if self.record.sites[number].call is not None else self._float.sites[number]

    def weights(self, number: int, name: str = "") -> tuple[torch.Tensor, ...]:
        """Return a site's float weights (its parameters of two or more dimensions), or only the named one."""
        site = self.record.sites[number]
        if site.call is not None:
            named = {"": edit.get_tensor(self._float.model, site.path)}
        else:
            named = dict(self._float.sites[number].named_parameters(remove_duplicate=False))
        chosen = named.values() if not name else [named.get(name)]
        return tuple(tensor for tensor in chosen if tensor is not None and tensor.dim() > 1)

    def convert(self, model: nn.Module, mapping: QConfigMapping) -> nn.Module:
        """Return the model quantized with a mapping, prepared with the first batch."""
        return convert_with(self.prepare(model, mapping), self._hessians)

    def calibrate(self, model: nn.Module, mapping: QConfigMapping) -> nn.Module:
        """Return the model quantized with a mapping and calibrated on all batches."""
        return self._calibrated(self.prepare(model, mapping))

    def _calibrated(self, prepared: nn.Module) -> nn.Module:
        is_static = any(site.is_static for site in record_of(prepared).sites)  # type: ignore[union-attr]
        return convert_fx(prepared, data=self.data if is_static else None, check=False)

    def watch(self, qconfigs: Iterable[tuple[int, QConfig]]) -> None:
        """Round weights by GPTQ with the inputs that they meet in data from now on, if any of these qconfigs uses that.

        qconfigs: all that the sites, by number, will be tried with.
        """
        sites = [replace(self.record.sites[i], qconfig=qconfig) for i, qconfig in qconfigs]
        parts = [part for site in sites for part in (site.qconfig, *dict(site.qconfig.parts).values()) if part]
        if any(map(uses_gptq, parts)):
            self._hessians = gather(self.prepared, sites, self.data)

    def convert_sites(self, qconfigs: Mapping[int, QConfig]) -> nn.Module:
        """Return the model with only some sites quantized, by number, under these qconfigs."""
        record = need_stage(self.prepared, "prepared", "convert_sites", "prepare_fx")
        sites = tuple(replace(record.sites[i], qconfig=qconfigs[i]) for i in sorted(qconfigs))
        return convert_with(keep_record(edit.mirror(self.prepared), record.advance(sites=sites)), self._hessians)

    def make_forms(self, qconfigs: Mapping[int, QConfig]) -> dict[int, nn.Module]:
        """Return the forms of some sites, by number, under these qconfigs. Those of a tied weight share one tensor."""
        model = self.convert_sites(qconfigs)
        opened = open_in_place(model, need_stage(model, "quantized", "make_forms", "convert_fx"))
        forms = dict(zip(sorted(qconfigs), opened.sites, strict=True))
        for i, form in forms.items():
            for weight in (name for name, qconfig in qconfigs[i].parts if qconfig is None):
                for tensor in self.weights(i, weight):
                    if tensor.dtype == torch.float32:  # convert made a copy, which would be tied to nothing
                        form._buffers[weight] = tensor.detach()
        return forms

    def bytes_with(self, forms: Forms) -> int:
        """Return the model's bytes with these forms: each tensor once, without those that no site reads any more."""
        sizes = dict(self._other_sizes)
        for i, site in enumerate(self._float.sites):
            call = () if i in forms else self.weights(i)  # a call's may also be kept outside of it, transposed
            sizes.update(edit.sizes((*_tensors(forms.get(i, site)).values(), *call)))
        return sum(sizes.values())

    def _sizes_outside(self, opened: OpenModel) -> dict[tuple[Any, ...], int]:
        """Return the bytes of the tensors that belong to no quantized site."""
        inside = {edit.identity(tensor) for site in opened.sites for tensor in _tensors(site).values()}
        others = {n: tensor for n, tensor in _tensors(opened.model).items() if edit.identity(tensor) not in inside}
        twins = {n: edit.get_tensor(self._float.model, n) for n in others}  # which a float site may share
        return edit.sizes(tensor if (twin := twins[n]) is None else twin for n, tensor in others.items())

    def prepare(self, model: nn.Module, mapping: QConfigMapping) -> nn.Module:
        """Return the model prepared with a mapping and the first batch."""
        args, kwargs = self.batches[0]
        return prepare_fx(model, mapping, args, example_kwargs=kwargs)

    def measure(self, forms: Forms) -> float:
        """Return the metric with some sites swapped, by a whole pass."""
        if self.is_default:
            _ = self._float_outputs  # computed now, before anything is swapped
        with self._float.swapped(forms) as root:
            return self.metric_of(root)

    def metric_of(self, model: nn.Module) -> float:
        """Return the metric of a whole model."""
        with torch.no_grad():
            if self._metric is not None:
                return call_metric(self._metric, model)
            return relative_rms(
                squared_errors(run(model, batch, seed), expected)
                for seed, (batch, expected) in enumerate(zip(self.batches, self._float_outputs, strict=True))
            )

    def ends(self) -> list[float]:
        """Return values that identify model, metric and data: the metric of the float and the quantized model.

        The default metric is always 0 for the float model; there, Σ y² of each batch's float outputs instead.
        """
        if self._metric is not None:
            return [self.measure({}), self.measure(self.forms)]
        with torch.no_grad():
            outputs = (named_floats(run(self._float.model, batch, seed)) for seed, batch in enumerate(self.batches))
            return [sum(squared_errors(output, output)[1::2]) for output in outputs]

    def measure_all(
        self,
        variants: Mapping[str, Variant],
        ask: Ask = lambda _, measure: measure(),
        progress: Progress = iter,
    ) -> dict[str, float]:
        """Return the metric of each variant, bit for bit what `measure` gives. ask: may know values already.

        progress: wraps the variants or, for partial passes, the pairs of a batch and a variant.
        """
        if self._partial is not None:
            try:
                return self._measure_in_parts(self._partial, variants, ask, progress)
            except InexactError:
                self._partial = None

        def whole(key: str) -> float:
            return ask(key, lambda: (self.measure(variants[key].forms),))[0]

        return {key: whole(key) for key in progress(list(variants))}

    def _measure_in_parts(
        self, partial: PartialPasses, variants: Mapping[str, Variant], ask: Ask, progress: Progress
    ) -> dict[str, float]:
        """Return the default metric of each variant by partial passes, batch by batch."""
        errors: dict[str, list[tuple[float, ...]]] = {key: [] for key in variants}
        for number, key in progress([(number, key) for number in range(len(self.batches)) for key in variants]):
            measure = functools.partial(partial.errors, number, variants[key])
            errors[key].append(ask(f"{key}, batch {number}", measure))
        partial.forget()
        return {key: relative_rms(batches) for key, batches in errors.items()}

    @functools.cached_property
    def _float_outputs(self) -> list[Floats]:
        """The float outputs of all batches."""
        return [named_floats(run(self._float.model, batch, seed)) for seed, batch in enumerate(self.batches)]


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by name, tied ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
