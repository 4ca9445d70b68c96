"""LSTM, GRU, RNN and their cells: input rows and each step's hidden rows quantized as they come, a scheme a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fxquant.nn import (
    DynamicQuantizedGRU,
    DynamicQuantizedGRUCell,
    DynamicQuantizedLSTM,
    DynamicQuantizedLSTMCell,
    DynamicQuantizedRNN,
    DynamicQuantizedRNNCell,
)
from fxquant.nn.base import Quantize
from fxquant.nn.trained_recurrent import train_recurrent
from fxquant.operators.base import PRODUCTS, Operator, refuse_parameters
from fxquant.qconfig import QConfig

_QUANTIZED: dict[type[nn.Module], Any] = {
    nn.LSTM: DynamicQuantizedLSTM,
    nn.GRU: DynamicQuantizedGRU,
    nn.RNN: DynamicQuantizedRNN,
    nn.LSTMCell: DynamicQuantizedLSTMCell,
    nn.GRUCell: DynamicQuantizedGRUCell,
    nn.RNNCell: DynamicQuantizedRNNCell,
}


def _names(module: nn.RNNBase | nn.RNNCellBase) -> Sequence[str]:
    return module._flat_weights_names if isinstance(module, nn.RNNBase) else ("weight_ih", "weight_hh")


def _parts(module: nn.RNNBase | nn.RNNCellBase) -> tuple[str, ...]:
    return tuple(name for name in _names(module) if name.startswith("weight"))


def _refuse(module: nn.RNNBase | nn.RNNCellBase) -> str | None:
    if any(name not in module._parameters for name in _names(module)):
        return "its weights are recomputed at each call (weight_norm, pruning or the like); remove that first"
    return refuse_parameters(module)


def _convert(module: nn.Module, qconfig: QConfig, quantize: Quantize) -> nn.Module:
    quantized_type = next(_QUANTIZED[base] for base in type(module).__mro__ if base in _QUANTIZED)
    quantized: nn.Module = quantized_type.from_float(module, qconfig, quantize)
    return quantized


def _row(name: str, summary: str, *modules: type[nn.Module]) -> Operator:
    return Operator(
        name=name,
        summary=summary,
        modules=modules,
        schemes=PRODUCTS,
        convert_module=_convert,
        refuse_module=_refuse,
        train_module=train_recurrent,
        parts=_parts,
    )


LSTM = _row(
    "lstm",
    "nn.LSTM with any number of layers, bidirectional, batch_first, with projections, packed sequences",
    nn.LSTM,
)
RNN = _row(
    "rnn",
    "nn.GRU and nn.RNN (tanh, relu) with any number of layers, bidirectional, batch_first, packed sequences",
    nn.GRU,
    nn.RNN,
)
CELL = _row("cell", "nn.LSTMCell, nn.GRUCell and nn.RNNCell: one step a call", nn.LSTMCell, nn.GRUCell, nn.RNNCell)
