"""Learned step sizes: what rounds in training where a spec's range is `Learned`. Esser et al. 2020."""

from __future__ import annotations

import torch
from torch import nn

from fxquant.errors import QConfigError
from fxquant.fake_quantize import FakeQuantize
from fxquant.numerics import FLOAT32_TINY, QuantizedTensor, choose_qparams, choose_value_qparams, quantize_with
from fxquant.qconfig import QConfig
from fxquant.ranges import Learned
from fxquant.rounding import FakeQuantizeWeight
from fxquant.spec import TensorSpec
from fxquant.straight_through import learned_value, learned_weight


class LearnedFakeQuantize(FakeQuantize):
    """Rounds a value under a step size that training learns. scale: () float32, a parameter; zero_point: () int32.

    The first batch sets both, as its range says; then the zero point stays.
    """

    zero_point: torch.Tensor

    def __init__(self, spec: TensorSpec, name: str = "") -> None:
        super().__init__(spec, name)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    @torch.no_grad()
    def see(self, x: torch.Tensor) -> None:
        """Take the first batch's range."""
        if not torch.compiler.is_compiling():
            if not self.has_seen:
                self._begin(x)
            return
        kept = (self.scale, self.zero_point, self.low, self.high, self.count)
        is_first, before = self.count == 0, [tensor.detach().clone() for tensor in kept]
        self._begin(x)
        for tensor, old in zip(kept, before, strict=True):
            tensor.copy_(torch.where(is_first, tensor, old))

    def _begin(self, x: torch.Tensor) -> None:
        super().see(x)
        scale, zero_point = choose_value_qparams(self.low, self.high, self.spec.qmax)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Return x rounded."""
        return learned_value(x, _positive(self.scale), self.zero_point, self.spec.qmax)

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (scale, zero_point) as they are now: () float32, () int32, without gradients."""
        return _positive(self.scale.detach()), self.zero_point

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (scale, zero_point): () float32, () int32. CalibrationError and DivergedError as in FakeQuantize."""
        super().calculate_qparams()
        return _positive(self.scale.detach()), self.zero_point.clone()

    def refuse_diverged(self) -> None:
        """Raise DivergedError where training left a step size, or the first batch's range, without end."""
        self.check(self.scale.detach())
        super().refuse_diverged()


class LearnedWeight(FakeQuantizeWeight):
    """Rounds a weight under step sizes that training learns. scale: as `choose_qparams` gives it, a parameter.

    It begins as the weight's range says. weight: (N, ...).
    """

    def __init__(self, qconfig: QConfig, weight: torch.Tensor) -> None:
        super().__init__(qconfig)
        (observer,) = self._observer
        assert observer is not None, qconfig
        scale, _ = choose_qparams(*observer.measure(weight.detach().float().contiguous()), qconfig.weight)
        scale = scale[:1] if qconfig.weight.axis == "tensor" else scale
        self.scale = nn.Parameter(scale.to(torch.float32))

    def forward(self, weight: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the numbers that the weight's integers will stand for: (N, ...); itself while rounding is off.

        rows: which rows of the weight these are, (N,); None: all.
        """
        if not self.rounds:
            return weight
        scale = self._safe() if rows is None else self._safe()[rows]
        return learned_weight(weight, scale, self.qconfig.weight)

    is_scale_free = False

    def _safe(self) -> torch.Tensor:
        """Return the scales; those of groups may be negative, as integers reach farther on one side."""
        return self.scale if self.qconfig.weight.group_size else _positive(self.scale)

    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        """Return the integers of a weight, (N, ...)."""
        spec, real = self.qconfig.weight, weight.detach().to(torch.float32)
        scale = self._safe().detach().to(spec.format.scale)
        scale = scale.expand(len(real)).clone() if spec.axis == "tensor" else scale
        values = quantize_with(real, scale, torch.zeros_like(scale, dtype=torch.float32), spec)
        return QuantizedTensor(spec.format, values, scale, None, real.shape[-1], spec.group_size or 0)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    return scale.abs().clamp(min=FLOAT32_TINY)  # abs: a step too far comes back


def make_value_rounding(spec: TensorSpec, name: str) -> FakeQuantize:
    """Return what rounds a value."""
    return LearnedFakeQuantize(spec, name) if isinstance(spec.range, Learned) else FakeQuantize(spec, name)


def make_weight_rounding(qconfig: QConfig, weight: torch.Tensor) -> FakeQuantizeWeight:
    """Return what rounds a weight, (N, ...)."""
    if isinstance(qconfig.weight.range, Learned):
        return LearnedWeight(qconfig, weight)
    return FakeQuantizeWeight(qconfig)


def refuse_learned(path: str, kind: str, qconfig: QConfig) -> None:
    """Raise QConfigError for a qconfig of which training learns a step size."""
    if qconfig.is_learned:
        raise QConfigError(
            f"{path!r} ({kind}) has a step size that training learns, range=Learned(): use prepare_qat_fx, or another "
            "range"
        )
