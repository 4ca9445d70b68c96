"""A stack of recurrent layers whose weights need not all be of the library's kinds: it does what it can of it.

The library takes int8, int16 and int4 weights, and the input's part of the first layer's gates where it was computed
before. So a stack falls into stretches of layers with a call each: one begins with a layer whose weight_ih is float. A
layer whose weight_hh or weight_hr is float runs in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from fxquant.numerics import group_size_of
from fxquant.ops import reference

Tensors: TypeAlias = Sequence[torch.Tensor]
Run: TypeAlias = Callable[..., Tensors]
_TAKEN = (torch.int8, torch.int16, torch.uint8)


class Stretch(NamedTuple):
    """Cells [first, last). has_gates: the first layer's come with the input; is_plain: all runs in plain torch."""

    first: int
    last: int
    has_gates: bool
    is_plain: bool


def stretches(weights: Tensors, cells: int, directions: int) -> list[Stretch]:
    """Return the stretches of a stack of so many cells, as few as can be."""
    per_cell, found = len(weights) // cells, list[Stretch]()
    for first in range(0, cells, directions):
        last = first + directions
        foreign = {i % per_cell for i in range(first * per_cell, last * per_cell) if weights[i].dtype not in _TAKEN}
        if found and not foreign and not found[-1].is_plain:
            found.append(found.pop()._replace(last=last))
        else:
            found.append(Stretch(first, last, 0 in foreign, bool(foreign - {0})))
    return found


def run_stack(
    run: Run,
    expect: Run,
    linear: Callable[..., torch.Tensor],
    x: torch.Tensor,
    states: Tensors,
    parts: Sequence[Tensors],
    bidirectional: bool,
    per_row: bool,
    qmax: int,
) -> list[torch.Tensor]:
    """Return [output, *states] of a stack, all float32.

    run, expect: an operator of the library and of the reference, for (x, states, *parts) of some layers; linear: the
    library's; parts: weights, scales, biases and an rnn's hidden biases.
    """
    cells, ends = states[0].shape[0], list[Tensors]()
    for stretch in stretches(parts[0], cells, 2 if bidirectional else 1):
        first, last, has_gates, is_plain = stretch
        own = [part[len(part) * first // cells : len(part) * last // cells] for part in parts]
        if has_gates and not is_plain:
            x, own[0] = _compute_gates(linear, x, own, last - first, 2 if bidirectional else 1, per_row, qmax)
        x, *ended = (expect if is_plain else run)(x, [state[first:last] for state in states], *own)
        ends.append(ended)
    return [x, *(torch.cat(state) if len(state) > 1 else state[0] for state in zip(*ends, strict=True))]


def _compute_gates(
    linear: Callable[..., torch.Tensor],
    x: torch.Tensor,
    parts: Sequence[Tensors],
    cells: int,
    directions: int,
    per_row: bool,
    qmax: int,
) -> tuple[torch.Tensor, list[Any]]:
    """Return the input's part of the first layer's gates, its directions side by side, and the other weights."""
    weights, scales, biases = list[Any](parts[0]), parts[1], parts[2]
    gates = []
    for direction in range(directions):
        place = direction * (len(weights) // cells)
        weight, scale, bias = weights[place], scales[place], biases[direction] if biases else None
        if weight.is_floating_point():
            rows = reference.multiply(x.reshape(-1, x.shape[-1]), weight, None, bias, per_row, qmax)
            gates.append(rows.view(*x.shape[:-1], weight.shape[0]))
        else:
            group_size = group_size_of(x.shape[-1], scale.shape[1]) if weight.dtype is torch.uint8 else 0
            gates.append(linear(x, weight, scale, bias, False, per_row, qmax, group_size, x.shape[-1]))
        weights[place] = None
    return (gates[0] if directions == 1 else torch.cat(gates, dim=-1)), weights
