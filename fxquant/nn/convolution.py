"""The dynamically quantized Conv1d and Conv2d, with and without a ReLU."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F

from fxquant import ops
from fxquant.errors import ShapeError
from fxquant.nn.base import Quantize, quantize_alone
from fxquant.nn.linear import QuantizedProduct
from fxquant.ops.library import check_dense
from fxquant.qconfig import QConfig, default_dynamic_qconfig

_SHOWN = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


class DynamicQuantizedConv(QuantizedProduct):
    """A Conv1d or Conv2d without groups, with int8 weights: a Linear of windows, each a token with its own scale.

    weight_int8: (O, k · I), of a Conv2d (O, kw · kh · I): the window from left to right, a column from top to bottom, a
    position's channels; weight_scale: (O,) float32; weight: the float one; bias: (O,) or None. input: (B, I, L), for a
    Conv2d (B, I, H, W), or without B -> the convolution's output in the input's dtype, contiguous or channels last as
    the input is. Raises ShapeError or DTypeError for another input. docs/numerics.md, "window".
    """

    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str

    @classmethod
    def from_float(
        cls, module: Any, qconfig: QConfig = default_dynamic_qconfig, quantize: Quantize = quantize_alone
    ) -> DynamicQuantizedConv:
        """Return the quantized form of a float Conv1d or Conv2d (or ConvReLU), which is left as it is."""
        weight = quantize(module.weight.transpose(1, -1), qconfig)
        values = weight.values.flatten(1)
        flat = dataclasses.replace(weight, values=values, columns=values.shape[1])
        quantized = cls(flat, module.bias, qconfig, module.weight, (1, -1))
        for name in ("in_channels", "out_channels", "groups", "transposed", "output_padding", *_SHOWN):
            setattr(quantized, name, getattr(module, name))
        quantized.padding = paddings(module)
        return quantized

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the convolution of the input."""
        rank = 1 + len(self.kernel_size)
        check_dense(input, f"Conv{rank - 1}d")
        if input.dim() not in (rank, rank + 1) or input.shape[-rank] != self.in_channels:
            raise ShapeError(
                f"a quantized Conv{rank - 1}d of {self.in_channels} channels takes {rank}-D or {rank + 1}-D input with "
                f"{self.in_channels} in dimension {-rank}, got {tuple(input.shape)}"
            )
        if input.dim() == rank:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        rows = super().forward(self._windows(input))
        # Laid out as a convolution's output, so that .view works on it.
        channels, *size = input.shape[1:]
        if rank == 3 and input.stride() == (math.prod(size) * channels, 1, size[1] * channels, channels):
            return rows.movedim(-1, 1)
        return ops.transpose(rows.flatten(1, -2)).view(rows.shape[0], self.out_features, *rows.shape[1:-1])

    def _windows(self, input: torch.Tensor) -> torch.Tensor:
        """Return each position's window, (B, ..., window): along the width a view, where windows overlap in memory."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        if mode != "constant":
            self._check_padding(input)
        padded = F.pad(input, self.padding, mode) if any(self.padding) else input
        x = padded.movedim(1, -1)
        if not x.is_contiguous():
            x = ops.transpose(padded.flatten(2)).view(input.shape[0], *padded.shape[2:], self.in_channels)
        spans = [(size - 1) * step + 1 for size, step in zip(self.kernel_size, self.dilation, strict=True)]
        if any(size < span for size, span in zip(x.shape[1:], spans, strict=False)):
            raise ShapeError(
                f"a quantized Conv{len(spans)}d whose kernel spans {tuple(spans)} takes at least as many positions, "
                f"got {tuple(input.shape)}, padded to {tuple(x.shape[1:-1])}"
            )
        for dim, (span, stride, step) in enumerate(zip(spans, self.stride, self.dilation, strict=True), start=1):
            if dim == x.dim() - 2 and step == 1:  # then each window is contiguous
                width = x.shape[-1]
                return x.flatten(-2).unfold(-1, span * width, stride * width)
            x = x.unfold(dim, span, stride)[..., ::step].transpose(-1, -2).flatten(-2)
        return x

    def _check_padding(self, input: torch.Tensor) -> None:
        """Raise ShapeError for an input, (B, I, ...), that has too few positions for its padding."""
        sizes = input.shape[2:]
        spare = {"reflect": 1, "circular": 0}.get(self.padding_mode)  # positions that padding does not copy
        sides = tuple(zip(reversed(self.padding[::2]), reversed(self.padding[1::2]), strict=True))
        needed = [1 if spare is None or not any(side) else max(side) + spare for side in sides]
        if any(size < least for size, least in zip(sizes, needed, strict=True)):
            raise ShapeError(
                f"a quantized Conv{len(sizes)}d with padding_mode={self.padding_mode!r} and a padding of {sides} "
                f"(before and after, a dimension) takes at least {tuple(needed)} positions, got {tuple(sizes)}"
            )

    def extra_repr(self) -> str:
        """Return what print shows: the sizes and the scheme."""
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in _SHOWN)
        bias = self.bias is not None
        return f"{self.in_channels}, {self.out_features}, {shown}, bias={bias}, {self.qconfig}"


class DynamicQuantizedConvReLU(DynamicQuantizedConv):
    """A DynamicQuantizedConv followed by a ReLU, in one kernel."""

    relu = True


def paddings(module: Any) -> tuple[int, ...]:
    """Return a convolution's padding as F.pad takes it: before and after in each dimension, the last one first."""
    kernel, dilation, padding = module.kernel_size, module.dilation, module.padding
    if padding == "same":
        whole = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    else:
        whole = [0] * len(kernel) if padding == "valid" else [2 * part for part in padding]
    return tuple(part for total in reversed(whole) for part in (total // 2, total - total // 2))
