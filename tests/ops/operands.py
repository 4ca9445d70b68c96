"""Operands of the operators."""

import torch

from fxquant.qconfig import (
    default_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    int3_dynamic_qconfig,
    int4_dynamic_qconfig,
)

INT8 = default_dynamic_qconfig
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_GROUPED = {"int4": int4_dynamic_qconfig.with_group_size(32), "int3": int3_dynamic_qconfig.with_group_size(32)}


def random_int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def quantized(*shape):
    return INT8.quantize_weight(torch.randn(*shape)).tensors[:2]


def quantized_int4(outputs, columns, group_size=32):
    """Return (weight, scale) and (format, group_size, in_features)."""
    weight = int4_dynamic_qconfig.with_group_size(group_size).quantize_weight(torch.randn(outputs, columns))
    return weight.tensors[:2], ("int4", group_size, columns)


def lstm_arguments(inputs=6, hidden=5, layers=1, directions=1, proj=0, bias=True, packed=False):
    """Return the operands of one call of the lstm operator."""
    torch.manual_seed(1)
    size = proj or hidden
    weights, scales, biases = [], [], []
    for layer in range(layers):
        for _ in range(directions):
            shapes = [(4 * hidden, inputs if layer == 0 else size * directions), (4 * hidden, size)]
            for shape in [*shapes, (proj, hidden)] if proj else shapes:
                values, scale = quantized(*shape)
                weights.append(values)
                scales.append(scale)
            biases.append(torch.randn(4 * hidden))
    x = torch.randn(7, inputs) if packed else torch.randn(3, 4, inputs)
    sizes = torch.tensor([4, 2, 1]) if packed else None
    h0, c0 = torch.randn(layers * directions, 4, size), torch.randn(layers * directions, 4, hidden)
    return x, sizes, h0, c0, weights, scales, biases if bias else [], directions == 2


def rnn_arguments(mode, inputs=6, hidden=5, packed=False):
    """Return the operands of one call of the rnn operator, two layers in both directions."""
    torch.manual_seed(1)
    gates = 3 if mode == "gru" else 1
    weights, scales = [], []
    for cell in range(4):
        for columns in (inputs if cell < 2 else 2 * hidden, hidden):
            values, scale = quantized(gates * hidden, columns)
            weights.append(values)
            scales.append(scale)
    biases = [torch.randn(gates * hidden) for _ in range(4)]
    hidden_biases = [torch.randn(hidden) for _ in range(4)] if mode == "gru" else []
    x = torch.randn(7, inputs) if packed else torch.randn(3, 4, inputs)
    sizes = torch.tensor([4, 2, 1]) if packed else None
    return x, sizes, torch.randn(4, 4, hidden), weights, scales, biases, hidden_biases, mode, True


def table_arguments(bits=8, affine=False):
    """Return indices, a table's tensors and its columns."""
    affine_qconfigs = {8: float_qparams_weight_only_qconfig, 4: float_qparams_weight_only_qconfig_4bit}
    qconfig = affine_qconfigs[bits] if affine or bits == 4 else INT8
    return torch.randint(10, (3, 4)), *qconfig.quantize_weight(torch.randn(10, 7)).tensors, 7


def _stored(rows, columns, name):
    """Return (weight, scale) of a random matrix in a format."""
    if name in _GROUPED:
        return _GROUPED[name].quantize_weight(torch.randn(rows, columns)).tensors[:2]
    if name == "int16":
        return torch.randint(-32767, 32768, (rows, columns), dtype=torch.int16), torch.rand(rows) / 32767
    return quantized(rows, columns)


def recurrent_call(kind, names=("int8", "int8"), hidden=9, batch=3, steps=2, inputs=5, proj=0, both=False, packed=None):
    """Return an operator and its arguments for one layer: lstm or rnn. names: the weights' formats; packed: sizes."""
    torch.manual_seed(3)
    rows, size, cells = _GATES[kind] * hidden, proj or hidden, 1 + both
    shapes = [(rows, inputs), (rows, size), (proj, hidden)][: 3 if proj else 2]
    weights = [_stored(*shape, name) for _ in range(cells) for shape, name in zip(shapes, names, strict=True)]
    x = torch.randn(steps, batch, inputs) if packed is None else torch.randn(sum(packed), inputs)
    sizes = None if packed is None else torch.tensor(packed)
    start = (x, sizes, torch.randn(cells, batch, size))
    lists = ([w for w, _ in weights], [s for _, s in weights], [torch.randn(rows) for _ in range(cells)])
    how = (both, True, 255, list(names) * cells)
    if kind == "lstm":
        return "lstm", *start, torch.randn(cells, batch, hidden), *lists, *how
    return "rnn", *start, *lists, [torch.randn(hidden) for _ in range(cells)] if kind == "gru" else [], kind, *how
