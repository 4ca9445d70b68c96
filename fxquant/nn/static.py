"""The statically quantized Linear and convolutions: integers in, and integers or floats out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxquant import ops
from fxquant.nn.base import Quantize, QuantizedModule, quantize_alone
from fxquant.nn.convolution import paddings
from fxquant.qconfig import QConfig, default_static_qconfig

_SHOWN = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class StaticQuantizedProduct(QuantizedModule):
    """What a static Linear and a static convolution share: int8 weights, and a call with scales.

    weight_int8: (O, ...); weight_scale, bias: (O,) float32. weight: the float weight.
    """

    bias: nn.Parameter

    def __init__(
        self, module: Any, qconfig: QConfig, quantize: Quantize, turned: tuple[int, int] | None = None
    ) -> None:
        super().__init__(qconfig)
        weight = module.weight.transpose(*turned) if turned else module.weight
        quantized = quantize(weight, qconfig)
        self.out_features, self.in_features = quantized.values.shape[0], quantized.values[0].numel()
        self._tensors = (self.set_weight("weight", quantized, module.weight, turned), "weight_scale", "bias")
        bias = torch.zeros(self.out_features, device=weight.device) if module.bias is None else module.bias
        self.set_bias("bias", bias.to(torch.float32))

    def correct_bias(self, weight: torch.Tensor, mean: torch.Tensor) -> None:
        """Add to the bias (W - Ŵ) E[x]: what the integers give less than the float weight on average.

        weight: the float one; mean: (inputs,) float64, of the input's channels.
        """
        lost = weight.detach().to(torch.float64) - self.dequantize("weight").to(torch.float64)
        self.bias.add_(self._sum(lost, mean).to(self.bias.dtype))

    def _sum(self, weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return what a constant input gives: (O,)."""
        return weight @ mean


class StaticQuantizedLinear(StaticQuantizedProduct):
    """A Linear with int8 weights whose input, and mostly output, are uint8 values with scales found by calibration."""

    @classmethod
    def from_float(
        cls, module: nn.Linear, qconfig: QConfig = default_static_qconfig, quantize: Quantize = quantize_alone
    ) -> StaticQuantizedLinear:
        """Return the quantized form of a float Linear (or LinearReLU), which is left as it is."""
        return cls(module, qconfig, quantize)

    def forward(
        self,
        input: torch.Tensor,
        input_scale: torch.Tensor,
        input_zero_point: torch.Tensor,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """Return input @ weight.T + bias: float32, or uint8 under a scale. more: as `ops.static_linear` takes it."""
        weight, weight_scale, bias = self.own(self._tensors)
        return ops.static_linear(
            input, input_scale, input_zero_point, weight, weight_scale, bias, scale, zero_point, **more
        )

    def extra_repr(self) -> str:
        """Return what print shows: the sizes and the scheme."""
        return f"{self.in_features}, {self.out_features}, {self.qconfig}"


class StaticQuantizedConv(StaticQuantizedProduct):
    """A convolution, transposed or not, of any rank, with int8 weights, from integers to integers or floats."""

    @classmethod
    def from_float(
        cls, module: Any, qconfig: QConfig = default_static_qconfig, quantize: Quantize = quantize_alone
    ) -> StaticQuantizedConv:
        """Return the quantized form of a float convolution (or one with a ReLU), which is left as it is."""
        quantized = cls(module, qconfig, quantize, (0, 1) if module.transposed else None)
        for name in ("in_channels", "out_channels", "transposed", "output_padding", *_SHOWN):
            setattr(quantized, name, getattr(module, name))
        sides = (
            [side for side in module.padding for _ in range(2)]
            if module.transposed
            else [
                side
                for at in reversed(range(len(module.kernel_size)))
                for side in paddings(module)[2 * at : 2 * at + 2]
            ]
        )
        quantized._sides = tuple(sides)
        return quantized

    def forward(
        self,
        input: torch.Tensor,
        input_scale: torch.Tensor,
        input_zero_point: torch.Tensor,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """Return the convolution of the input. more: as `ops.static_convolution` takes it."""
        weight, weight_scale, bias = self.own(self._tensors)
        sides: Any = self._sides
        if self.padding_mode != "zeros":
            rank = len(sides) // 2
            turned = [side for at in reversed(range(rank)) for side in sides[2 * at : 2 * at + 2]]
            padded, sides = F.pad(input, turned, str(self.padding_mode)), (0,) * len(sides)
        else:
            padded = input
        return ops.static_convolution(
            padded,
            input_scale,
            input_zero_point,
            weight.transpose(0, 1) if self.transposed else weight,
            weight_scale,
            bias,
            scale,
            zero_point,
            self.stride,
            sides,
            self.dilation,
            self.groups,
            self.transposed,
            self.output_padding,
            **more,
        )

    def _sum(self, weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return what a constant input gives, away from the borders: (O,)."""
        sums = weight.flatten(2).sum(2)
        if self.transposed:
            return sums.t() @ mean
        return (sums.view(self.groups, -1, sums.shape[1]) @ mean.view(self.groups, -1, 1)).flatten()

    def extra_repr(self) -> str:
        """Return what print shows: the sizes and the scheme."""
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in _SHOWN)
        return f"{self.in_channels}, {self.out_channels}, {shown}, {self.qconfig}"
