"""The operators in plain torch, for any device: the specification that every kernel is held to, bit for bit.

A result depends on its own row alone, bit for bit, because only two kinds of arithmetic are used: integer sums, which
are exact in any order, and single IEEE float32 operations on one element (+, -, *, /, round), which give the same bits
at every position of a tensor. torch.sigmoid, torch.tanh and fused multiply-adds do not, so they are not used.
Float16 weights are the exception: they go through torch's float matmul.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fxquant.errors import IndexRangeError
from fxquant.numerics import QuantizedTensor, dequantize_weight, quantize_rows

EXACT_COLUMNS = 512  # 512 * 255 * 127 < 2**24: such a float32 sum of products is exact in any order


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    relu: bool = False,
    per_row: bool = True,
    qmax: int = 255,
) -> torch.Tensor:
    """Return x @ dequantize(weight).T + bias, with x quantized row by row. docs/numerics.md, eq. 7–8.

    x: (..., I) float; weight: (O, I) int8 or float16; scale: (O,) float32, None for float16; bias: (O,) or None
    -> (..., O) in x's dtype. per_row False: one scale for all of x. qmax: 255, or 127 for 7-bit activations.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), weight.shape[1]).to(torch.float32)
    y = project(rows, weight, scale, per_row, qmax)
    if bias is not None:
        y += bias.to(torch.float32)
    if relu:
        y.relu_()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def project(
    rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, per_row: bool, qmax: int
) -> torch.Tensor:
    """Return rows @ dequantize(weight).T without a bias: (M, K) float32, (N, K) -> (M, N) float32, a new tensor."""
    if scale is None:
        return rows @ weight.to(torch.float32).t()
    q, row_scale, zero_point = quantize_rows(rows, qmax, per_row)
    sums = integer_matmul(q, zero_point, weight)
    return sums.to(torch.float32).mul_(row_scale * scale.to(torch.float32))


def integer_matmul(q: torch.Tensor, zero_point: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return (q - zero_point) @ weight.T, exactly.

    q: (M, K) float32 of whole numbers 0–255; zero_point: (M, 1) float32; weight: (N, K) int8 -> (M, N) int32.
    """
    rows, columns = q.shape
    # One column: torch._int_mm takes weight.t() of (N, 1) for another layout and gives wrong products (torch 2.13).
    if rows and columns > 1 and weight.shape[0] and q.device.type == "cpu" and has_exact_int_mm():
        # q - 128 fits int8; a last row of ones gives the weights' sums, which turn it back into q - zero_point.
        signed = torch.cat((q - 128.0, q.new_ones(1, columns))).to(torch.int8)
        sums = torch._int_mm(signed, weight.t())
        return sums[:-1] + (128.0 - zero_point).to(torch.int32) * sums[-1]
    centred = q - zero_point
    total = torch.zeros(rows, weight.shape[0], dtype=torch.int32, device=q.device)
    for start in range(0, columns, EXACT_COLUMNS):
        part = slice(start, start + EXACT_COLUMNS)
        total += (centred[:, part] @ weight[:, part].to(torch.float32).t()).to(torch.int32)
    return total


@functools.cache
def has_exact_int_mm() -> bool:
    """Whether this CPU's torch._int_mm is there and exact: without VNNI instructions such kernels may saturate."""
    weight = torch.full((48, 96), 127, dtype=torch.int8)
    for rows in (2, 5, 40):
        for value in (127, -128):
            try:
                sums = torch._int_mm(torch.full((rows, 96), value, dtype=torch.int8), weight.t())
            except (AttributeError, RuntimeError):
                return False
            if not bool((sums == 96 * 127 * value).all()):
                return False
    return True


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
    """Return (output, h, c) of a stack of LSTM layers. docs/numerics.md, eq. 9–12.

    x: (T, B, I) float, or (N, I) rows of a packed sequence with batch_sizes (T,) int64; h0: (L, B, P), c0: (L, B, H),
    L = layers × directions. weights: for each of the L cells weight_ih (4H, I), weight_hh (4H, P) and, with a
    projection, weight_hr (P, H), int8 or float16, gates in the order i, f, g, o; scales: as many (rows,) float32, none
    for float16; biases: L of (4H,), or none -> output (T, B, D·P) or (N, D·P), h (L, B, P), c (L, B, H), in x's dtype.
    """
    cells, directions = h0.shape[0], 2 if bidirectional else 1
    per_cell = len(weights) // cells
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
    h, c = h0.to(torch.float32, copy=True), c0.to(torch.float32, copy=True)
    for first in range(0, cells, directions):
        outputs = []
        for cell in range(first, first + directions):
            own = slice(cell * per_cell, (cell + 1) * per_cell)
            matrices = [(weight, scales[own][i] if scales else None) for i, weight in enumerate(weights[own])]
            gates = project(rows, *matrices[0], per_row, qmax)
            if biases:
                gates += biases[cell].to(torch.float32)
            backward = cell > first
            outputs.append(_run_cell(gates, sizes, h[cell], c[cell], matrices[1:], backward, per_row, qmax))
        rows = torch.cat(outputs, dim=1) if bidirectional else outputs[0]
    output = rows.reshape(*x.shape[:-1], rows.shape[-1])
    return output.to(x.dtype), h.to(x.dtype), c.to(x.dtype)


def _run_cell(
    gates: torch.Tensor,
    sizes: list[int],
    h: torch.Tensor,
    c: torch.Tensor,
    matrices: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    backward: bool,
    per_row: bool,
    qmax: int,
) -> torch.Tensor:
    """Run one direction of one layer over time; h (B, P) and c (B, H) are advanced in place. Returns (N, P) outputs."""
    output = gates.new_empty(gates.shape[0], h.shape[1])
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    steps = range(len(sizes))
    for step in reversed(steps) if backward else steps:
        live, rows = sizes[step], slice(starts[step], starts[step + 1])  # a packed batch shrinks as sequences end
        pre = gates[rows] + project(h[:live], *matrices[0], per_row, qmax)
        state, hidden = lstm_cell(pre, c[:live])
        for matrix in matrices[1:]:
            hidden = project(hidden, *matrix, per_row, qmax)
        h[:live] = output[rows] = hidden
        c[:live] = state
    return output


def lstm_cell(gates: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (c', h) of one LSTM step: c' = σ(f) c + σ(i) tanh(g), h = σ(o) tanh(c'). docs/numerics.md, eq. 11–12.

    gates: (B, 4H) float32, i f g o before their nonlinearities, overwritten; c: (B, H) float32.
    With e(x) = exp(x) - 1: σ(x) = 1 / (2 + e(-x)) and tanh(x) = e(2x) / (2 + e(2x)), so that a product of the two
    costs one division.
    """
    hidden = c.shape[-1]
    gates[:, : 2 * hidden].neg_()
    gates[:, 2 * hidden : 3 * hidden].mul_(2.0)
    gates[:, 3 * hidden :].neg_()
    e = expm1_(gates)
    d = e + 2.0
    ei_, ef_, eg_, eo_ = d.chunk(4, dim=1)
    eg = e[:, 2 * hidden : 3 * hidden]
    state = (c / ef_).add_(eg.div(ei_ * eg_))
    ec = expm1_(state * 2.0)
    return state, ec / (eo_ * (ec + 2.0))


_LOG2E = 1.4426950408889634
_LN2_HIGH = 0.693359375  # 10 significant bits: n * _LN2_HIGH is exact
_LN2_LOW = -2.1219444e-4
_SERIES = (
    1 / 5040,
    1 / 720,
    1 / 120,
    1 / 24,
    1 / 6,
    1 / 2,
)  # the Taylor series of (exp(r) - 1 - r) / r², highest first


def expm1_(x: torch.Tensor) -> torch.Tensor:
    """Return exp(x) - 1 in place, for x clamped to ±43; relative error below 4e-7. NaN stays NaN.

    x = n ln 2 + r with whole n and |r| ≤ ln 2 / 2 (Cody and Waite's two-part reduction); then
    exp(x) - 1 = 2ⁿ (exp(r) - 1) + (2ⁿ - 1). ±43 keeps a product of two results finite.
    """
    x.clamp_(-43.0, 43.0)
    n = (x * _LOG2E).round_()
    r = x.sub_(n * _LN2_HIGH).sub_(n * _LN2_LOW)
    p = r * _SERIES[0]
    for coefficient in _SERIES[1:-1]:
        p.add_(coefficient).mul_(r)
    p.add_(_SERIES[-1]).mul_(r * r).add_(r)
    power = (
        n.nan_to_num_(nan=0.0).to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)
    )  # 2ⁿ, by its bits
    return x.copy_(p.mul_(power).add_(power - 1.0))


def embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    embedding_dim: int,
    bits: int = 8,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the rows of a quantized table: (weight[i] - zero_point[i]) * scale[i]. docs/numerics.md, eq. 13.

    indices: any shape, int32 or int64; weight: (V, D) int8, uint8 or float16, or (V, ceil(D / 2)) uint8 with bits=4;
    scale, zero_point: (V,) float32 or None -> (*indices.shape, D) of `dtype`.
    """
    check_range(indices, weight.shape[0])
    flat = indices.reshape(-1)
    parts = QuantizedTensor(weight[flat], *(None if part is None else part[flat] for part in (scale, zero_point)))
    rows = dequantize_weight(parts, bits, embedding_dim)
    return rows.to(dtype).reshape(*indices.shape, embedding_dim)


def embedding_bag(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    embedding_dim: int,
    offsets: torch.Tensor | None = None,
    mode: str = "mean",
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    bits: int = 8,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return a sum, mean or max of a quantized table's rows for each bag, as torch.nn.functional.embedding_bag does.

    indices: (B, N), or (N,) with offsets (B,) or, with include_last_offset, (B + 1,); per_sample_weights: like indices,
    mode "sum" only; table arguments as in `embedding` -> (B, D) of `dtype`.
    """
    rows = embedding(indices.reshape(-1), weight, scale, zero_point, embedding_dim, bits)
    places = torch.arange(rows.shape[0], device=indices.device, dtype=indices.dtype).reshape(indices.shape)
    padding = None
    if padding_idx is not None:  # every padded place points at one extra row, which embedding_bag then leaves out
        padding = rows.shape[0]
        places = torch.where(indices == padding_idx % weight.shape[0], padding, places)
        rows = torch.cat((rows, rows.new_zeros(1, embedding_dim)))
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.to(torch.float32)
    if offsets is not None:
        offsets = offsets.to(indices.dtype)
    bags = F.embedding_bag(
        places,
        rows,
        offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding,
    )
    return bags.to(dtype)


def check_range(indices: torch.Tensor, rows: int) -> None:
    """Raise IndexRangeError unless every index lies in [0, rows)."""
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= rows:
        raise IndexRangeError(f"a quantized table of {rows} rows got indices from {low} to {high}")
