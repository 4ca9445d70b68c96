"""Warnings for users who would train quantized weights: integers do not train; adapters, biases and norms do.

A model is put into training by `.requires_grad_()`, or a loop over its parameters, and by `.train()`: both warn. A
loss's `.backward()` runs no code of ours, and torch raises an error where nothing in a model requires a gradient.
Outputs do not require one just to warn here: they could not become arrays then, and frozen layers would be
differentiated. So no call costs more for this, and a model's outputs are as in eval mode.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from fxquant.errors import warn

_CURE = "Train adapters (LoRA) beside the quantized layers, or train the float model and quantize it again"


class FrozenParameter(nn.Parameter):
    """An empty parameter of a quantized module that stays frozen, and warns when it is asked to train.

    `model.requires_grad_()` and loops over all parameters reach it; `layer.bias.requires_grad_()` does not.
    """

    def requires_grad_(self, requires_grad: bool = True) -> FrozenParameter:
        """Return the parameter, still frozen; warn at the user's line where it is asked to train."""
        if requires_grad:
            warn(
                "requires_grad was set on all parameters of a quantized module, whose weights are integers and do not "
                f"train: only its biases and what is float do. If that is meant, set it on those alone. {_CURE}",
                past=("fxquant", "torch"),
            )
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad":
            self.requires_grad_(value)
        else:
            super().__setattr__(name, value)


def frozen(tensor: torch.Tensor) -> FrozenParameter:
    """Return a tensor as a FrozenParameter."""
    return FrozenParameter(tensor.detach(), requires_grad=False)


def trainable(model: nn.Module) -> frozenset[str]:
    """Return the names of a model's parameters that require a gradient."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def warn_of_training(module: nn.Module, module_type: type[nn.Module]) -> None:
    """Warn where a quantized model was put into training mode and only what conversion left float can train.

    module: one that was just put into it; module_type: of those that call this; the model's first one of it warns.
    Nothing warns where there is more to train: adapters or biases in the model, or a head of a model that contains it.
    """
    asked = [module, *_asked()]
    found = ((part, known) for part in asked if (known := _known(part)) is not None)
    model, known = next(found, (module, None))
    if known is None or module is not next((part for part in model.modules() if isinstance(part, module_type)), module):
        return
    names = trainable(model)
    if names - known or len(trainable(asked[-1])) > len(names):
        return
    rest = sorted(names)
    only = ", ".join(rest[:4]) + (f", … ({len(rest)} in all)" if len(rest) > 4 else "")
    limits = f"only {only} do" if rest else "nothing else in it does, so that backward() of a loss fails"
    warn(
        f"{type(model).__name__} was put into training mode, but its quantized weights are integers and do not train: "
        f"{limits}. {_CURE}",
        past=("fxquant", "torch"),
    )


def _known(module: nn.Module) -> frozenset[str] | None:
    """Return which parameters required a gradient when a quantized model was made, None for any other module."""
    record = module.__dict__.get("_fxquant_record")  # graph/record.py keeps it: a floor above this one
    known: frozenset[str] | None = getattr(record, "trainable", None)
    return known


def _asked() -> Iterator[nn.Module]:
    """Yield the modules whose `.train()` is running, the one that the user's code called last."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module.train.__code__:
            yield frame.f_locals["self"]
        frame = frame.f_back
