"""Hugging Face's Conv1D, as GPT-2 has it: a Linear whose weight is (I, O)."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxquant.nn import DynamicQuantizedLinear
from fxquant.nn.base import Quantize
from fxquant.nn.trained_product import TrainedConv1D
from fxquant.operators.base import PRODUCTS, Operator, refuse_weight
from fxquant.qconfig import QConfig


def _refuse(module: Any) -> str | None:
    return "it is in training mode; call .eval() on it" if module.training else refuse_weight(module.weight.t())


def _convert(module: Any, qconfig: QConfig, quantize: Quantize) -> nn.Module:
    weight = quantize(module.weight.t(), qconfig)
    return DynamicQuantizedLinear(weight, module.bias, qconfig, module.weight, (0, 1))


TRANSPOSED_LINEAR = Operator(
    name="transposed_linear",
    summary="x @ weight + bias: the Conv1D of Hugging Face's transformers",
    modules=("transformers.pytorch_utils.Conv1D",),
    schemes=PRODUCTS,
    convert_module=_convert,
    refuse_module=_refuse,
    train_module=TrainedConv1D.from_float,
)
