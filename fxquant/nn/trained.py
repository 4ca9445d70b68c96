"""What modules in quantization-aware training share: float modules that round as their quantized forms will.

They keep their type's attributes and parameters under the user's names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from fxquant.formats import Activation
from fxquant.learned import LearnedWeight, make_weight_rounding
from fxquant.nn.stored import identity
from fxquant.numerics import QuantizedTensor
from fxquant.qconfig import QConfig
from fxquant.rounding import FakeQuantizeTokens

_SHALLOW = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

T = TypeVar("T", bound=nn.Module)


def retyped(module: nn.Module, module_type: type[T]) -> T:
    """Return a module of another type with the same attributes, parameters and buffers: the objects themselves."""
    twin = object.__new__(module_type)
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update({name: copy.copy(module.__dict__[name]) for name in _SHALLOW})
    return twin


Rounds = tuple[nn.Module, torch.Tensor]
"""What rounds a weight, and the weight as it is quantized."""

Given = tuple[torch.Tensor, QConfig, QuantizedTensor]
"""A weight, as it is quantized, its qconfig and its integers."""


def given(rounds: Iterable[Rounds]) -> list[Given]:
    """Return the integers of the weights whose step sizes were learned."""
    return [
        (weight, rounding.qconfig, rounding.quantize(weight))
        for rounding, weight in rounds
        if isinstance(rounding, LearnedWeight)
    ]


def tie_steps(rounds: Iterable[Rounds]) -> None:
    """Let all that round one weight under one spec have one learned step size: they will have the same integers."""
    first: dict[Any, LearnedWeight] = {}
    for rounding, weight in rounds:
        if isinstance(rounding, LearnedWeight):
            rounding.scale = first.setdefault((*identity(weight), rounding.qconfig.weight), rounding).scale


class Trained(nn.Module):
    """What the trained modules share. `from_float` makes them, and `to_float` gives the float module back."""

    added: ClassVar[tuple[str, ...]] = ("weight_rounding", "input_rounding")  # the modules that add_rounding registers
    float_type: type[nn.Module]
    qconfig: QConfig

    @classmethod
    def from_float(cls: type[T], module: nn.Module, qconfig: QConfig) -> T:
        """Return the trained form of a float module, whose parameters it has: the same objects."""
        trained = retyped(module, cls)
        trained.float_type, trained.qconfig = type(module), qconfig  # type: ignore[assignment]
        trained.add_rounding()  # type: ignore[operator]
        return trained

    def add_rounding(self) -> None:
        """Register what rounds."""
        self.weight_rounding = make_weight_rounding(self.qconfig, self._turned(self.weight))
        self.input_rounding = token_rounding(self.qconfig)

    def _turned(self, weight: Any) -> Any:
        """Return a weight as it is quantized, (O, ...)."""
        return weight

    def rounds(self, module: Any) -> Iterator[Rounds]:
        """Yield what rounds each weight, and the weight as it is quantized. module: this one, or its float form."""
        yield self.weight_rounding, self._turned(module.weight)

    def to_float(self) -> nn.Module:
        """Return the float module, with the parameters that it has now."""
        module = retyped(self, self.float_type)
        for name in ("float_type", "qconfig", "norm_eps"):
            vars(module).pop(name, None)
        for name in self.added:
            module._modules.pop(name, None)
        return module


def token_rounding(qconfig: QConfig | None) -> nn.Module:
    """Return what rounds the tokens that meet a weight under a qconfig, None for a float one."""
    activation = None if qconfig is None or qconfig.weight.format.activation is Activation.FLOAT else qconfig.activation
    is_rounded = activation is not None and activation.dynamic and activation.is_integer
    return FakeQuantizeTokens(activation) if is_rounded and activation is not None else nn.Identity()
