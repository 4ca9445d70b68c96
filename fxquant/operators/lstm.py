"""LSTM: int8 weights, input rows and each step's hidden rows quantized as they come."""

from __future__ import annotations

from torch import nn

from fxquant.nn import DynamicQuantizedLSTM
from fxquant.operators.base import FLOAT16_WEIGHTS, INT8_DYNAMIC, Operator, refuse_parameters


def _refuse(module: nn.LSTM) -> str | None:
    if any(name not in module._parameters for name in module._flat_weights_names):
        return "its weights are recomputed at each call (weight_norm, pruning or the like); remove that first"
    return refuse_parameters(module)


LSTM = Operator(
    name="lstm",
    summary="nn.LSTM with any number of layers, bidirectional, batch_first, with projections, packed sequences",
    modules=(nn.LSTM,),
    schemes=(INT8_DYNAMIC, FLOAT16_WEIGHTS),
    convert_module=DynamicQuantizedLSTM.from_float,
    refuse_module=_refuse,
)
