"""The dynamically quantized LSTMCell, GRUCell and RNNCell: one step of one layer."""

from __future__ import annotations

from fxquant.nn.recurrent import (
    DynamicQuantizedGRU,
    DynamicQuantizedLSTM,
    DynamicQuantizedRecurrent,
    DynamicQuantizedRNN,
)
from fxquant.nn.recurrent_calls import CellCalls


class DynamicQuantizedCell(CellCalls, DynamicQuantizedRecurrent):
    """What the three cells share: a layer's arithmetic, one step a call."""


class DynamicQuantizedLSTMCell(DynamicQuantizedCell, DynamicQuantizedLSTM):
    """An nn.LSTMCell with quantized weights."""

    promotes = True


class DynamicQuantizedGRUCell(DynamicQuantizedCell, DynamicQuantizedGRU):
    """An nn.GRUCell with quantized weights."""


class DynamicQuantizedRNNCell(DynamicQuantizedCell, DynamicQuantizedRNN):
    """An nn.RNNCell (tanh or relu) with quantized weights."""
