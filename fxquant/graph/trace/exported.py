"""Programs of torch.export: their module becomes a plain graph of torch's modules and functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxquant.errors import ModelStateError
from fxquant.graph import edit
from fxquant.graph.constants import constant_of
from fxquant.graph.trace.aten import lift_calls, operands_of
from fxquant.graph.trace.signature import check_sizes
from fxquant.graph.trace.tracer import SCOPE

_ATEN: Any = torch.ops.aten

_TRAINING = {
    _ATEN.dropout.default: "train",
    _ATEN.batch_norm.default: "training",
    _ATEN.native_dropout.default: "train",
    _ATEN._native_batch_norm_legit.default: "training",
    _ATEN._native_batch_norm_legit_functional.default: "training",
}
"""The arguments that say whether an operator runs in training."""


def is_exported(model: Any) -> bool:
    """Return whether a module is the result of an exported program's .module(), whose mode cannot be set."""
    is_torchs = any(base.__module__.startswith("torch.export.") for base in type(model).__mro__)
    return isinstance(model, fx.GraphModule) and is_torchs


def adopt(model: Any) -> Any:
    """Return an exported program's module as a plain graph that shares its tensors; any other model as it is.

    Raises ModelStateError for a program that was exported in training mode.
    """
    if not is_exported(model):
        return model
    plain = fx.GraphModule(model, edit.quiet_copy(model.graph), type(model).__name__)
    _guard_sizes(plain, model.range_constraints)
    for node in plain.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            _refuse_training(node)
    lift_calls(plain, plain.graph)
    plain.graph.lint()
    plain.recompile()
    edit.carry_hooks(model, plain)
    for key, hook in [*plain._forward_hooks.items(), *plain._forward_pre_hooks.items()]:
        if hook.__module__.startswith("torch.export"):  # it reads what only its own module has
            for name in edit.HOOKS:
                getattr(plain, name).pop(key, None)
    return plain.train(False)


def give_scopes(graph: fx.Graph) -> None:
    """Give the calls of a model that came as a graph the path of their weight as a scope, for mappings."""
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and not node.meta.get(SCOPE):
            constants = [constant_of(operand) for operand in node.all_input_nodes]
            paths = [str(constant.source.target).rpartition(".")[0] for constant in constants if constant is not None]
            node.meta[SCOPE] = next(iter(paths), "")


def _guard_sizes(plain: fx.GraphModule, ranges: Any) -> None:
    """Replace torch's guards by checks of the inputs' sizes, which can be pickled and have messages of ours."""
    for node in [node for node in plain.graph.nodes if node.op == "call_module" and node.target == "_guards_fn"]:
        plain.graph.erase_node(node)
    inputs = [node for node in plain.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        if isinstance(node.meta.get("val"), torch.Tensor):
            sizes = tuple(_range(size, ranges) for size in node.meta["val"].shape)
            with plain.graph.inserting_after(inputs[-1]):
                plain.graph.call_function(check_sizes, (node, str(node.target), sizes))


def _range(size: Any, ranges: Any) -> tuple[int, int | None]:
    """Return the least and the greatest size that an input's dimension may have; None: no limit."""
    if isinstance(size, int):
        return size, size
    known = (ranges or {}).get(size.node.expr)
    bounds: list[Any] = [getattr(known, name, None) for name in ("lower", "upper")]
    least, greatest = (int(end) if getattr(end, "is_Integer", False) else None for end in bounds)
    return least or 0, greatest


def _refuse_training(node: fx.Node) -> None:
    operands = operands_of(node)
    if operands.get(_TRAINING.get(node.target, "")) is True and operands.get("p") != 0.0:
        raise ModelStateError(
            f"this program was exported in training mode: {node.name} is {node.target} for training; export "
            "model.eval() instead"
        )
