"""Linear and convolutions in quantization-aware training: they round their weights, and what they take.

A BatchNorm after one stays a module of its own; its weight and running variance come in as arguments, since the weights
are rounded as they will be folded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.learned import LearnedWeight, make_weight_rounding
from fxquant.nn.convolution import paddings
from fxquant.nn.stored import turn, turned_weight
from fxquant.nn.trained import Rounds, Trained
from fxquant.qconfig import QConfig
from fxquant.snapshot import snapshot

_LEAST_GAIN = 1e-18
"""A smaller factor of a folded normalization counts as one of weight 1: its channel gives its bias alone anyway."""


class TrainedProduct(Trained):
    """What Linear and the convolutions share. norm_eps: of the BatchNorm after it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    norm_eps = 0.0
    turned: tuple[int, int] | None = None

    def _turned(self, weight: Any) -> Any:
        return turn(weight, self.turned, self._turned_groups) if self.turned else weight

    @property
    def _turned_groups(self) -> int:
        return int(vars(self).get("groups", 1)) if self.turned else 1

    def rounds(self, module: Any) -> Iterator[Rounds]:
        """Yield what rounds the weight, and the weight as it is quantized."""
        weight = module.weight
        yield self.weight_rounding, turned_weight(weight, self.turned, self._turned_groups) if self.turned else weight

    def rounded(self, gamma: torch.Tensor | None, variance: torch.Tensor | None) -> torch.Tensor:
        """Return the rounded weight. gamma, variance: of the BatchNorm after it, (O,); None: there is none.

        With one: W = Q(w g) / g with the factor g = γ / √(σ² + ε) of running statistics, as in Jacob et al. 2018. The
        BatchNorm then uses its batch's statistics, which is the correction of Krishnamoorthi 2018, "Quantizing deep
        convolutional networks for efficient inference", without a division of what the product gives. Where scales are
        symmetric and one a channel, Q(w g) is g Q(w), so that training rounds w itself; eval folds, for the same bits
        as the quantized model's integers.
        """
        weight = self._turned(self.weight)
        if (
            variance is None
            or not self.weight_rounding.rounds
            or (self.training and self.weight_rounding.is_scale_free)
        ):
            weight = self.weight_rounding(weight)
        else:
            gain = self._safe_gain(gamma, variance)
            weight = self.weight_rounding(weight * gain) / gain
        rounded: torch.Tensor = self._turned(weight)
        return rounded

    def _safe_gain(self, gamma: torch.Tensor | None, variance: torch.Tensor) -> torch.Tensor:
        """Return the factor of the BatchNorm after it, (O, 1, ...), that of weight 1 where it is next to nothing."""
        gain, safe = _gain(gamma, variance.detach(), self.norm_eps)
        gain = torch.where(gain.abs() < _LEAST_GAIN, safe, gain)
        return (snapshot(gain) if self.training else gain).view(-1, *[1] * (self.weight.dim() - 1))

    def precede(self, norm: Any) -> None:
        """Take note of the BatchNorm after it: with it folded, a learned step size begins otherwise."""
        self.norm_eps = norm.eps
        if isinstance(self.weight_rounding, LearnedWeight):
            weight = self._turned(self.weight).detach() * self._safe_gain(norm.weight, norm.running_var)
            self.weight_rounding = make_weight_rounding(self.qconfig, weight)

    def folded(self, norm: Any) -> nn.Module:
        """Return the float module with a BatchNorm folded into it: the weights that `rounded` rounds in eval mode."""
        module: Any = self.to_float()
        weight = module.weight.detach()
        gain, _ = _gain(norm.weight, norm.running_var, norm.eps)
        shape = (-1, *[1] * (weight.dim() - 1))
        bias = 0.0 if module.bias is None else module.bias.detach().double()
        shift = 0.0 if norm.bias is None else norm.bias.detach().double()
        folded_bias = (bias - norm.running_mean.double()) * gain.double() + shift
        folded = self._turned(self._turned(weight) * gain.view(shape))
        module.weight = nn.Parameter(folded, module.weight.requires_grad)
        module.bias = nn.Parameter(folded_bias.to(weight.dtype), module.weight.requires_grad)
        return module  # type: ignore[no-any-return]


@torch.no_grad()
def _gain(gamma: torch.Tensor | None, variance: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a normalization's factor γ / √(σ² + ε), and the same for γ = 1: (O,) in the variance's dtype."""
    plain = (variance.double() + eps).rsqrt()
    gain = plain if gamma is None else plain * gamma.detach().double()
    return gain.to(variance.dtype), plain.to(variance.dtype)


class TrainedLinear(TrainedProduct, nn.Linear):  # type: ignore[misc]
    """A Linear in quantization-aware training."""

    def forward(
        self, input: torch.Tensor, gamma: torch.Tensor | None = None, variance: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the product of the rounded input and weight. gamma, variance: see `rounded`."""
        return F.linear(self.input_rounding(input), self.rounded(gamma, variance), self.bias)


class _TrainedConv(TrainedProduct):
    def forward(
        self, input: torch.Tensor, gamma: torch.Tensor | None = None, variance: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the convolution by the rounded weight. gamma, variance: see `rounded`."""
        y: torch.Tensor = self._conv_forward(input, self.rounded(gamma, variance), self.bias)  # type: ignore[operator]
        return y


class TrainedConv1d(_TrainedConv, nn.Conv1d):
    """A Conv1d in quantization-aware training."""


class TrainedConv2d(_TrainedConv, nn.Conv2d):
    """A Conv2d in quantization-aware training."""


class TrainedConv3d(_TrainedConv, nn.Conv3d):
    """A Conv3d in quantization-aware training."""


class TrainedWindows(TrainedProduct):
    """A Conv1d or Conv2d without groups whose windows are rounded one by one: a Linear of windows."""

    def rounds(self, module: Any) -> Iterator[Rounds]:
        """Yield what rounds the weight, and the weight in the order of a window."""
        yield self.weight_rounding, module.weight.transpose(1, -1)

    def forward(
        self, input: torch.Tensor, gamma: torch.Tensor | None = None, variance: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the convolution of the rounded windows. gamma, variance: see `rounded`."""
        module: Any = self
        if input.dim() < self.weight.dim():
            return self.forward(input.unsqueeze(0), gamma, variance).squeeze(0)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(input, paddings(module), mode)
        flat = [1] * (4 - x.dim())  # F.unfold takes images
        sizes = [(*flat, *numbers) for numbers in (module.kernel_size, module.dilation, module.stride)]
        kernel, dilation, stride = sizes
        image = x if x.dim() == 4 else x.unsqueeze(2)
        windows = F.unfold(image, kernel, dilation, 0, stride).transpose(1, 2)
        y = F.linear(self.input_rounding(windows), self.rounded(gamma, variance).flatten(1), self.bias)
        steps = zip(x.shape[2:], module.kernel_size, module.dilation, module.stride, strict=True)
        shape = [(size - (kernel - 1) * dilation - 1) // stride + 1 for size, kernel, dilation, stride in steps]
        return y.transpose(1, 2).reshape(*y.shape[::2], *shape)


class TrainedWindows1d(TrainedWindows, nn.Conv1d):
    """A dynamic Conv1d in quantization-aware training."""


class TrainedWindows2d(TrainedWindows, nn.Conv2d):
    """A dynamic Conv2d in quantization-aware training."""


class TrainedConv1D(TrainedProduct):
    """Hugging Face's Conv1D, a Linear whose weight is (I, O), in quantization-aware training."""

    turned = (0, 1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the product of the rounded input and weight."""
        return F.linear(self.input_rounding(input), self.rounded(None, None).t(), self.bias)


class _TrainedTransposed(TrainedProduct):
    turned = (0, 1)

    def forward(
        self,
        input: torch.Tensor,
        gamma: torch.Tensor | None = None,
        variance: torch.Tensor | None = None,
        output_size: list[int] | None = None,
    ) -> torch.Tensor:
        """Return the transposed convolution by the rounded weight. gamma, variance: see `rounded`."""
        module: Any = self
        rank = module.weight.dim() - 2
        convolve: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[rank]
        sizes = (module.stride, module.padding, module.kernel_size, rank, module.dilation)
        more = module.output_padding if output_size is None else module._output_padding(input, output_size, *sizes)
        weight = self.rounded(gamma, variance)
        y: torch.Tensor = convolve(
            input, weight, self.bias, module.stride, module.padding, more, module.groups, module.dilation
        )
        return y


class TrainedConvTranspose1d(_TrainedTransposed, nn.ConvTranspose1d):  # type: ignore[misc]
    """A ConvTranspose1d in quantization-aware training."""


class TrainedConvTranspose2d(_TrainedTransposed, nn.ConvTranspose2d):  # type: ignore[misc]
    """A ConvTranspose2d in quantization-aware training."""


class TrainedConvTranspose3d(_TrainedTransposed, nn.ConvTranspose3d):  # type: ignore[misc]
    """A ConvTranspose3d in quantization-aware training."""


_TRAINED: dict[type[nn.Module], type[TrainedProduct]] = {
    nn.Linear: TrainedLinear,
    nn.Conv1d: TrainedConv1d,
    nn.Conv2d: TrainedConv2d,
    nn.Conv3d: TrainedConv3d,
    nn.ConvTranspose1d: TrainedConvTranspose1d,
    nn.ConvTranspose2d: TrainedConvTranspose2d,
    nn.ConvTranspose3d: TrainedConvTranspose3d,
}
_OF_WINDOWS: dict[type[nn.Module], type[TrainedProduct]] = {nn.Conv1d: TrainedWindows1d, nn.Conv2d: TrainedWindows2d}


def train_product(module: nn.Module, qconfig: QConfig) -> TrainedProduct:
    """Return the trained form of a Linear or a convolution."""
    known = _TRAINED if qconfig.is_static or isinstance(module, nn.Linear) else _OF_WINDOWS
    trained_type = next(known[base] for base in type(module).__mro__ if base in known)
    return trained_type.from_float(module, qconfig)
