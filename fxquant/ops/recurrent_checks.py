"""What recurrent operators refuse: operands that do not go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from fxquant.errors import DTypeError, ShapeError
from fxquant.formats import FORMATS, INT8, format_of
from fxquant.numerics import QuantizedTensor
from fxquant.ops.weights import check_format, check_matrix, check_qmax

Tensors: TypeAlias = Sequence[torch.Tensor]

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}  # output channels of a weight for each hidden unit
_FORMATS = tuple(known for known in FORMATS if known.activation is not None)


def matrix(a: Any, i: int, columns: int) -> QuantizedTensor:
    """Return the weight i, of so many columns; its scale's shape says how many columns share one."""
    weight_format, scale = format_of(a.formats[i]) if a.formats else INT8, a.scales[i] if a.scales else None
    groups = scale.shape[-1] if scale is not None and scale.dim() else 0
    group_size = weight_format.find_group_size(columns, groups)
    return QuantizedTensor(weight_format, a.weights[i], scale, None, columns, group_size)


def check(layer_type: str, a: Any, states: Tensors, hidden_biases: Tensors) -> None:
    """Raise DTypeError, ShapeError or ArgumentError unless the arguments of an LSTM, GRU or RNN go together."""
    check_qmax(layer_type, a.qmax)
    for name in a.formats or ():
        check_format(layer_type, name, _FORMATS)
    _check_sequence(layer_type, a, states)
    _check_parts(layer_type, a, states, hidden_biases)


def _check_sequence(layer_type: str, a: Any, states: Tensors) -> None:
    """Raise unless x is (T, B, I) or packed (N, I), h0 (L, B, P), and an LSTM's c0 (L, B, H)."""
    x, weights = a.x, a.weights
    for name, tensor in (("input", x), *zip(("h0", "c0"), states, strict=False)):
        if not tensor.is_floating_point():
            raise DTypeError(f"a quantized {layer_type} takes float tensors, got {name} of {tensor.dtype}")
    want, width = 3 if a.batch_sizes is None else 2, x.shape[-1] if x.dim() else 0
    inputs = width
    if weights:
        weight_format, stored = format_of(a.formats[0]) if a.formats else INT8, weights[0].shape[-1]
        numbers, values = weight_format.block  # an unfinished last block is filled up
        inputs = width if weight_format.stored_columns(width) == stored else stored // values * numbers
    if x.dim() != want or width != inputs:
        raise ShapeError(
            f"a quantized {layer_type} of {inputs} inputs takes {want}-D input whose last dimension is {inputs}, "
            f"got {tuple(x.shape)}"
        )
    batch = x.shape[1] if a.batch_sizes is None else None
    for name, state in zip(("h0", "c0"), states, strict=False):
        if state.dim() != 3 or (batch is not None and state.shape[1] != batch):
            raise ShapeError(f"a quantized {layer_type} with batch {batch} got {name} of shape {tuple(state.shape)}")
    if states[0].shape[0] == 0 or states[0].shape[:2] != states[-1].shape[:2]:
        shapes = " and ".join(str(tuple(state.shape)) for state in states)
        raise ShapeError(f"a quantized {layer_type} takes states of the same cells, 1 or more, and batch, got {shapes}")


def _check_parts(layer_type: str, a: Any, states: Tensors, hidden_biases: Tensors) -> None:
    """Raise unless weights, scales and biases are those of cells for such columns and states."""
    weights, scales, biases = a.weights, a.scales, a.biases
    cells, outputs, hidden = states[0].shape[0], states[0].shape[2], states[-1].shape[2]
    directions, rows = 2 if a.bidirectional else 1, _GATES[layer_type] * hidden
    is_projected = layer_type == "LSTM" and len(weights) == 3 * cells
    numbers = {
        "weights": (weights, (3 if is_projected else 2) * cells),
        "scales": (scales, len(weights) if scales else 0),
        "formats": (a.formats or (), len(weights) if a.formats else 0),
        "biases": (biases, cells if biases else 0),
        "hidden biases": (hidden_biases, cells if hidden_biases else 0),
    }
    layers = f"a quantized {layer_type} of {cells} cells with {hidden} hidden units and {outputs} outputs"
    for name, (tensors, count) in numbers.items():
        if len(tensors) != count:
            raise ShapeError(f"{layers} takes {count} {name}, got {len(tensors)}")
    if cells % directions or (hidden != outputs and not is_projected):
        raise ShapeError(f"{layers} cannot be: {directions} directions, {'a' if is_projected else 'no'} projection")
    for i, vector in enumerate((*biases, *hidden_biases)):
        if vector.shape != (rows if i < len(biases) else hidden,):
            raise ShapeError(f"{layers} got a bias of shape {tuple(vector.shape)}")
    for i in range(len(weights)):
        cell, place = divmod(i, 3 if is_projected else 2)
        inputs = a.x.shape[-1] if cell < directions else directions * outputs
        shape = ((rows, inputs), (rows, outputs), (outputs, hidden))[place]
        name = f"{layers}: weight_{('ih', 'hh', 'hr')[place]} of cell {cell}"
        check_matrix(name, matrix(a, i, shape[1]), shape[0])


def checked_sizes(a: Any) -> list[int]:
    """Return a packed batch's sizes, or raise ShapeError unless they fall from at most its rows to at least 1."""
    rows, batch, given = a.x.shape[0], a.h0.shape[1], a.batch_sizes.tolist()
    falls = all(m >= n for m, n in zip([batch, *given], [*given, 1], strict=True))
    if not falls or sum(given) != rows:
        raise ShapeError(f"packed rows: {rows} rows of a batch of {batch} cannot have batch_sizes {given}")
    return [int(n) for n in given]
