"""prepare_fx, convert_fx and fuse_fx, which run the passes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from fxquant.entry import entry
from fxquant.errors import ArgumentError, ExampleInputsError, TraceError
from fxquant.graph import edit
from fxquant.graph.calibrate import Hessians, calibrated, gather, uses_hessians
from fxquant.graph.call import Example, bind_inputs
from fxquant.graph.check.check import checked
from fxquant.graph.convert.clean import clean
from fxquant.graph.convert.convert import WeightCache, convert
from fxquant.graph.eager import convert_tree
from fxquant.graph.fingerprint.architecture import describe
from fxquant.graph.fuse import fuse
from fxquant.graph.lower import lower, refuse_diverged
from fxquant.graph.module import FxModule, finish
from fxquant.graph.observe import observe
from fxquant.graph.plan.outcome import judge
from fxquant.graph.plan.planner import plan
from fxquant.graph.plan.rules import as_mapping, check_mapping
from fxquant.graph.preserve.preserve import Keep, preserve
from fxquant.graph.record import Record, need_stage, preserved_of, refuse_ours
from fxquant.graph.trace.checks import check_model
from fxquant.graph.trace.exported import adopt
from fxquant.graph.trace.trace import trace
from fxquant.graph.trace.verify import capture, verify
from fxquant.graph.whole import prepare_whole
from fxquant.nn.fused import SPELT
from fxquant.operators import OPERATORS, Operator
from fxquant.progress import Progress, count_on_terminal
from fxquant.qconfig_mapping import QConfigMapping


@entry
def prepare_fx(
    model: nn.Module,
    qconfig_mapping: QConfigMapping | Mapping[str, Any],
    example_inputs: Any = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    preserved_attributes: Sequence[str] = (),
    operators: Sequence[Operator] = OPERATORS,
    strict: bool = False,
    batch_invariant: bool | None = None,
) -> nn.Module:
    """Return the model as a graph that computes exactly what it does, with every quantization decision taken.

    Where forward does not trace: a model of its own class, with the decisions about its modules, and a warning.

    model: in eval mode; it is not changed, and its weights are shared, not copied, until convert_fx.
    qconfig_mapping: which qconfig each part gets, as a QConfigMapping or in its dict form.
    example_inputs: a tuple of one call's positional arguments, a dict of its keyword arguments, or one tensor; really
    run, and kept, copied, for convert_fx's check. example_kwargs: keyword arguments that go with positional ones.
    preserved_attributes: names of attributes, methods and properties of the model that shall stay: they may be read,
    set and called. What their code uses comes along; modules that it calls are quantized, and fused with nothing. What
    fuse_fx kept stays.
    operators: the operator table; add your own: (*OPERATORS, MY_OPERATOR).
    strict: whether a QConfigError lists what would stay float although no entry of the mapping says so.
    batch_invariant: whether float products are summed in an order of ours, as docs/numerics.md says: None, True, False.

    Dynamic quantization needs no calibration: convert_fx may follow at once. Raises ModelStateError, TraceError,
    ExampleInputsError, QConfigError, MappingNameError or AttributeNameError; then nothing was changed.
    """
    mapping = as_mapping(qconfig_mapping)
    refuse_ours(model, "prepare_fx", ("prepared", "quantized"))
    original, model = model, adopt(model)
    check_model(model)
    preserved = preserve(model, preserved_attributes, preserved_of(model))
    inputs = bind_inputs(model, example_inputs, example_kwargs)
    try:
        traced = capture(model, operators, inputs, preserved, for_static=mapping.has_static)
        if original is not model:
            verify(original, traced.module, inputs)
    except (TraceError, ExampleInputsError) as error:
        return prepare_whole(model, mapping, operators, inputs, error, strict, batch_invariant)
    functions = [SPELT.get(node.target, node.target) for node in traced.module.graph.nodes]
    check_mapping(mapping, traced.names, functions)
    architecture = describe(traced.module, model)  # before it is fused
    fusions, unfused = fuse(traced.module, traced.hooked, traced.keep.preserved)
    record = observe(traced.module, plan(traced, mapping, operators)).record(
        model,
        traced,
        fusions=fusions,
        unfused=unfused,
        example=Example(inputs),
        architecture=architecture,
        batch_invariant=batch_invariant,
    )
    judge(type(model).__name__, record, traced.names, functions, strict=strict)
    return finish(traced.module, model, record)


@entry
def convert_fx(
    prepared: nn.Module,
    *,
    data: Iterable[Any] | None = None,
    progress: Progress = count_on_terminal,
    check: bool = True,
) -> nn.Module:
    """Return the quantized model that prepare_fx decided on. The prepared model is left as it was.

    data: an iterable of batches like those that the model will see, each a tuple of one call's positional arguments, a
    dict of its keywords, or one tensor. It calibrates static values, which need it unless the prepared model has run on
    data before. With it 4- and 3-bit weights are rounded with GPTQ (docs/numerics.md, "GPTQ error"): the float model
    runs over it once, and each site says in its `rounding` what came of it. Without it, and for other weights, rounding
    is to nearest.

    progress: wraps the batches, such as `tqdm` for a bar. By default a line on a terminal counts them if they take more
    than two seconds; `iter` shows nothing.

    check: whether the quantized model is run once on prepare_fx's example inputs, beside the float one. A layer that
    runs in float but not once it is quantized stays float, with a reason. One warning names other shapes or dtypes, NaN
    where float has none, and an SQNR below 10 dB with the worst sites.

    Raises ModelStateError for anything but a result of prepare_fx; CalibrationError for static values that have seen no
    data; ExampleInputsError for data without a batch, or with
    one that does not fit forward; CheckError where the quantized model fails on the example inputs.
    """
    record = need_stage(prepared, "prepared", "convert_fx", "prepare_fx(model, qconfig_mapping, example_inputs)")
    if record.is_trained:
        prepared = _trained(prepared, record, data)
    if data is not None and record.values.edges:
        again = list(data) if uses_hessians(record.sites) else None  # which needs a second pass
        prepared, data = calibrated(prepared, data if again is None else again, progress), again
    elif record.mapping.has_static and not uses_hessians(record.sites):
        data = None  # it was to calibrate: prepare_fx, or explain, said that there is nothing
    hessians = gather(prepared, record.sites, data, progress) if data is not None else None
    if not check:
        return convert_with(prepared, hessians)
    return checked(prepared, functools.partial(convert_with, hessians=hessians))


@entry
def convert_with(prepared: nn.Module, hessians: Hessians | None) -> nn.Module:
    """Return what convert_fx does with data that gave these Hessians; None: without data."""
    record = need_stage(prepared, "prepared", "convert_fx", "prepare_fx(model, qconfig_mapping, example_inputs)")
    if not record.is_traced:
        return convert_tree(prepared, hessians)
    module = edit.mirror(prepared)
    assert isinstance(module, fx.GraphModule)
    learned = lower(module, record) if record.is_trained else []
    cache = WeightCache(hessians.rounding(module) if hessians is not None else None)
    for integers in learned:
        cache.give(*integers)
    sites = convert(module, record.sites, record.operators, cache, record.batch_invariant, record.values)
    quantized = clean(module, prepared, record.preserved)
    return finish(quantized, prepared, record.advance(stage="quantized", sites=sites, example=None))


def _trained(prepared: nn.Module, record: Record, data: Iterable[Any] | None) -> nn.Module:
    """Return a mirror, in eval mode, of a model that was trained; ArgumentError where data is given."""
    if data is not None:
        raise ArgumentError(
            "convert_fx takes no data for a model of prepare_qat_fx: its ranges and weights are those of training; "
            "leave data out"
        )
    refuse_diverged(prepared, record)
    return edit.mirror(prepared).train(False)


@entry
def fuse_fx(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    preserved_attributes: Sequence[str] = (),
) -> FxModule:
    """Return the model as a graph whose chains (Conv → BatchNorm, Linear → ReLU, …) are fused, still float.

    example_inputs, example_kwargs: as for prepare_fx. Without them the rank of values is not known, and a folded
    BatchNorm1d is guarded by an assertion in the graph.
    """
    refuse_ours(model, "fuse_fx", ("prepared", "quantized"))
    model = adopt(model)
    check_model(model)
    preserved = preserve(model, preserved_attributes, preserved_of(model))
    if example_inputs is None and example_kwargs is None:
        traced = trace(model, OPERATORS, keep=Keep(preserved))
    else:
        positional = () if example_inputs is None else example_inputs
        traced = capture(model, OPERATORS, bind_inputs(model, positional, example_kwargs), preserved)
    fusions, unfused = fuse(traced.module, traced.hooked, traced.keep.preserved)
    record = Record(stage="fused", fusions=fusions, unfused=unfused, float_bytes=edit.byte_count(model), **traced.kept)
    return finish(traced.module, model, record)
