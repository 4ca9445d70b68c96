"""The dynamically quantized Linear, with and without a ReLU."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from fxquant import ops
from fxquant.nn.base import Quantize, QuantizedModule, quantize_alone
from fxquant.numerics import QuantizedTensor
from fxquant.qconfig import QConfig, default_dynamic_qconfig


class QuantizedProduct(QuantizedModule):
    """What a quantized Linear and a convolution of windows share: x @ weight.T + bias, x quantized token by token.

    weight_int8, or with another format's name: (O, stored columns); weight_scale: (O,) float32, or in groups of G
    columns (O, ceil(I / G)) bfloat16; bias: (O,) or None. input: (..., I) float -> (..., O) in its dtype. weight: the
    float weight, dequantized when it is read. Raises ShapeError or DTypeError for another input. docs/numerics.md,
    "int8 output".
    """

    relu: ClassVar[bool] = False
    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: torch.Tensor | None = None,
        qconfig: QConfig = default_dynamic_qconfig,
        like: torch.Tensor | None = None,
        turned: tuple[int, int] | None = None,
    ) -> None:
        """Take a quantized weight. like: the float one, (O, I), or its transpose."""
        super().__init__(qconfig)
        self.out_features, self.in_features = weight.values.shape[0], weight.columns
        if like is None:
            like = torch.empty(self.out_features, self.in_features, device="meta")
        self._tensors = (self.set_weight("weight", weight, like, turned), "weight_scale", "bias")
        self.set_bias("bias", bias)
        self._how = (qconfig.per_token, qconfig.qmax, *qconfig.layout(self.in_features))  # once, not at each call

    @classmethod
    def from_float(
        cls, module: nn.Linear, qconfig: QConfig = default_dynamic_qconfig, quantize: Quantize = quantize_alone
    ) -> QuantizedProduct:
        """Return the quantized form of a float Linear (or LinearReLU), which is left as it is."""
        return cls(quantize(module.weight, qconfig), module.bias, qconfig, module.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input @ weight.T + bias."""
        weight, scale, bias = self.own(self._tensors)
        return ops.linear(input, weight, scale, bias, self.relu, *self._how)

    def extra_repr(self) -> str:
        """Return what print shows: the sizes and the scheme."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.qconfig}"


class DynamicQuantizedLinear(QuantizedProduct, nn.Linear):  # type: ignore[misc]
    """A Linear with weights of int8 or another format; its input is quantized at each call, token by token.

    It is an instance of nn.Linear, and gradients pass through it to its input, so that adapters (LoRA) attach to it;
    its integers do not train. Its tensors: `QuantizedProduct`.
    """


class DynamicQuantizedLinearReLU(DynamicQuantizedLinear):
    """A DynamicQuantizedLinear followed by a ReLU, in one kernel."""

    relu = True
