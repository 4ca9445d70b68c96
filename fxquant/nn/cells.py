"""The dynamically quantized LSTMCell, GRUCell and RNNCell: one step of one layer."""

from __future__ import annotations

from typing import Any

import torch

from fxquant.errors import ShapeError
from fxquant.nn.recurrent import (
    DynamicQuantizedGRU,
    DynamicQuantizedLSTM,
    DynamicQuantizedRecurrent,
    DynamicQuantizedRNN,
)


class DynamicQuantizedCell(DynamicQuantizedRecurrent):
    """What the three cells share: a layer's arithmetic, one step a call."""

    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:
        """Return the next state: h, an LSTMCell's (h, c).

        input: (B, I) or (I,); hx: h of (B, H) or (H,), an LSTMCell's (h, c), zeros when None -> the same forms, in
        input's dtype. Raises ShapeError or DTypeError for anything else.
        """
        initial = self.check_kinds(input, hx)
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise ShapeError(
                f"{self._name()} takes (B, I) or (I,) with I = {self.input_size}, got {tuple(input.shape)}"
            )
        is_batched = input.dim() == 2
        x = input.unsqueeze(0) if is_batched else input.view(1, 1, -1)
        if initial is not None:
            if any(state.dim() != input.dim() for state in initial):
                raise ShapeError(f"{self._name()} takes input and hx both with or both without a batch")
            wanted = (*input.shape[:-1], self.hidden_size)
            for state in initial:
                if tuple(state.shape) != wanted:
                    raise ShapeError(f"{self._name()} needs hx of shape {wanted}, got {tuple(state.shape)}")
            initial = tuple(state.unsqueeze(0) if is_batched else state.view(1, 1, -1) for state in initial)
        _, *states = self.run_cast(x, None, self._states(x, initial, x.shape[1], None))
        return self._as_given([state.squeeze(0) if is_batched else state.view(-1) for state in states])


class DynamicQuantizedLSTMCell(DynamicQuantizedCell, DynamicQuantizedLSTM):
    """An nn.LSTMCell with quantized weights."""

    promotes = True


class DynamicQuantizedGRUCell(DynamicQuantizedCell, DynamicQuantizedGRU):
    """An nn.GRUCell with quantized weights."""


class DynamicQuantizedRNNCell(DynamicQuantizedCell, DynamicQuantizedRNN):
    """An nn.RNNCell (tanh or relu) with quantized weights."""
