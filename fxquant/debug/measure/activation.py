"""The range and the peak of a site's inputs."""

from __future__ import annotations

import math

import torch

from fxquant.graph.outputs import energy, wide


class Activation:
    """Running range and peak of one input."""

    def __init__(self) -> None:
        self.low, self.high, self.peaks, self.energy = math.inf, -math.inf, 0.0, 0.0

    def add(self, x: torch.Tensor) -> None:
        """Count another tensor's tokens; those with a NaN or an infinity are left out."""
        tokens = wide(x).reshape(-1, x.shape[-1] if x.dim() else 1)
        if not math.isfinite(energy(tokens)):
            tokens = tokens[tokens.isfinite().all(-1)]
        if tokens.numel():
            low, high = tokens.aminmax()
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
            self.peaks += tokens.shape[-1] * energy(tokens.abs().amax(-1))
            self.energy += energy(tokens)

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest value; NaN where there was none."""
        return (self.low, self.high) if self.low <= self.high else (math.nan, math.nan)

    @property
    def peak(self) -> float:
        """How far the largest values stick out: the equation of compare.py; NaN where all are 0."""
        return math.sqrt(self.peaks / self.energy) if self.energy else math.nan
