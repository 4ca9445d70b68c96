"""LSTM, GRU, RNN and their cells in quantization-aware training: the steps of `ops/recurrent.py`, with gradients.

Each weight is rounded once a call, each token that meets it by itself: the input's, and each step's hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.learned import make_weight_rounding
from fxquant.nn.recurrent_calls import CellCalls, RecurrentCalls, States
from fxquant.nn.trained import Rounds, Trained, token_rounding

Product = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


class TrainedRecurrent(RecurrentCalls, Trained):
    """What the layers share. weight_roundings, token_roundings: by the weights' names."""

    added = ("weight_roundings", "token_roundings")
    num_layers = 1
    proj_size = 0
    bidirectional = False
    batch_first = False
    dropout = 0.0
    is_cell: ClassVar[bool] = False

    def add_rounding(self) -> None:
        """Register what rounds."""
        self.weight_roundings, self.token_roundings = nn.ModuleDict(), nn.ModuleDict()
        for name, weight in self._parameters.items():
            if weight is not None and weight.dim() > 1:
                part = self.qconfig.of(name)
                self.weight_roundings[name] = nn.Identity() if part is None else make_weight_rounding(part, weight)
                self.token_roundings[name] = token_rounding(part)

    def rounds(self, module: Any) -> Iterator[Rounds]:
        """Yield what rounds each weight, and the weight."""
        for name, rounding in self.weight_roundings.items():
            yield rounding, getattr(module, name)

    def to_float(self) -> nn.Module:
        """Return the float module, with the parameters that it has now."""
        module = super().to_float()
        if isinstance(module, nn.RNNBase):  # which keeps its parameters in a list too
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        return module

    @property
    def _cells(self) -> list[str]:  # type: ignore[override]
        sides = ("", "_reverse") if self.bidirectional else ("",)
        return [""] if self.is_cell else [f"_l{layer}{side}" for layer in range(self.num_layers) for side in sides]

    def _float_name(self) -> str:
        return self.float_type.__name__

    def _name(self) -> str:
        return f"a trained {self._float_name()}"

    def _product(self, name: str) -> Product:
        """Return the product with a weight, rounded now: (rows, what is added or None) -> (M, O)."""
        weight, tokens = self.weight_roundings[name](getattr(self, name)), self.token_roundings[name]

        def multiply(rows: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
            product = F.linear(tokens(rows), weight)
            return product if start is None else product + start

        return multiply

    def _biases(self, cell: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return what is added to the input's part of the gates, and to the hidden one's."""
        if not self.bias:
            return None, None
        return getattr(self, f"bias_ih{cell}") + getattr(self, f"bias_hh{cell}"), None

    def step(self, hidden: Product, gates: torch.Tensor, bias: Any, states: States) -> States:
        """Return the states after one step. gates: the input's part of them; bias: the hidden part's."""
        raise NotImplementedError

    def run(self, x: torch.Tensor, sizes: torch.Tensor | None, states: States) -> States:
        """Return (output, *states). x: (T, B, I), or with sizes the (N, I) rows of a packed sequence."""
        counts = [x.shape[1]] * x.shape[0] if sizes is None else sizes.tolist()
        rows, ends = x.reshape(sum(counts), x.shape[-1]), []
        cells, directions = self._cells, 2 if self.bidirectional else 1
        for first in range(0, len(cells), directions):
            if first and self.dropout and self.training:
                rows = F.dropout(rows, self.dropout)
            outputs = []
            for number in range(first, first + directions):
                initial = tuple(state[number] for state in states)
                output, end = self._run_cell(cells[number], rows, counts, initial, is_reversed=number > first)
                outputs.append(output)
                ends.append(end)
            rows = torch.cat(outputs, 1)
        return rows.view(*x.shape[:-1], rows.shape[-1]), *map(torch.stack, zip(*ends, strict=True))

    def _run_cell(
        self, cell: str, rows: torch.Tensor, counts: Sequence[int], states: States, is_reversed: bool
    ) -> tuple[torch.Tensor, States]:
        """Return one direction of one layer: its outputs, (N, P), and its states at the end, each (B, …)."""
        bias, hidden_bias = self._biases(cell)
        gates, hidden = self._product(f"weight_ih{cell}")(rows, bias), self._product(f"weight_hh{cell}")
        project = self._product(f"weight_hr{cell}") if self.proj_size else None
        steps = gates.split_with_sizes(counts)  # the gradient of a slice would be as large as that of all of them
        outputs = [rows] * len(counts)
        for t in reversed(range(len(counts))) if is_reversed else range(len(counts)):
            live = counts[t]
            is_whole = live == len(states[0])  # a packed batch shrinks as sequences end
            before = states if is_whole else tuple(state[:live] for state in states)
            new = self.step(hidden, steps[t], hidden_bias, before)
            if project is not None:
                new = (project(new[0], None), *new[1:])
            outputs[t] = new[0]
            resting = () if is_whole else [state[live:] for state in states]
            states = new if is_whole else tuple(map(torch.cat, zip(new, resting, strict=True)))
        return torch.cat(outputs), states


class TrainedLSTM(TrainedRecurrent, nn.LSTM):
    """An LSTM in quantization-aware training."""

    has_cell_state = True

    def step(self, hidden: Product, gates: torch.Tensor, bias: Any, states: States) -> States:  # noqa: ARG002
        """Return (h, c) after one step."""
        h, c = states
        i, f, g, o = hidden(h, gates).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class TrainedRNN(TrainedRecurrent, nn.RNN):
    """An RNN in quantization-aware training."""

    def step(self, hidden: Product, gates: torch.Tensor, bias: Any, states: States) -> States:  # noqa: ARG002
        """Return (h,) after one step."""
        module: Any = self
        pre = hidden(states[0], gates)
        return (torch.relu(pre) if module.nonlinearity == "relu" else torch.tanh(pre),)


class _Gated(TrainedRecurrent):
    """What a GRU and its cell share: the n gate's hidden part is scaled before the input's is added."""

    promotes = True

    def _biases(self, cell: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (getattr(self, f"bias_ih{cell}"), getattr(self, f"bias_hh{cell}")) if self.bias else (None, None)

    def step(self, hidden: Product, gates: torch.Tensor, bias: Any, states: States) -> States:
        """Return (h,) after one step."""
        (h,) = states
        (r, z, n), (hr, hz, hn) = gates.chunk(3, 1), hidden(h, bias).chunk(3, 1)
        n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
        return (n + torch.sigmoid(z + hz) * (h - n),)


class TrainedGRU(_Gated, nn.GRU):
    """A GRU in quantization-aware training."""


class TrainedLSTMCell(CellCalls, TrainedLSTM, nn.LSTMCell):  # type: ignore[misc]
    """An LSTMCell in quantization-aware training."""

    is_cell = True
    promotes = True


class TrainedGRUCell(CellCalls, _Gated, nn.GRUCell):
    """A GRUCell in quantization-aware training."""

    is_cell = True


class TrainedRNNCell(CellCalls, TrainedRNN, nn.RNNCell):  # type: ignore[misc]
    """An RNNCell in quantization-aware training."""

    is_cell = True


_TRAINED: dict[type[nn.Module], type[TrainedRecurrent]] = {
    nn.LSTM: TrainedLSTM,
    nn.GRU: TrainedGRU,
    nn.RNN: TrainedRNN,
    nn.LSTMCell: TrainedLSTMCell,
    nn.GRUCell: TrainedGRUCell,
    nn.RNNCell: TrainedRNNCell,
}


def train_recurrent(module: nn.Module, qconfig: Any) -> TrainedRecurrent:
    """Return the trained form of a recurrent layer or cell."""
    trained_type = next(_TRAINED[base] for base in type(module).__mro__ if base in _TRAINED)
    return trained_type.from_float(module, qconfig)
