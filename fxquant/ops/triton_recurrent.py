"""Triton's LSTM, GRU and plain RNN: for each layer and direction the input's product, by linear, and one walk.

A walk (`triton_walk`) is one launch. How the hidden units are shared among programs is a choice between two costs: a
program reads its part of the weight from L2 at each step, and programs that share rows meet after each step.
docs/kernels.md, "Recurrent layers on a GPU", has the figures.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch

from fxquant.numerics import QuantizedTensor
from fxquant.ops.recurrent_checks import checked_sizes, matrix
from fxquant.ops.register import KERNELS
from fxquant.ops.triton_common import EXACT, blocks, power_of_two
from fxquant.ops.triton_states import FORMATS, INTEGERS
from fxquant.ops.triton_walk import KINDS, walk_kernel

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_UNITS = 32  # that a program computes at once
_AT_ONCE = 1 << 14  # values of states that a program holds while it measures them
_LEAST_BYTES = 16 * 1024  # of weights that a program reads a step: below, meeting takes longer than reading


class Shares(NamedTuple):
    """How a walk is divided: tiles of so many rows of the batch, and a tile's hidden units among so many programs.

    meets: whether the programs of a tile need each other's results.
    """

    rows: int
    tiles: int
    programs: int
    meets: bool


class _Cell(NamedTuple):
    """A layer in one direction: its weights, its h0, and h and c, which a walk advances; a projection may be None."""

    kind: str
    weight: QuantizedTensor
    projection: QuantizedTensor | None
    hidden_bias: torch.Tensor | None
    h0: torch.Tensor
    h: torch.Tensor
    c: torch.Tensor | None
    is_reversed: bool
    qmax: int

    @property
    def hidden(self) -> int:
        return self.weight.values.shape[0] // _GATES[self.kind]


def lstm(a: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (output, h, c); the arguments as of fxquant.ops.lstm, none of them empty."""
    h, c = _copied(a.h0), _copied(a.c0)
    return _run(a, "lstm", h, c), h.to(a.x.dtype), c.to(a.x.dtype)


def rnn(a: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (output, h); the arguments as of fxquant.ops.rnn, none of them empty."""
    h = _copied(a.h0)
    return _run(a, a.mode, h, None), h.to(a.x.dtype)


def _copied(state: torch.Tensor) -> torch.Tensor:
    return state.to(torch.float32, copy=True).contiguous()


def _floats(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32).contiguous()


def _run(a: Any, kind: str, h: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
    """Run all layers and directions; h (L, B, P) and c (L, B, H) become the last states. Returns the output."""
    directions, per_cell = 2 if a.bidirectional else 1, len(a.weights) // len(h)
    h0, sizes = _floats(a.h0), None if a.batch_sizes is None else _sizes(checked_sizes(a), a.x.device)
    rows = a.x.reshape(-1, a.x.shape[-1])
    for layer in range(0, len(h), directions):
        out = torch.empty((len(rows), directions * h.shape[2]), dtype=torch.float32, device=h.device)
        for i in range(layer, layer + directions):
            cell = _Cell(
                kind,
                matrix(a, i * per_cell + 1, h.shape[2]),
                matrix(a, i * per_cell + 2, a.c0.shape[2]) if per_cell == 3 else None,
                _floats(a.hidden_biases[i]) if kind == "gru" and a.hidden_biases else None,
                h0[i],
                h[i],
                None if c is None else c[i],
                i > layer,
                a.qmax,
            )
            gates = _input_part(a, rows, matrix(a, i * per_cell, rows.shape[1]), i)
            _walk(cell, gates, out[:, (i - layer) * h.shape[2] :], sizes, a.x.shape[0])
        rows = out
    output: torch.Tensor = rows.view(*a.x.shape[:-1], rows.shape[-1]).to(a.x.dtype)
    return output


def _sizes(sizes: list[int], device: torch.device) -> torch.Tensor:
    """Return how many rows each step of a packed batch has, and where they begin: (2, T) int32."""
    return torch.tensor([sizes, [0, *itertools.accumulate(sizes[:-1])]], dtype=torch.int32).to(device)


def _input_part(a: Any, rows: torch.Tensor, weight: QuantizedTensor, i: int) -> torch.Tensor:
    """Return the product of the input's tokens and a weight, plus the bias of cell i: (N, G·H) float32."""
    bias = _floats(a.biases[i]) if a.biases else None
    how = (False, True, a.qmax, weight.format.name, weight.group_size, weight.columns)
    linear = KERNELS["linear"]
    call = linear.arguments(rows.to(torch.float32), weight.values, weight.scale, bias, *how)
    product: torch.Tensor | None = linear.run_triton(call)
    return linear.run_reference(call) if product is None else product


def _walk(cell: _Cell, gates: torch.Tensor, out: torch.Tensor, sizes: torch.Tensor | None, steps: int) -> None:
    """Write a cell's outputs for all tokens. gates: (N, G·H); out: (N, …), whose first columns are written."""
    steps = steps if sizes is None else sizes.shape[1]
    (batch, width), hidden = cell.h.shape, cell.hidden
    projection = cell.projection or cell.weight
    inner = out if cell.projection is None else torch.empty((batch, hidden), dtype=torch.float32, device=out.device)
    w, w_scale = _stored(cell.weight)
    p, p_scale = _stored(projection)
    shares = share(batch, hidden, w.numel() * w.element_size(), steps > 1, cell.projection is not None, out.device)
    some = min(shares.rows, power_of_two(batch))  # rows of a tile that may be there
    q, p_q, qparams = _memory(cell, shares, some, out.device)
    operands = (gates, out, cell.h0, cell.h, out if cell.c is None else cell.c, inner, w, w_scale)
    more = (gates if cell.hidden_bias is None else cell.hidden_bias, p, p_scale, gates if sizes is None else sizes)
    numbers = (steps, batch, hidden, width, out.stride(0), w.shape[1], p.shape[1], q.shape[-1], p_q.shape[-1])
    formats = (cell.weight.format.name, projection.format.name)
    meta = {
        "KIND": KINDS[cell.kind],
        "FORMAT": FORMATS[formats[0]],
        "GROUP": cell.weight.group_size,
        "P_FORMAT": -1 if cell.projection is None else FORMATS[formats[1]],
        "P_GROUP": projection.group_size,
        "HAS_BIAS": cell.hidden_bias is not None,
        "REVERSED": cell.is_reversed,
        "PACKED": sizes is not None,
        "BM": shares.rows,
        "BR": some,
        "BU": _UNITS if hidden > _UNITS // 2 else _UNITS // 2,
        "BK": min(64 if "int16" in formats else 128, max(32, power_of_two(width))),
        **_columns(width, some, ""),
        **_columns(hidden, some, "P_"),
        "ALIGNED": _is_aligned(out) and _is_aligned(cell.h0),
    }
    launch(shares, steps, (*operands, *more, q, p_q, qparams), (*numbers, float(cell.qmax)), meta)


def _is_aligned(rows: torch.Tensor) -> bool:
    """Return whether each of the rows of a matrix of floats begins at a multiple of 16 bytes."""
    return rows.data_ptr() % 16 == 0 and rows.stride(0) % 4 == 0


def _columns(width: int, rows: int, prefix: str) -> dict[str, Any]:
    """Return how many columns of a state are read at once: all of them, if there are few."""
    most, every = max(32, _AT_ONCE // rows), power_of_two(width)
    return {f"{prefix}BH": min(most, every), f"{prefix}ONCE": every <= most}


def _memory(cell: _Cell, shares: Shares, rows: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return memory for the tokens that programs quantize: of the width of h, of that of the units, and for scales."""
    programs, width, hidden = shares.tiles * shares.programs, blocks(cell.h.shape[1], 16) * 16, cell.hidden
    q = torch.empty((programs, rows, width), dtype=INTEGERS[cell.weight.format.name], device=device)
    p_q = q
    if cell.projection is not None:
        shape = (programs, rows, blocks(hidden, 16) * 16)
        p_q = torch.empty(shape, dtype=INTEGERS[cell.projection.format.name], device=device)
    return q, p_q, torch.empty((programs, 2, shares.rows), dtype=torch.float32, device=device)


def launch(
    shares: Shares, steps: int, operands: tuple[Any, ...], numbers: tuple[Any, ...], meta: dict[str, Any]
) -> None:
    """Launch a walk through all steps; where programs meet, all of them must run at once, which the launch asks for."""
    counters = operands[0]
    if shares.meets:
        counters = torch.zeros(shares.tiles, dtype=torch.int32, device=counters.device)
    how: dict[str, Any] = {"MEETS": shares.meets, "num_warps": 8, "num_stages": 4 if shares.rows <= 32 else 3}
    how |= {"launch_cooperative_grid": True} if shares.meets else {}
    walk_kernel[(shares.tiles, shares.programs)](*operands, counters, 0, steps, *numbers, **meta, **how, **EXACT)


def share(
    batch: int, hidden: int, weight_bytes: int, has_steps: bool, is_projected: bool, device: torch.device
) -> Shares:
    """Return how to divide a walk: into so many programs that each reads little, but no more than run at once."""
    rows = 16 if batch <= 64 else 32 if batch <= 128 else 64
    tiles, programs = blocks(batch, rows), blocks(hidden, _UNITS)
    if not has_steps and not is_projected:
        return Shares(rows, tiles, programs, False)
    programs = min(programs, blocks(weight_bytes, _LEAST_BYTES), max(1, _multiprocessors(device) // tiles))
    return Shares(rows, tiles, programs, programs > 1)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Return how many programs surely run at once on a device; Triton's interpreter runs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _stored(weight: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight's values and scales as the kernel reads them."""
    assert weight.scale is not None
    scale = weight.scale if weight.group_size else weight.scale.to(torch.float32)
    return weight.values.contiguous(), scale.contiguous()
