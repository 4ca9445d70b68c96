"""The operators lstm and rnn (GRU too): stacks of recurrent layers, whose weights may each have a scheme of its own.

Shapes: B batch, T time, I in, H hidden, P projection (H without one), L layers times directions. The plain torch here
is the specification of the kernels, bit for bit: see `linear`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from fxquant.errors import ArgumentError
from fxquant.formats import FLOAT32, Activation, format_of
from fxquant.numerics import dequantize, to_floats
from fxquant.ops.elementwise import gru_cell, lstm_cell, tanh
from fxquant.ops.gpu import OnGpu
from fxquant.ops.library import floats, plain
from fxquant.ops.linear import multiply
from fxquant.ops.recurrent_checks import check, checked_sizes, matrix
from fxquant.ops.register import Kernel, arguments_of, per_token_of, public

Tensors: TypeAlias = Sequence[torch.Tensor]
Multiply: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]  # rows, what is added to products

_KINDS = {"gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}  # the modes of rnn, and their names in errors


@public
def lstm(
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    h0: torch.Tensor,
    c0: torch.Tensor,
    weights: Tensors,
    scales: Tensors,
    biases: Tensors,
    bidirectional: bool = False,
    per_token: bool = True,
    qmax: int = 255,
    formats: Sequence[str] | None = None,
    *,
    per_row: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (output, h, c) of a stack of LSTM layers. docs/numerics.md, "LSTM".

    x: (T, B, I) float, or (N, I) rows of a packed sequence with batch_sizes (T,) int64; h0: (L, B, P), c0: (L, B, H),
    L = layers × directions. weights: for each of the L cells weight_ih (4H, I), weight_hh (4H, P) and, with a
    projection, weight_hr (P, H), gates in the order i, f, g, o, each stored in a format of its own; scales: as many,
    empty ones for float weights, or none at all; biases: L of (4H,), or none; formats: the weights' formats by their
    names (`fxquant.formats`), None: all int8 -> output (T, B, D·P) or (N, D·P), h (L, B, P), c (L, B, H), in x's dtype.
    """
    per_token = per_token if per_row is None else per_token_of(per_row)
    return _run_lstm((x, batch_sizes, h0, c0, weights, scales, biases, bidirectional, per_token, qmax, formats))


@public
def rnn(
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    h0: torch.Tensor,
    weights: Tensors,
    scales: Tensors,
    biases: Tensors,
    hidden_biases: Tensors,
    mode: str,
    bidirectional: bool = False,
    per_token: bool = True,
    qmax: int = 255,
    formats: Sequence[str] | None = None,
    *,
    per_row: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (output, h) of a stack of GRU or plain RNN layers. docs/numerics.md, "GRU and RNN".

    mode: "gru" (G = 3 gates, in the order r, z, n), "rnn_tanh" or "rnn_relu" (G = 1). x, batch_sizes: as for `lstm`;
    h0: (L, B, H). weights: for each cell weight_ih (G·H, I) and weight_hh (G·H, H); they, scales and formats: as for
    `lstm`; biases: L of (G·H,), or none: b_ih + b_hh, but a GRU's n part is b_in alone; hidden_biases: a GRU's L of
    b_hn (H,), else none -> output (T, B, D·H) or (N, D·H), h (L, B, H), in x's dtype.
    """
    parts = (weights, scales, biases, hidden_biases)
    per_token = per_token if per_row is None else per_token_of(per_row)
    return _run_rnn((x, batch_sizes, h0, *parts, mode, bidirectional, per_token, qmax, formats))


def _lstm_reference(a: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h, c = a.h0.to(torch.float32, copy=True), a.c0.to(torch.float32, copy=True)

    def step(cell: int, matrices: Sequence[Multiply], gates: torch.Tensor) -> torch.Tensor:
        live = gates.shape[0]
        c[cell, :live], hidden = lstm_cell(matrices[1](h[cell, :live], gates), c[cell, :live])
        for project in matrices[2:]:
            hidden = project(hidden, None)
        return hidden

    return _run_stack(a, h, step), h.to(a.x.dtype), c.to(a.x.dtype)


def _rnn_reference(a: Any) -> tuple[torch.Tensor, torch.Tensor]:
    h = a.h0.to(torch.float32, copy=True)

    def step(cell: int, matrices: Sequence[Multiply], gates: torch.Tensor) -> torch.Tensor:
        before = h[cell, : gates.shape[0]]
        if a.mode == "gru":
            both = gates[:, : 2 * h.shape[2]]
            bias = a.hidden_biases[cell].to(torch.float32) if a.hidden_biases else gates.new_full((h.shape[2],), -0.0)
            start = torch.cat((both, bias.expand_as(before)), dim=1)  # y + -0 is y, to the bit
            return gru_cell(matrices[1](before, start), gates[:, both.shape[1] :], before)
        pre = matrices[1](before, gates)
        return pre.relu_() if a.mode == "rnn_relu" else tanh(pre)

    return _run_stack(a, h, step), h.to(a.x.dtype)


def _run_stack(a: Any, h: torch.Tensor, step: Callable[[int, Sequence[Multiply], torch.Tensor], torch.Tensor]) -> Any:
    """Run all layers and directions over time; h (L, B, P) is advanced in place. Returns the last layer's outputs.

    step(cell, matrices, gates): the hidden rows (B', P) that follow from the input's part of the gates, (B', G·H).
    """
    cells, directions = h.shape[0], 2 if a.bidirectional else 1
    per_cell = len(a.weights) // cells
    sizes = [a.x.shape[1]] * a.x.shape[0] if a.batch_sizes is None else a.batch_sizes.tolist()
    starts = [0, *itertools.accumulate(sizes)]
    rows = a.x.reshape(starts[-1], a.x.shape[-1]).to(torch.float32)
    for first in range(0, cells, directions):
        output = rows.new_empty(rows.shape[0], directions * h.shape[2])
        for cell in range(first, first + directions):
            widths = (rows.shape[1], h.shape[2], *((a.c0.shape[2],) if per_cell == 3 else ()))
            matrices = [_multiplier(a, cell * per_cell + i, columns) for i, columns in enumerate(widths)]
            gates = matrices[0](rows, a.biases[cell].to(torch.float32) if a.biases else None)
            columns = slice((cell - first) * h.shape[2], (cell - first + 1) * h.shape[2])
            for t in reversed(range(len(sizes))) if cell > first else range(len(sizes)):
                live = slice(starts[t], starts[t + 1])  # a packed batch shrinks as sequences end
                hidden = step(cell, matrices, gates[live])
                h[cell, : sizes[t]] = output[live, columns] = hidden
        rows = output
    return rows.reshape(*a.x.shape[:-1], rows.shape[-1]).to(a.x.dtype)


def _multiplier(a: Any, i: int, columns: int) -> Multiply:
    """Return the product with the weight i, of so many columns."""
    weight = matrix(a, i, columns)
    if weight.format.activation is Activation.FLOAT:  # widened once, not at each step
        weight = to_floats(dequantize(replace(weight, scale=None)), FLOAT32)
    return lambda rows, start: multiply(rows, weight, start, a.per_token, a.qmax)


def _check_lstm(a: Any) -> None:
    check("LSTM", a, (a.h0, a.c0), ())


def _check_rnn(a: Any) -> None:
    if a.mode not in _KINDS:
        raise ArgumentError(f"the operator rnn takes one of the modes {', '.join(map(repr, _KINDS))}, got {a.mode!r}")
    check(_KINDS[a.mode], a, (a.h0,), a.hidden_biases)


def _fake(a: Any) -> tuple[torch.Tensor, torch.Tensor]:
    columns = a.h0.shape[-1] * (2 if a.bidirectional else 1)
    return a.x.new_empty((*a.x.shape[:-1], columns)), a.x.new_empty(a.h0.shape)


def _serves(a: Any) -> bool:
    """Return whether Triton's kernels compute a call: integer weights alone, a scale a token, and nothing empty."""
    states = (a.h0, a.c0) if hasattr(a, "c0") else (a.h0,)
    is_whole = all(format_of(name).activation is not Activation.FLOAT for name in a.formats or ())
    return is_whole and a.per_token and all(tensor.numel() for tensor in (a.x, *states))


def _prepare_lstm(a: Any) -> Any:
    return None if 0 in (a.x.numel(), a.h0.numel(), a.c0.numel()) else a._replace(c0=floats(a.c0), **_prepare(a))


def _prepare_rnn(a: Any) -> Any:
    biases = [floats(bias) for bias in a.hidden_biases]
    return None if 0 in (a.x.numel(), a.h0.numel()) else a._replace(hidden_biases=biases, **_prepare(a))


def _prepare(a: Any) -> dict[str, Any]:
    return {
        "x": floats(a.x),
        "batch_sizes": None if a.batch_sizes is None else torch.tensor(checked_sizes(a)),
        "h0": floats(a.h0),
        "weights": [plain(weight) for weight in a.weights],
        "scales": [plain(scale) if scale.dtype is torch.bfloat16 else floats(scale) for scale in a.scales],
        "biases": [floats(bias) for bias in a.biases],
    }


def _finish(out: Tensors, a: Any) -> Any:
    return tuple(part.to(a.x.dtype) for part in out)


_LSTM = Kernel[tuple[torch.Tensor, torch.Tensor, torch.Tensor]](
    name="lstm",
    schema="(Tensor x, Tensor? batch_sizes, Tensor h0, Tensor c0, Tensor[] weights, Tensor[] scales, Tensor[] biases,"
    " bool bidirectional=False, bool per_token=True, int qmax=255, str[]? formats=None) -> (Tensor, Tensor, Tensor)",
    arguments=arguments_of(lstm),
    reference=_lstm_reference,
    check=_check_lstm,
    fake=lambda a: (*_fake(a), a.x.new_empty(a.c0.shape)),
    prepare=_prepare_lstm,
    finish=_finish,
    on_gpu=OnGpu("triton_recurrent", "lstm", _serves, host=("batch_sizes",)),
    floats=("x", "h0", "c0", "biases"),
)
_run_lstm = _LSTM.register()

_RNN = Kernel[tuple[torch.Tensor, torch.Tensor]](
    name="rnn",
    schema="(Tensor x, Tensor? batch_sizes, Tensor h0, Tensor[] weights, Tensor[] scales, Tensor[] biases,"
    " Tensor[] hidden_biases, str mode, bool bidirectional=False, bool per_token=True, int qmax=255,"
    " str[]? formats=None) -> (Tensor, Tensor)",
    arguments=arguments_of(rnn),
    reference=_rnn_reference,
    check=_check_rnn,
    fake=_fake,
    prepare=_prepare_rnn,
    finish=_finish,
    on_gpu=OnGpu("triton_recurrent", "rnn", _serves, host=("batch_sizes",)),
    floats=("x", "h0", "biases", "hidden_biases"),
)
_run_rnn = _RNN.register()
