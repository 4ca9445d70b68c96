"""How recurrent layers and cells are called: the forms of their inputs and states, and what is wrong with others."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import PackedSequence

from fxquant.errors import DTypeError, ShapeError
from fxquant.ops.autocast import cast_dtype
from fxquant.ops.library import check_dense

States = tuple[torch.Tensor, ...]


class RecurrentCalls:
    """The calls of an LSTM, GRU or RNN, for a class whose `run` computes (output, *states)."""

    has_cell_state: ClassVar[bool] = False
    promotes: ClassVar[bool] = False  # see ops/autocast.py
    num_layers: int
    hidden_size: int
    proj_size: int
    bidirectional: bool
    batch_first: bool
    _cells: list[str]

    def run(self, x: torch.Tensor, sizes: torch.Tensor | None, states: States) -> States:
        """Return (output, *states). x: (T, B, I), or with sizes the (N, I) rows of a packed sequence."""
        raise NotImplementedError

    def run_cast(self, x: torch.Tensor, sizes: torch.Tensor | None, states: States) -> States:
        """Return (output, *states), under torch.autocast in the dtype that the float module gives there."""
        dtype, outputs = cast_dtype(x, self.promotes), self.run(x, sizes, states)
        return outputs if dtype is None else tuple(part.to(dtype) for part in outputs)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Return (output, hx).

        input: (T, B, I), with batch_first (B, T, I), without a batch (T, I), or a PackedSequence; hx: h0 of (L, B, P),
        an LSTM's (h0, c0) of (L, B, P) and (L, B, H), without a batch (L, P) and (L, H), zeros when None -> the same
        forms, in input's dtype. Raises ShapeError or DTypeError for anything else.
        """
        initial = self.check_kinds(input, hx)
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            output, *states = self.run_cast(data, sizes, self._states(data, initial, int(sizes[0]), order))
            if back is not None:
                states = [state.index_select(1, back) for state in states]
            return PackedSequence(output, sizes, order, back), self._as_given(states)
        if input.dim() not in (2, 3):
            raise ShapeError(f"{self._name()} takes 3-D input, or 2-D without a batch, got {tuple(input.shape)}")
        is_batched = input.dim() == 3
        x = input.transpose(0, 1) if is_batched and self.batch_first else input
        if not is_batched:
            x = x.unsqueeze(1)
            initial = None if initial is None else tuple(map(self._with_batch, ("h0", "c0"), initial))
        output, *states = self.run_cast(x, None, self._states(x, initial, x.shape[1], None))
        if not is_batched:
            return output.squeeze(1), self._as_given([state.squeeze(1) for state in states])
        return output.transpose(0, 1) if self.batch_first else output, self._as_given(states)

    def check_kinds(self, input: Any, hx: Any) -> States | None:
        """Return hx as a tuple of tensors, None for none, or raise DTypeError where input or hx is something else."""
        tensor = input.data if isinstance(input, PackedSequence) else input
        is_pair = self.has_cell_state and isinstance(hx, (tuple, list))
        initial = () if hx is None else tuple(hx) if is_pair else (hx,)
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            got = f"input of {getattr(tensor, 'dtype', None)} ({type(input).__name__})"
            raise DTypeError(f"{self._name()} takes float tensors, got {got}")
        if tensor.is_nested or tensor.layout is not torch.strided:
            check_dense(tensor, self._float_name())
        if (self.has_cell_state and hx is not None and not is_pair) or not all(
            isinstance(state, torch.Tensor) for state in initial
        ):
            wanted = "a pair of tensors" if self.has_cell_state else "a tensor"
            got = f"({', '.join(type(state).__name__ for state in hx)})" if isinstance(hx, tuple) else type(hx).__name__
            raise DTypeError(f"{self._name()} takes hx as {wanted}, got {got}")
        return None if hx is None else initial

    def _states(self, x: torch.Tensor, initial: States | None, batch: int, order: torch.Tensor | None) -> States:
        """Return the initial states in the batch's order, or raise ShapeError."""
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 1 + self.has_cell_state]
        if initial is None:
            return tuple([x.new_zeros(len(self._cells), batch, size) for size in sizes])
        shapes, names = [(len(self._cells), batch, size) for size in sizes], ("h0", "c0")[: len(sizes)]
        if len(initial) != len(names):
            raise ShapeError(f"{self._name()} takes hx of {' and '.join(names)}, got {len(initial)} tensors")
        for name, state, shape in zip(names, initial, shapes, strict=True):
            if tuple(state.shape) != shape:
                raise ShapeError(f"{self._name()} needs {name} of shape {shape}, got {tuple(state.shape)}")
        return initial if order is None else tuple(state.index_select(1, order) for state in initial)

    def _with_batch(self, name: str, state: torch.Tensor) -> torch.Tensor:
        if state.dim() != 2:
            raise ShapeError(f"{self._name()}: for input without a batch {name} must be 2-D, got {tuple(state.shape)}")
        return state.unsqueeze(1)

    def _as_given(self, states: list[torch.Tensor]) -> Any:
        return tuple(states) if self.has_cell_state else states[0]

    def _name(self) -> str:
        return f"a quantized {self._float_name()}"

    def _float_name(self) -> str:
        return type(self).__name__.removeprefix("DynamicQuantized")

    def flatten_parameters(self) -> None:
        """Do nothing: for callers of the nn module's method of this name."""


class CellCalls(RecurrentCalls):
    """The calls of a cell: one step."""

    input_size: int

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
