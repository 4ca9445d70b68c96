"""Quantization without a graph: modules are swapped in place, and the model's own Python code runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fxquant.graph import edit
from fxquant.graph.calibrate import Hessians
from fxquant.graph.call import Example, Inputs
from fxquant.graph.convert.clean import own_tensors
from fxquant.graph.convert.convert import WeightCache, convert_modules
from fxquant.graph.fingerprint.architecture import describe
from fxquant.graph.lower import lower
from fxquant.graph.plan.planner import plan_modules
from fxquant.graph.record import keep_record, record_of
from fxquant.graph.teach import train_module
from fxquant.graph.trace.leaves import make_plain
from fxquant.operators import Operator
from fxquant.qconfig_mapping import QConfigMapping


def prepare_tree(
    model: nn.Module,
    mapping: QConfigMapping,
    operators: Sequence[Operator],
    untraced: Mapping[str, str] | None = None,
    inputs: Inputs | None = None,
    written: frozenset[str] = frozenset(),
    batch_invariant: bool | None = None,
    is_trained: bool = False,
) -> nn.Module:
    """Return a mirror of the model, in eval mode, with every decision about its modules.

    untraced: why there is no graph, under the root's path "". inputs: what the quantized model is checked on. written:
    the parameters that forward writes into. is_trained: whether its modules get their forms for training. Raises
    QConfigError as `plan` does.
    """
    root = edit.mirror(model, written=written).eval() if is_trained else plain_mirror(model, written=written)
    decided = plan_modules(root, mapping, operators, written)
    record = decided.record(
        model,
        untraced=dict(untraced or {}),
        written=written,
        example=None if inputs is None else Example(inputs),
        architecture=describe(root),
        batch_invariant=batch_invariant,
        is_trained=is_trained,
    )
    for site in record.sites if is_trained else ():
        train_module(root, site, record.operators)
    return keep_record(root, record)


def plain_mirror(model: nn.Module, device: str | None = None, written: frozenset[str] = frozenset()) -> nn.Module:
    """Return a mirror of the model in eval mode, with weights that are computed at each call made parameters."""
    root = edit.mirror(model, device, written=written).eval()
    make_plain(root)
    return root


def convert_tree(prepared: nn.Module, hessians: Hessians | None = None) -> nn.Module:
    """Return the quantized model that `prepare_tree` decided on, of the same class; the prepared one is unchanged.

    hessians: of its weights' inputs, for rounding by GPTQ.
    """
    record = record_of(prepared)
    assert record is not None
    twin = edit.mirror(prepared)
    learned = lower(twin, record) if record.is_trained else []
    cache = WeightCache(hessians.rounding(twin) if hessians is not None else None)
    for integers in learned:
        cache.give(*integers)
    root, sites = convert_modules(twin, record.sites, record.operators, cache, record.batch_invariant)
    own_tensors(root, prepared)
    return keep_record(root, record.advance(stage="quantized", sites=sites, example=None))
