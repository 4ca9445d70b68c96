"""What stands in a model in quantization-aware training on each value that its quantized form has as integers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxquant import ops
from fxquant.errors import DivergedError
from fxquant.numerics import (
    FLOAT32_TINY,
    choose_value_qparams,
    float32,
    value_qparams_of,
)
from fxquant.ranges import Fixed, MovingAverage
from fxquant.rounding import Rounding
from fxquant.snapshot import snapshot
from fxquant.spec import TensorSpec
from fxquant.straight_through import (
    fake_quantize_numbers,
    fake_quantize_value,
    with_gradient,
)
from fxquant.value_observers import ValueObserver

_FEW_LEVELS = 32
"""With fewer levels the few values far out cost more than clipping them."""

_SAMPLE = 4096
_SHARES = torch.linspace(1.0, 0.1, 37)


class FakeQuantize(Rounding, ValueObserver):
    """Rounds a value as the quantized model will, under a range that follows what training shows it.

    spec: how the value will become integers; its range: MovingAverage (low += constant * (batch's low - low), from the
    first batch on), MinMax or Fixed. A batch's range is from its least to its greatest value; for fewer than 32 levels
    the part of that which makes the least squared error. low, high, count: () float32, the range and how many batches
    made it. The range moves in training mode alone, while rounding is on, and not where a checkpoint is computed again
    in backward; in DistributedDataParallel, by the mean over all ranks. name: the value's, for errors. rectifies: the
    name of the ReLU before it that it does too, or "".
    """

    count: torch.Tensor
    rectifies = ""

    def __init__(self, spec: TensorSpec, name: str = "") -> None:
        nn.Module.__init__(self)
        self.spec, self.name, fixed = spec, name, spec.range
        is_fixed = isinstance(fixed, Fixed)
        self.register_buffer("low", torch.tensor(fixed.low if isinstance(fixed, Fixed) else 0.0))
        self.register_buffer("high", torch.tensor(fixed.high if isinstance(fixed, Fixed) else 0.0))
        self.register_buffer("count", torch.tensor(float(is_fixed)))
        self._is_fixed = is_fixed

    @property
    def has_seen(self) -> bool:  # type: ignore[override]
        """Whether it has a range."""
        return bool(self.count > 0)

    def forward(self, x: torch.Tensor, source: torch.Tensor | None = None, **resize: Any) -> torch.Tensor:
        """Return x rounded, its range noted before; x itself while rounding is off, or, in eval mode, before any
        batch.

        source: x is its linear interpolation, and the range is that of source; resize: arguments of ops.resize_value.
        """
        if source is not None:
            return self._resized(x, source, resize)
        is_compiling = torch.compiler.is_compiling()
        if not self.rounds or not x.numel() or not (self.training or is_compiling or self.has_seen):
            return x.relu() if self.rectifies else x
        moves = self.training and self.observes and (is_compiling or not _is_recomputed())
        if is_compiling or not x.is_cpu:
            x = x.relu() if self.rectifies else x
            if moves:
                self.see(x.detach())
        elif moves:
            self.see(x.detach())
        return self.round(x)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Return x rounded."""
        if torch.compiler.is_compiling() or not x.is_cpu:
            scale, zero_point = self.qparams()
            return fake_quantize_value(x, snapshot(scale), snapshot(zero_point), self.spec.qmax)
        numbers = value_qparams_of(self.low.item(), self.high.item(), self.spec.qmax)
        return fake_quantize_numbers(x, *numbers, self.spec.qmax, bool(self.rectifies))

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (scale, zero_point) as they are now: () float32, () int32, without gradients."""
        return choose_value_qparams(self.low, self.high, self.spec.qmax)

    def _resized(self, x: torch.Tensor, source: torch.Tensor, resize: dict[str, Any]) -> torch.Tensor:
        """Return what the quantized model's integers will be after an interpolation, whose gradients pass.

        Means of integers are often halfway between two, so that rounding floats instead would often err by a step.
        """
        if not self.rounds or not x.numel() or not (torch.compiler.is_compiling() or self.has_seen):
            return x
        scale, zero_point = self.qparams()
        q = ops.quantize(source.detach().to(torch.float32), scale, zero_point, self.spec.qmax)
        rounded = ops.dequantize(ops.resize_value(q, **resize), scale, zero_point)
        return with_gradient(rounded.to(x.dtype), x)

    @torch.no_grad()
    def see(self, x: torch.Tensor) -> None:
        """Let the range follow a batch. DivergedError, on the CPU, for a NaN or infinity in it."""
        if self._is_fixed:
            return
        low, high = torch.aminmax(x)
        if x.is_cpu and not torch.compiler.is_compiling():
            self._check_batch(low.item(), high.item())
            if self._is_plain():
                self._follow(low.item(), high.item())
                return
        low, high = low.to(torch.float32).clamp(max=0.0), high.to(torch.float32).clamp(min=0.0)
        low = low * 0.0 if self.rectifies else low
        if self.spec.qmax < _FEW_LEVELS:
            low, high = _least_error(x, low, high, self.spec.qmax)
        if _is_shared():
            low, high = _mean_of_ranks(low, high)
        if isinstance(self.spec.range, MovingAverage):
            share = torch.where(self.count > 0, self.spec.range.constant, 1.0)
            self.low.add_(share * (low - self.low))
            self.high.add_(share * (high - self.high))
        else:
            self.low.copy_(torch.minimum(low, self.low))
            self.high.copy_(torch.maximum(high, self.high))
        self.count.add_(1.0)

    def _is_plain(self) -> bool:
        """Return whether the range moves by its two ends alone, as it mostly does."""
        return isinstance(self.spec.range, MovingAverage) and self.spec.qmax >= _FEW_LEVELS and not _is_shared()

    def _follow(self, low: float, high: float) -> None:
        """Move the range as `see` does, by numbers: the same bits, and an eighth of the time of small operators."""
        low, high = 0.0 if self.rectifies else min(low, 0.0), max(high, 0.0)
        if self.has_seen:
            share = float32(self.spec.range.constant)  # type: ignore[union-attr]
            old_low, old_high = self.low.item(), self.high.item()
            low = float32(old_low + float32(share * float32(low - old_low)))
            high = float32(old_high + float32(share * float32(high - old_high)))
        self.low.fill_(low)
        self.high.fill_(high)
        self.count.add_(1.0)

    def _check_batch(self, low: float, high: float) -> None:
        if not math.isfinite(low - high):
            raise DivergedError(
                f"{self.name or 'a value'} became {'NaN' if low != low else 'infinite'} in training, the first of the "
                "model's values to do so; the loss would be NaN. A lower learning rate, clipped gradients or a look at "
                "the batch (NaN in its inputs?) may help"
            )

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (scale, zero_point): () float32, () int32. DivergedError where training left a range without end."""
        self.refuse_diverged()
        return super().calculate_qparams()

    def refuse_diverged(self) -> None:
        """Raise DivergedError where training left a range without end."""
        self.check(self.high - self.low)

    def check(self, span: torch.Tensor) -> None:
        """Raise DivergedError unless a range or step size is finite."""
        if not span.isfinite():
            raise DivergedError(
                f"the range of {self.name or 'a value'} became {float(span)} in training, the first of the model's "
                "values whose range is not finite; load a checkpoint from before that"
            )

    def extra_repr(self) -> str:
        """Return what print shows: the spec, the range, and what is switched off."""
        off = [name for name, is_on in (("rounding", self.rounds), ("observer", self.observes)) if not is_on]
        return ", ".join([super().extra_repr(), *(f"{name} off" for name in off)])


def _least_error(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, qmax: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the part of a batch's range in which rounding makes the least squared error on a sample of its values."""
    values = x.reshape(-1)
    sample = values[:: -(-len(values) // _SAMPLE)].to(torch.float32)
    shares = _SHARES.to(low.device)
    scale = ((high - low) * shares / qmax).clamp(min=FLOAT32_TINY).unsqueeze(1)
    zero = (-low * shares).unsqueeze(1).div(scale).round()
    q = (sample / scale).round_().add_(zero).clamp_(0, qmax)
    best = q.sub_(zero).mul_(scale).sub_(sample).square_().sum(1).argmin()
    share = shares.index_select(0, best.view(1)).view(())  # torch.compile cannot index by a tensor's number
    return low * share, high * share


def _is_shared() -> bool:
    """Return whether this is the forward of a model that several processes train."""
    return DistributedDataParallel._get_active_ddp_module() is not None  # type: ignore[no-untyped-call]


def _is_recomputed() -> bool:
    """Return whether backward is running: a checkpoint's forward is computed again."""
    return torch._C._current_graph_task_id() != -1


def _mean_of_ranks(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of two numbers over all processes that train together."""
    both = torch.stack((low, high))
    dist.all_reduce(both)
    both /= dist.get_world_size()
    return both[0], both[1]
