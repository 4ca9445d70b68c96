"""prepare_qat_fx: the passes of prepare_fx, for a model that goes on to train with the rounding in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fxquant.entry import entry
from fxquant.errors import ExampleInputsError, TraceError, warn
from fxquant.graph import edit
from fxquant.graph.call import Example, bind_inputs
from fxquant.graph.fingerprint.architecture import describe
from fxquant.graph.fuse import fuse
from fxquant.graph.layers import restore_layers
from fxquant.graph.lower import rounds_of
from fxquant.graph.module import finish
from fxquant.graph.plan.outcome import judge
from fxquant.graph.plan.planner import plan
from fxquant.graph.plan.rules import as_mapping, check_mapping
from fxquant.graph.preserve.preserve import preserve
from fxquant.graph.record import preserved_of, record_of, refuse_ours
from fxquant.graph.teach import Constant, constants_by_mode, teach
from fxquant.graph.trace.checks import check_model, first_line
from fxquant.graph.trace.trace import Traced, trace
from fxquant.graph.trace.verify import capture
from fxquant.graph.whole import prepare_whole
from fxquant.nn.fused import SPELT
from fxquant.nn.trained import tie_steps
from fxquant.operators import OPERATORS, Operator
from fxquant.qconfig_mapping import QConfigMapping


@entry
def prepare_qat_fx(
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
    """Return the model as a graph in training mode that rounds what its quantized form will; it trains as any model.

    Where forward does not trace: a model of its own class whose modules round, and a warning.

    model: in training mode; it is not changed, and the result has copies of its parameters and buffers under the same
    names, so that its checkpoints fit. qconfig_mapping: `default_qat_qconfig_mapping()`, or any whose static qconfigs
    have a range that follows training: MovingAverage, MinMax, Fixed; dynamic ones round each token as it comes.
    The other arguments are those of prepare_fx.

    After training, `convert_fx` gives the quantized model, as after prepare_fx. docs/training.md.
    Raises ModelStateError for a model in eval mode, and what prepare_fx raises.
    """
    mapping = as_mapping(qconfig_mapping)
    refuse_ours(model, "prepare_qat_fx", ("fused", "prepared", "quantized"))
    check_model(model, in_training=True)
    own = _own_copy(model)
    preserved = preserve(own, preserved_attributes, preserved_of(own))
    inputs = bind_inputs(own, example_inputs, example_kwargs)
    try:
        traced = capture(own, operators, inputs, preserved, recomputes=True, for_static=mapping.has_static)
    except (TraceError, ExampleInputsError) as error:
        prepared = prepare_whole(own, mapping, operators, inputs, error, strict, batch_invariant, is_trained=True)
        return _finished(prepared, model)
    functions = [SPELT.get(node.target, node.target) for node in traced.module.graph.nodes]
    check_mapping(mapping, traced.names, functions)
    architecture = describe(traced.module, own)
    constants = _constants(own, traced, operators)
    restored = restore_layers(traced.module, set(map(id, preserved.modules(traced.module))))
    constants = [constant for constant in constants if constant.node not in restored]
    parts = dict(traced.module.named_modules(remove_duplicate=False))
    fusions, unfused = fuse(traced.module, traced.hooked, preserved)
    decided = plan(traced, mapping, operators)
    record = teach(traced.module, decided, fusions, parts, constants, traced.hooked).record(
        own,
        traced,
        fusions=fusions,
        unfused=unfused,
        example=Example(inputs),
        architecture=architecture,
        batch_invariant=batch_invariant,
        is_trained=True,
    )
    judge(type(model).__name__, record, traced.names, functions, strict=strict)
    return _finished(finish(traced.module, own, record), model)


def _own_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model, in eval mode, that shares no tensor with it."""
    own = edit.mirror(model)
    for parameter in own.parameters():  # the same objects: an LSTM has a list of them; buffers are copies already
        parameter.data = parameter.detach().clone()
    return own.train(False)


def _constants(own: nn.Module, traced: Traced, operators: Sequence[Operator]) -> Sequence[Constant]:
    """Return the arguments that forward chooses by `self.training`, from a trace of the model in training mode."""
    twin = edit.mirror(own).train()
    keep = traced.keep._replace(live=traced.kept["live"])
    why = "its graph is another one"
    try:
        in_training = trace(twin, operators, None, traced.constants, traced.untraced, keep=keep, in_training=True)
        found = constants_by_mode(traced.module.graph, in_training.module.graph)
    except TraceError as error:
        found, why = None, first_line(error)
    if found is None:
        warn(
            f"{type(own).__name__} does something else in training mode than in eval mode ({why}). Prepared, it trains "
            "as eval mode computes, which convert_fx quantizes; only modules with a mode of their own (dropout, "
            "normalization) follow it"
        )
    return found or ()


def _finished(prepared: nn.Module, model: nn.Module) -> nn.Module:
    """Return a prepared model in training mode, but for those parts that the user's model has in eval mode."""
    record = record_of(prepared)
    assert record is not None
    tie_steps(rounds_of(prepared, record))
    prepared.train()
    modes = {path: part.training for path, part in model.named_modules()}
    for path, part in prepared.named_modules():
        if not modes.get(path, True):
            for inner in part.modules():
                inner.training = False
    return prepared
