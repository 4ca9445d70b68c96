"""The path of a model that does not trace: its own code runs on, and its modules are quantized where they stand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fxquant.errors import ExampleInputsError, FxQuantError, TraceError, warn
from fxquant.graph.call import Inputs
from fxquant.graph.eager import plain_mirror, prepare_tree
from fxquant.graph.plan.outcome import judge
from fxquant.graph.plan.rules import check_mapping
from fxquant.graph.record import need_stage
from fxquant.graph.trace.checks import first_line
from fxquant.graph.trace.trace import names_of
from fxquant.graph.trace.verify import GraphFailsError, check_runs
from fxquant.operators import Operator
from fxquant.qconfig_mapping import QConfigMapping


def prepare_whole(
    model: nn.Module,
    mapping: QConfigMapping,
    operators: Sequence[Operator],
    inputs: Inputs,
    cause: FxQuantError,
    strict: bool,
    batch_invariant: bool | None,
    is_trained: bool = False,
) -> nn.Module:
    """Return a model that does not trace, prepared module by module; raise the cause where no module can be.

    is_trained: for quantization-aware training.
    """
    written = check_runs(model, inputs, cause)
    if isinstance(cause, ExampleInputsError):  # the model does run on them
        failure = f"its graph fails {cause.place}" if isinstance(cause, GraphFailsError) else first_line(cause)
        cause = TraceError(f"{type(model).__name__} runs, but not as it was traced (it may ask for a type): {failure}")
    check_mapping(mapping, names_of(plain_mirror(model)))
    why = " ".join(line.strip() for line in str(cause).splitlines()[:2])
    prepared = prepare_tree(model, mapping, operators, {"": why}, inputs, written, batch_invariant, is_trained)
    record = need_stage(prepared, "prepared", "prepare_fx", "prepare_tree")
    if not record.sites:
        raise cause
    judge(type(model).__name__, record, names_of(model), strict=strict)
    warn(
        f"{why}\n  So the model's own code runs on, and its modules are quantized where they stand: {record.outcome}; "
        "calls of F.linear and the like are out of reach there (fxquant.explain)"
    )
    return prepared
