"""LSTM, GRU and plain RNN layers in plain torch: the specification of the recurrent kernels. See `reference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from fxquant.ops.reference import expm1_, multiply

Matrix: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
Multiply: TypeAlias = Callable[[torch.Tensor, Matrix, torch.Tensor | None], torch.Tensor]


def lstm(
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    h0: torch.Tensor,
    c0: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    bidirectional: bool = False,
    per_row: bool = True,
    qmax: int = 255,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (output, h, c) of a stack of LSTM layers. docs/numerics.md, "LSTM".

    x: (T, B, I) float, or (N, I) rows of a packed sequence with batch_sizes (T,) int64; h0: (L, B, P), c0: (L, B, H),
    L = layers × directions. weights: for each of the L cells weight_ih (4H, I), weight_hh (4H, P) and, with a
    projection, weight_hr (P, H), gates in the order i, f, g, o, each of a scheme of its own (`reference.multiply`);
    scales: as many, empty ones for float weights, or none at all; biases: L of (4H,), or none
    -> output (T, B, D·P) or (N, D·P), h (L, B, P), c (L, B, H), in x's dtype.
    """
    h, c = h0.to(torch.float32, copy=True), c0.to(torch.float32, copy=True)
    matmul = _multiplier(per_row, qmax)

    def step(cell: int, matrices: Sequence[Matrix], gates: torch.Tensor) -> torch.Tensor:
        live = gates.shape[0]
        c[cell, :live], hidden = lstm_cell(matmul(h[cell, :live], matrices[1], gates), c[cell, :live])
        for matrix in matrices[2:]:
            hidden = matmul(hidden, matrix, None)
        return hidden

    output = _run_stack(x, batch_sizes, h, weights, scales, biases, bidirectional, matmul, step)
    return output, h.to(x.dtype), c.to(x.dtype)


def rnn(
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    h0: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    hidden_biases: Sequence[torch.Tensor],
    mode: str,
    bidirectional: bool = False,
    per_row: bool = True,
    qmax: int = 255,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (output, h) of a stack of GRU or plain RNN layers. docs/numerics.md, "GRU and RNN".

    mode: "gru" (G = 3 gates, in the order r, z, n), "rnn_tanh" or "rnn_relu" (G = 1). x, batch_sizes: as for `lstm`;
    h0: (L, B, H). weights: for each cell weight_ih (G·H, I) and weight_hh (G·H, H); they and scales: as for `lstm`;
    biases: L of (G·H,), or none: b_ih + b_hh, but a GRU's n part is b_in alone; hidden_biases: a GRU's L of b_hn (H,),
    else none -> output (T, B, D·H) or (N, D·H), h (L, B, H), in x's dtype.
    """
    h = h0.to(torch.float32, copy=True)
    matmul = _multiplier(per_row, qmax)

    def step(cell: int, matrices: Sequence[Matrix], gates: torch.Tensor) -> torch.Tensor:
        before = h[cell, : gates.shape[0]]
        if mode == "gru":
            both = gates[:, : 2 * h.shape[2]]
            own = hidden_biases[cell].to(torch.float32) if hidden_biases else gates.new_full((h.shape[2],), -0.0)
            start = torch.cat((both, own.expand_as(before)), dim=1)  # y + -0 is y, to the bit
            return gru_cell(matmul(before, matrices[1], start), gates[:, both.shape[1] :], before)
        pre = matmul(before, matrices[1], gates)
        return pre.relu_() if mode == "rnn_relu" else tanh(pre)

    output = _run_stack(x, batch_sizes, h, weights, scales, biases, bidirectional, matmul, step)
    return output, h.to(x.dtype)


def _multiplier(per_row: bool, qmax: int) -> Multiply:
    def matmul(rows: torch.Tensor, matrix: Matrix, start: torch.Tensor | None) -> torch.Tensor:
        return multiply(rows, *matrix, start, per_row, qmax)

    return matmul


def _run_stack(
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    h: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    bidirectional: bool,
    matmul: Multiply,
    step: Callable[[int, Sequence[Matrix], torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Run all layers and directions over time; h (L, B, P) is advanced in place. Returns the last layer's outputs.

    step(cell, matrices, gates): the hidden rows (B', P) that follow from the input's part of the gates, (B', G·H).
    """
    cells, directions = h.shape[0], 2 if bidirectional else 1
    per_cell = len(weights) // cells
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    rows = x.reshape(starts[-1], x.shape[-1]).to(torch.float32)
    for first in range(0, cells, directions):
        output = rows.new_empty(rows.shape[0], directions * h.shape[2])
        for cell in range(first, first + directions):
            own = range(cell * per_cell, (cell + 1) * per_cell)
            matrices = [(_once(weights[i]), scales[i] if scales else None) for i in own]
            gates = matmul(rows, matrices[0], biases[cell].to(torch.float32) if biases else None)
            columns = slice((cell - first) * h.shape[2], (cell - first + 1) * h.shape[2])
            for t in reversed(range(len(sizes))) if cell > first else range(len(sizes)):
                live = slice(starts[t], starts[t + 1])  # a packed batch shrinks as sequences end
                hidden = step(cell, matrices, gates[live])
                h[cell, : sizes[t]] = output[live, columns] = hidden
        rows = output
    return rows.reshape(*x.shape[:-1], rows.shape[-1]).to(x.dtype)


def _once(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as each step multiplies with it: float16 is widened once."""
    return weight.to(torch.float32) if weight.dtype is torch.float16 else weight


def lstm_cell(gates: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (c', h) of one LSTM step: c' = σ(f) c + σ(i) tanh(g), h = σ(o) tanh(c'). docs/numerics.md, "LSTM cell".

    gates: (B, 4H) float32, i f g o before their nonlinearities, overwritten; c: (B, H) float32.
    With e(x) = exp(x) - 1: σ(x) = 1 / (2 + e(-x)) and tanh(x) = e(2x) / (2 + e(2x)), so that a product of the two
    costs one division.
    """
    hidden = c.shape[-1]
    gates[:, : 2 * hidden].neg_()
    gates[:, 2 * hidden : 3 * hidden].mul_(2.0)
    gates[:, 3 * hidden :].neg_()
    e = expm1_(gates)
    di, df, dg, do = (e + 2.0).chunk(4, dim=1)
    state = (c / df).add_(e[:, 2 * hidden : 3 * hidden].div(di * dg))
    ec = expm1_(state * 2.0)
    return state, ec / (do * (ec + 2.0))


def gru_cell(gates: torch.Tensor, x_n: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Return h' of one GRU step: n = tanh(x_n + σ(r) (h_n + b_hn)), h' = n + σ(z) (h - n).

    docs/numerics.md, "GRU output". gates: (B, 3H) float32, r and z before their nonlinearities, then h_n + b_hn; x_n:
    (B, H), the input's part of n; h: (B, H).
    """
    size = h.shape[-1]
    dr, dz = expm1_(-gates[:, : 2 * size]).add_(2.0).chunk(2, dim=1)
    n = tanh(x_n + gates[:, 2 * size :] / dr)
    return n + (h - n) / dz


def tanh(x: torch.Tensor) -> torch.Tensor:
    """Return tanh(x) = e(2x) / (2 + e(2x)), overwriting x: (…) float32."""
    e = expm1_(x.mul_(2.0))
    return e / (e + 2.0)
