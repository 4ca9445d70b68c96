"""The dynamically quantized pointwise convolution, with and without a ReLU."""

from __future__ import annotations

from typing import Any

import torch

from fxquant.errors import ShapeError
from fxquant.nn.base import Quantize, quantize_alone
from fxquant.nn.linear import DynamicQuantizedLinear
from fxquant.qconfig import QConfig, default_dynamic_qconfig


class DynamicQuantizedPointwiseConv(DynamicQuantizedLinear):
    """A Conv1d or Conv2d of kernel 1 with int8 weights: a Linear over the channels, a position being a row.

    dimensions: 1 or 2. weight: (O, I) int8; weight_scale: (O,) float32; bias: (O,) or None. input: (B, I, L), of a
    Conv2d (B, I, H, W), or without B -> the same with O channels, contiguous, in its dtype. Raises ShapeError or
    DTypeError for another input. docs/numerics.md, eq. 7–8.
    """

    dimensions: int

    @classmethod
    def from_float(
        cls, module: Any, qconfig: QConfig = default_dynamic_qconfig, quantize: Quantize = quantize_alone
    ) -> DynamicQuantizedPointwiseConv:
        """Return the quantized form of a float Conv1d or Conv2d (or ConvReLU), which is left as it is."""
        quantized = cls(quantize(module.weight.flatten(1), qconfig), module.bias, qconfig, module.in_channels)
        quantized.dimensions = len(module.kernel_size)
        return quantized

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the convolution of the input."""
        channels = -1 - self.dimensions
        ranks = (1 + self.dimensions, 2 + self.dimensions)
        if input.dim() not in ranks or input.shape[channels] != self.in_features:
            raise ShapeError(
                f"a quantized Conv{self.dimensions}d of {self.in_features} channels takes {ranks[0]}-D or {ranks[1]}-D "
                f"input with {self.in_features} in dimension {channels}, got {tuple(input.shape)}"
            )
        rows = super().forward(input.movedim(channels, -1))
        is_last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
        like_input = torch.channels_last if is_last and not input.is_contiguous() else torch.contiguous_format
        # As a convolution's output lies in memory, of which one may take a .view.
        return rows.movedim(-1, channels).contiguous(memory_format=like_input)

    def extra_repr(self) -> str:
        """Return what print shows: the sizes and the scheme."""
        return f"{super().extra_repr()}, dimensions={self.dimensions}"


class DynamicQuantizedPointwiseConvReLU(DynamicQuantizedPointwiseConv):
    """A DynamicQuantizedPointwiseConv followed by a ReLU, in one kernel."""

    relu = True
