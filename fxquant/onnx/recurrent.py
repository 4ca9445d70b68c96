"""Stacks of recurrent layers: a Scan for each layer and direction, whose hidden states are quantized at each step.

The input's products of a whole sequence are one product before the Scan, as in fxquant. Sigmoid and Tanh are ONNX's,
which agree with fxquant's to float rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from onnxscript import opset21 as op

from fxquant.formats import INT8, format_of
from fxquant.onnx.graph import Model, cast_like, input_of, ints, node, shape_of, subgraph, to_float
from fxquant.onnx.products import Multiply, Weight, multiplier

Step = Callable[..., Sequence[Any]]
"""(states, the input's part of the gates) -> (new states, output)."""


class _Stack(NamedTuple):
    """A stack of cells: the operator's arguments, its states (L, B, ...), and how many columns its weights have."""

    model: Model
    a: Any
    states: Sequence[Any]
    hidden: int
    projected: int

    def matrix(self, i: int, columns: int) -> Multiply:
        """Return the product with the weight i, of so many columns."""
        a, model = self.a, self.model
        weight_format = format_of(a.formats[i]) if a.formats else INT8
        scale = a.scales[i] if a.scales else None
        group_size = 0
        if weight_format.group_sizes:
            group_size = weight_format.find_group_size(columns, shape_of(scale)[-1])
        return multiplier(model, Weight(weight_format, a.weights[i], scale, columns, group_size), a.per_token, a.qmax)


def lstm(model: Model, a: Any) -> Any:
    """Return (output, h, c)."""
    stack = _Stack(model, a, (a.h0, a.c0), a.c0.shape[2], a.h0.shape[2])
    return _run(stack, lambda _, matrices: _lstm_step(matrices))


def rnn(model: Model, a: Any) -> Any:
    """Return (output, h) of a GRU or a plain RNN."""
    stack = _Stack(model, a, (a.h0,), a.h0.shape[2], a.h0.shape[2])
    if a.mode == "gru":
        return _run(stack, lambda cell, matrices: _gru_step(stack, cell, matrices))
    activation = op.Relu if a.mode == "rnn_relu" else op.Tanh

    def make(_: int, matrices: Sequence[Multiply]) -> Step:
        def step(h: Any, gates: Any) -> Sequence[Any]:
            after = activation(matrices[0](h, gates))
            return after, op.Identity(after)

        return step

    return _run(stack, make)


def _lstm_step(matrices: Sequence[Multiply]) -> Step:
    def step(h: Any, c: Any, gates: Any) -> Sequence[Any]:
        i, f, g, o = op.Split(matrices[0](h, gates), num_outputs=4, axis=1)
        kept = op.Mul(op.Sigmoid(f), c)
        cell = op.Add(kept, op.Mul(op.Sigmoid(i), op.Tanh(g)))
        after = op.Mul(op.Sigmoid(o), op.Tanh(cell))
        for project in matrices[1:]:
            after = project(after, None)
        return after, cell, op.Identity(after)

    return step


def _gru_step(stack: _Stack, cell: int, matrices: Sequence[Multiply]) -> Step:
    """n = tanh(x_n + σ(r) (h_n + b_hn)), h' = n + σ(z) (h - n)."""
    a = stack.a
    bias = to_float(a.hidden_biases[cell]) if a.hidden_biases else None

    def step(h: Any, gates: Any) -> Sequence[Any]:
        x_r, x_z, x_n = op.Split(gates, num_outputs=3, axis=1)
        h_r, h_z, h_n = op.Split(matrices[0](h, None), num_outputs=3, axis=1)
        h_n = h_n if bias is None else op.Add(h_n, bias)
        n = op.Tanh(op.Add(x_n, op.Mul(op.Sigmoid(op.Add(x_r, h_r)), h_n)))
        after = op.Add(n, op.Mul(op.Sigmoid(op.Add(x_z, h_z)), op.Sub(h, n)))
        return after, op.Identity(after)

    return step


def _run(stack: _Stack, make_step: Callable[[int, Sequence[Multiply]], Step]) -> Any:
    """Return the last layer's outputs and all states after the last step."""
    a = stack.a
    cells, directions = stack.states[0].shape[0], 2 if a.bidirectional else 1
    x, states = to_float(a.x), [to_float(state) for state in stack.states]
    ends: list[list[Any]] = [[] for _ in states]
    columns = a.x.shape[-1]
    for first in range(0, cells, directions):
        outputs = []
        for cell in range(first, first + directions):
            result = _scan(stack, cell, x, columns, states, make_step)
            outputs.append(result[-1])
            for end, state in zip(ends, result, strict=False):
                end.append(op.Unsqueeze(state, ints(0)))
        x = outputs[0] if directions == 1 else op.Concat(*outputs, axis=2)
        columns = directions * stack.projected
    last = [end[0] if len(end) == 1 else op.Concat(*end, axis=0) for end in ends]
    return tuple(cast_like(result, a.x) for result in (x, *last))


def _scan(
    stack: _Stack, cell: int, x: Any, columns: int, states: Sequence[Any], make_step: Callable[..., Step]
) -> Sequence[Any]:
    """Return the states after a cell's last step, and its outputs (T, B, P)."""
    a, per_cell = stack.a, len(stack.a.weights) // stack.states[0].shape[0]
    is_reverse = int(a.bidirectional and cell % 2)
    gates = stack.matrix(cell * per_cell, columns)(x, to_float(a.biases[cell]) if a.biases else None)
    widths = (stack.projected, stack.hidden)[: per_cell - 1]
    matrices = [stack.matrix(cell * per_cell + i, width) for i, width in enumerate(widths, start=1)]
    begun = [op.Squeeze(op.Slice(state, ints(cell), ints(cell + 1), ints(0)), ints(0)) for state in states]
    inputs = [input_of(f"{name}_{cell}") for name in ("h", "c")[: len(states)]] + [input_of(f"gates_{cell}")]
    body = subgraph(inputs, make_step(cell, matrices))
    directions_of = {"scan_input_directions": [is_reverse], "scan_output_directions": [is_reverse]}
    return node("Scan", [*begun, gates], {"body": body, "num_scan_inputs": 1, **directions_of}, len(states) + 1)
