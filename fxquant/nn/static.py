"""The statically quantized Linear and convolutions: integers in, and integers or floats out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxquant import ops
from fxquant.nn.base import Quantize, QuantizedModule, quantize_alone
from fxquant.nn.convolution import paddings
from fxquant.nn.stored import turn, turned_weight
from fxquant.qconfig import QConfig, default_static_qconfig

_CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_SHOWN = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class StaticQuantizedProduct(QuantizedModule):
    """What a static Linear and a static convolution share: int8 weights, and a call with scales.

    weight_int8: (O, ...); weight_scale, bias: (O,) float32. weight: the float weight. The graph calls it with integers
    and their scale; code beside the graph (a preserved method, a module that is not traced) calls it as the float
    module, and gets what floats and the dequantized weight give.
    """

    bias: nn.Parameter

    def __init__(
        self, module: Any, qconfig: QConfig, quantize: Quantize, turned: tuple[int, int] | None = None
    ) -> None:
        super().__init__(qconfig)
        groups = module.groups if turned else 1
        weight = turned_weight(module.weight, turned, groups) if turned else module.weight
        quantized = quantize(weight, qconfig)
        self.out_features, self.in_features = quantized.values.shape[0], quantized.values[0].numel()
        key = self.set_weight("weight", quantized, module.weight, turned, groups)
        self._tensors = (key, "weight_scale", "bias")
        bias = torch.zeros(self.out_features, device=weight.device) if module.bias is None else module.bias
        self.set_bias("bias", bias.to(torch.float32))

    def forward(
        self,
        input: torch.Tensor,
        input_scale: torch.Tensor | None = None,
        input_zero_point: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """Return the product of the input: float32, or uint8 under a scale. more: as the operator in `ops` takes it.

        input: uint8 values under (input_scale, input_zero_point), or floats without them.
        """
        if input_scale is None:
            return self._in_float(input.to(torch.float32)).to(input.dtype)
        return self._in_integers((input, input_scale, input_zero_point), (scale, zero_point), more)

    def _in_float(self, x: torch.Tensor) -> torch.Tensor:
        """Return what a float module gives that has the dequantized weight."""
        raise NotImplementedError

    def _in_integers(self, value: Sequence[Any], output: Sequence[Any], more: dict[str, Any]) -> torch.Tensor:
        """Return what the operator gives."""
        raise NotImplementedError

    def correct_bias(self, weight: torch.Tensor, mean: torch.Tensor) -> None:
        """Add to the bias (W - Ŵ) E[x]: what the integers give less than the float weight on average.

        weight: the float one; mean: (inputs,) float64, of the input's channels.
        """
        lost = weight.detach().to(torch.float64) - self.dequantize("weight").to(torch.float64)
        self.bias.add_(self._sum(lost, mean).to(self.bias.dtype))

    def _sum(self, weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return what a constant input gives on average: (O,)."""
        raise NotImplementedError


class StaticQuantizedLinear(StaticQuantizedProduct):
    """A Linear with int8 weights whose input, and mostly output, are uint8 values with scales found by calibration."""

    @classmethod
    def from_float(
        cls, module: nn.Linear, qconfig: QConfig = default_static_qconfig, quantize: Quantize = quantize_alone
    ) -> StaticQuantizedLinear:
        """Return the quantized form of a float Linear (or LinearReLU), which is left as it is."""
        return cls(module, qconfig, quantize)

    def _in_float(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantize("weight"), self.own(self._tensors)[2])

    def _in_integers(self, value: Sequence[Any], output: Sequence[Any], more: dict[str, Any]) -> torch.Tensor:
        return ops.static_linear(*value, *self.own(self._tensors), *output, **more)

    def _sum(self, weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return weight @ mean

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
        sides = [side for side in module.padding for _ in range(2)] if module.transposed else _turned(paddings(module))
        quantized._sides = tuple(sides)
        quantized._lay_out()
        return quantized

    def _lay_out(self) -> None:
        """Let the integers lie as the kernels read them; their values and shape stay.

        An output's window by places, each with all channels; depthwise, where a place has one, all outputs of a place.
        """
        weight: Any = self._buffers[self._tensors[0]]
        first = 0 if self.groups > 1 and weight.shape[1] == 1 else 1
        weight.data = weight.movedim(first, -1).contiguous().movedim(-1, first)  # in place: it may be tied

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._lay_out()

    def _in_float(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.dequantize("weight"), self.own(self._tensors)[2]
        options: Any = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        rank = weight.dim() - 2
        y: torch.Tensor
        if self.transposed:
            y = _TRANSPOSED[rank](x, weight, bias, *options)
            return y
        mode = "constant" if self.padding_mode == "zeros" else str(self.padding_mode)
        padded = F.pad(x, _turned(self._sides), mode)
        y = _CONVOLUTIONS[rank](padded, weight, bias, self.stride, 0, self.dilation, self.groups)
        return y

    def _in_integers(self, value: Sequence[Any], output: Sequence[Any], more: dict[str, Any]) -> torch.Tensor:
        sides: Any = self._sides
        if self.padding_mode != "zeros":
            value = (F.pad(value[0], _turned(sides), str(self.padding_mode)), *value[1:])
            sides = (0,) * len(sides)
        weight, weight_scale, bias = self.own(self._tensors)
        product: Any = (turn(weight, (0, 1), self.groups) if self.transposed else weight, weight_scale, bias)
        windows: Any = (self.stride, sides, self.dilation, self.groups, self.transposed, self.output_padding)
        return ops.static_convolution(*value, *product, *output, *windows, **more)

    def _sum(self, weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return what a constant input gives on average, away from the borders: (O,)."""
        sums = weight.flatten(2).sum(2)
        taps = float(math.prod(self.stride)) if self.transposed else 1.0  # an output meets one in so many
        if self.transposed:
            sums = turn(sums, (0, 1), self.groups)
        if self.transposed and self.groups == 1:
            return sums @ mean / taps
        return (sums.reshape(self.groups, -1, sums.shape[1]) @ mean.view(self.groups, -1, 1)).flatten() / taps

    def extra_repr(self) -> str:
        """Return what print shows: the sizes and the scheme."""
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in _SHOWN)
        return f"{self.in_channels}, {self.out_channels}, {shown}, {self.qconfig}"


def _turned(sides: Sequence[int]) -> list[int]:
    """Return sides of padding with the dimensions in the other order: F.pad begins with the last one."""
    return [side for at in reversed(range(0, len(sides), 2)) for side in sides[at : at + 2]]
