"""Which models can be traced, and the errors about those that cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from fxquant.errors import ModelStateError, TraceError
from fxquant.graph import edit

_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""Wrappers around a model, and the attribute that holds it."""


def wrapped_in(module: nn.Module) -> str:
    """Return the attribute in which a wrapper holds its model, "" for a module that is not a wrapper."""
    inner = _WRAPPERS.get(type(module).__name__, "")
    return inner if inner and hasattr(module, inner) else ""


def check_kind(model: Any) -> None:
    """Raise ModelStateError unless this is a module, neither wrapped nor compiled, whose parameters have shapes."""
    if not isinstance(model, nn.Module):
        cure = "; pass its module: program.module()" if isinstance(model, torch.export.ExportedProgram) else ""
        raise ModelStateError(f"expected a torch.nn.Module, got {type(model).__name__}{cure}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelStateError("TorchScript models cannot be quantized; pass the nn.Module that this was made from")
    if wrapped_in(model):
        raise ModelStateError(
            f"{type(model).__name__} is a wrapper; pass the model inside it: model.{wrapped_in(model)}"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelStateError(f"{name!r} is lazy and has no shape yet; run the model once on real input first")


def check_model(model: Any, in_training: bool = False) -> None:
    """Raise ModelStateError unless `check_kind` passes, the model is in eval mode, and its class has its forward.

    in_training: whether it must be in training mode instead.
    """
    check_kind(model)
    if "forward" in vars(model):
        raise ModelStateError(
            f"the forward of this {type(model).__name__} was replaced on the instance, where torch.fx does not see it; "
            "define it in a class"
        )
    if in_training and not model.training:
        raise ModelStateError(
            f"{type(model).__name__} is in eval mode, and quantization-aware training begins in training mode; call "
            "model.train() first (or prepare_fx, to quantize it without training)"
        )
    if model.training and not in_training:
        raise ModelStateError(f"{type(model).__name__} is in training mode; call model.eval() first")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def trace_error(model: nn.Module, error: Exception) -> TraceError:
    """Return the error that says where tracing failed, why, and what to try."""
    where = edit.user_frame(error)
    home = type(model).__module__
    return TraceError(
        f"{type(model).__name__} does not trace: {first_line(error)}\n"
        f"  at {where or f'{home}.{type(model).__name__}.forward; put the module inside one of your own, as a leaf'}\n"
        "  torch.fx runs forward once with stand-ins for tensors, so Python cannot branch on, loop over or convert "
        "their values there; without a graph only its modules could be quantized, and none can. Try one of:\n"
        "  - give prepare_fx torch.export.export(model, example_inputs).module(), with the branches of these inputs;\n"
        "  - write the choice with tensors (torch.where) or base it on a module attribute;\n"
        "  - make tensors of an input's size from it: x.new_zeros(x.shape[0], 8), not torch.zeros(x.shape[0], 8);\n"
        "  - move that part into a function and mark it with torch.fx.wrap;\n"
        "  - hold the weights in modules (nn.Linear for F.linear), which are swapped where they stand."
    )
