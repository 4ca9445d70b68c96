"""The dynamically quantized LSTM."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from fxquant import ops
from fxquant.errors import ShapeError
from fxquant.nn.base import Quantize, QuantizedModule, quantize_alone
from fxquant.qconfig import QConfig, default_dynamic_qconfig

State = tuple[torch.Tensor, torch.Tensor]


class DynamicQuantizedLSTM(QuantizedModule):
    """An nn.LSTM with int8 (or float16) weights, called as nn.LSTM is; made by `from_float`.

    Input rows and each step's hidden rows are quantized as they come, each with a scale of its own, so that a sequence
    gives the same bits alone, in any batch, and step by step. The buffers are named as nn.LSTM names its weights
    (weight_ih_l0: (4H, I) int8, weight_ih_l0_scale: (4H,) float32, …); bias_l0 is the sum of the two float biases.
    Dropout between layers is for training only and has no part here. docs/numerics.md, eq. 9–12.
    """

    def __init__(
        self, module: nn.LSTM, qconfig: QConfig = default_dynamic_qconfig, quantize: Quantize = quantize_alone
    ) -> None:
        super().__init__(qconfig)
        self.input_size, self.hidden_size, self.proj_size = module.input_size, module.hidden_size, module.proj_size
        self.num_layers, self.bidirectional = module.num_layers, module.bidirectional
        self.bias, self.batch_first, self.dropout = module.bias, module.batch_first, module.dropout
        self._cells = [
            f"l{layer}{side}" for layer in range(self.num_layers) for side in ("", "_reverse")[: 1 + self.bidirectional]
        ]
        self._matrices = ("ih", "hh", "hr") if self.proj_size else ("ih", "hh")
        for cell in self._cells:
            for matrix in self._matrices:
                name = f"weight_{matrix}_{cell}"
                self.set_weight(name, quantize(getattr(module, name), qconfig))
            if self.bias:
                self.set_bias(
                    f"bias_{cell}",
                    getattr(module, f"bias_ih_{cell}").float() + getattr(module, f"bias_hh_{cell}").float(),
                )

        weights = [f"weight_{matrix}_{cell}" for cell in self._cells for matrix in self._matrices]
        scales = [f"{name}_scale" for name in weights] if qconfig.weight.is_integer else []
        self._tensor_names = weights, scales, [f"bias_{cell}" for cell in self._cells] if self.bias else []

    @classmethod
    def from_float(
        cls, module: nn.LSTM, qconfig: QConfig = default_dynamic_qconfig, quantize: Quantize = quantize_alone
    ) -> DynamicQuantizedLSTM:
        """Return the quantized form of a float LSTM, which is left as it is."""
        return cls(module, qconfig, quantize)

    def forward(self, input: Any, hx: State | None = None) -> tuple[Any, State]:
        """Return (output, (h, c)).

        input: (T, B, I), with batch_first (B, T, I), without a batch (T, I), or a PackedSequence; hx: (h0, c0) of
        (L, B, P) and (L, B, H), without a batch (L, P) and (L, H), zeros when None -> the same forms, in input's dtype.
        Raises ShapeError or DTypeError for anything else.
        """
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            state = self._state(data, hx, int(sizes[0]), order)
            output, h, c = self._run(data, sizes, state)
            if back is not None:
                h, c = h.index_select(1, back), c.index_select(1, back)
            return PackedSequence(output, sizes, order, back), (h, c)
        if input.dim() not in (2, 3):
            raise ShapeError(f"a quantized LSTM takes 3-D input, or 2-D without a batch, got {tuple(input.shape)}")
        is_batched = input.dim() == 3
        time_major = input.transpose(0, 1) if is_batched and self.batch_first else input
        if not is_batched:
            time_major = time_major.unsqueeze(1)
            if hx is not None:
                hx = (self._with_batch("h0", hx[0]), self._with_batch("c0", hx[1]))
        output, h, c = self._run(time_major, None, self._state(time_major, hx, time_major.shape[1], None))
        if not is_batched:
            return output.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return output.transpose(0, 1) if self.batch_first else output, (h, c)

    def _run(
        self, x: torch.Tensor, sizes: torch.Tensor | None, state: State
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights, scales, biases = (self._own(names) for names in self._tensor_names)
        per_row, qmax = self.qconfig.per_row, self.qconfig.qmax
        return ops.lstm(x, sizes, *state, weights, scales, biases, self.bidirectional, per_row, qmax)

    def _own(self, names: list[str]) -> list[torch.Tensor]:
        """Return own tensors by name, past nn.Module's slow lookup where no compiler needs to see it."""
        if torch.compiler.is_compiling():
            return [getattr(self, name) for name in names]
        buffers, parameters = self._buffers, self._parameters
        return [buffers[name] if name in buffers else parameters[name] for name in names]  # type: ignore[misc]

    def _state(self, x: torch.Tensor, hx: State | None, batch: int, order: torch.Tensor | None) -> State:
        """Return (h0, c0) in the batch's order, or raise ShapeError."""
        cells = len(self._cells)
        shapes = [(cells, batch, self.proj_size or self.hidden_size), (cells, batch, self.hidden_size)]
        if hx is None:
            return x.new_zeros(shapes[0]), x.new_zeros(shapes[1])
        for name, state, shape in zip(("h0", "c0"), hx, shapes, strict=True):
            if tuple(state.shape) != shape:
                raise ShapeError(f"this quantized LSTM needs {name} of shape {shape}, got {tuple(state.shape)}")
        return hx if order is None else (hx[0].index_select(1, order), hx[1].index_select(1, order))

    @staticmethod
    def _with_batch(name: str, state: torch.Tensor) -> torch.Tensor:
        if state.dim() != 2:
            raise ShapeError(f"for input without a batch {name} must be 2-D, got {tuple(state.shape)}")
        return state.unsqueeze(1)

    def flatten_parameters(self) -> None:
        """Do nothing: for callers of nn.LSTM's method of this name."""

    def extra_repr(self) -> str:
        """Return what print shows: the sizes, the options that differ from the defaults, and the scheme."""
        options = ["num_layers", "batch_first", "bidirectional", "proj_size"]
        defaults = {"num_layers": 1, "batch_first": False, "bidirectional": False, "proj_size": 0}
        told = [f"{name}={getattr(self, name)}" for name in options if getattr(self, name) != defaults[name]]
        told += [] if self.bias else ["bias=False"]
        return ", ".join([str(self.input_size), str(self.hidden_size), *told, str(self.qconfig)])
