"""What rounds in training, but for values: tokens and weights; and the switches of all that rounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxquant.numerics import QuantizedTensor, choose_qparams
from fxquant.observers import GroupMinMaxObserver, MinMaxObserver, Observer, PerChannelMinMaxObserver
from fxquant.qconfig import QConfig
from fxquant.spec import TensorSpec
from fxquant.straight_through import fake_quantize_tokens, fake_quantize_weight, fake_store

_MIN_MAX = (MinMaxObserver, PerChannelMinMaxObserver, GroupMinMaxObserver)


class Rounding(nn.Module):
    """What rounds in training. rounds: whether it does, or lets all pass; observes: whether its range moves.

    Both are switched by `enable_fake_quant`, `disable_observer` and the like, and are in the state_dict, as `switches`.
    """

    rounds = True
    observes = True

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}switches"] = torch.tensor([self.rounds, self.observes], dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load; a float model's state_dict has nothing here, and changes nothing."""
        switches = state_dict.pop(f"{prefix}switches", None)
        if switches is not None:
            self.rounds, self.observes = map(bool, switches.tolist())
        if switches is not None or any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)


class FakeQuantizeTokens(Rounding):
    """Rounds each token of an activation as the quantized model will at each call. spec: of a dynamic activation."""

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x rounded, token by token; x itself while rounding is off."""
        return fake_quantize_tokens(x, self.spec) if self.rounds and x.numel() else x

    def extra_repr(self) -> str:
        """Return what print shows: the spec."""
        return str(self.spec)


class FakeQuantizeWeight(Rounding):
    """Rounds a weight as the quantized model's will be, under the range that it has now."""

    def __init__(self, qconfig: QConfig) -> None:
        super().__init__()
        self.qconfig = qconfig
        self._observer = (qconfig.make_observer(),)  # in a tuple: it holds nothing that a state_dict or .to should find

    def forward(self, weight: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """Return the numbers that the weight's integers will stand for: (N, ...); itself while rounding is off.

        rows: which rows of the weight these are, (N,), where each has a range of its own.
        """
        (observer,) = self._observer
        if not self.rounds:
            return weight
        if observer is None:
            return fake_store(weight, self.qconfig.weight.format)
        spec = self.qconfig.weight
        scale, zero_point = _qparams(observer, weight.detach().to(torch.float32))
        return fake_quantize_weight(weight, scale, zero_point, spec, clips=_may_clip(observer))

    @property
    def is_scale_free(self) -> bool:
        """Whether rounding s w gives s times what rounding w gives, for any number s an output channel."""
        spec = self.qconfig.weight
        return spec.symmetric and spec.axis == "channel" and spec.qmin == -spec.qmax

    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        """Return the integers of a weight, (N, ...)."""
        return self.qconfig.quantize_weight(weight.detach().contiguous())

    def extra_repr(self) -> str:
        """Return what print shows: the spec."""
        return str(self.qconfig.weight)


def _qparams(observer: Observer, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return choose_qparams(*observer.measure(weight.contiguous()), observer.spec)


def _may_clip(observer: Observer) -> bool:
    """Return whether a weight may lie beyond its integers; not if its largest magnitude is one of them."""
    spec = observer.spec
    is_whole = type(observer) in _MIN_MAX and spec.symmetric and spec.scale_steps is None
    return not (is_whole and spec.axis != "group" and spec.qmin <= -spec.qmax)


def enable_fake_quant(module: nn.Module) -> None:
    """Let a module round: for `model.apply(enable_fake_quant)`."""
    _switch(module, "rounds", True)


def disable_fake_quant(module: nn.Module) -> None:
    """Let a module pass floats on; its range rests too: for `model.apply(disable_fake_quant)`."""
    _switch(module, "rounds", False)


def enable_observer(module: nn.Module) -> None:
    """Let a module's range move in training: for `model.apply(enable_observer)`."""
    _switch(module, "observes", True)


def disable_observer(module: nn.Module) -> None:
    """Keep a module's range as it is: for `model.apply(disable_observer)`."""
    _switch(module, "observes", False)


def _switch(module: nn.Module, name: str, is_on: bool) -> None:
    if isinstance(module, Rounding):
        setattr(module, name, is_on)
