"""DynamicQuantizedGRU, RNN and the three cells; tests/nn/test_recurrent.py has what all layers share, on the LSTM."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fxquant
from fxquant import DTypeError, ShapeError, float16_dynamic_qconfig
from fxquant.nn import (
    DynamicQuantizedGRU,
    DynamicQuantizedGRUCell,
    DynamicQuantizedLSTM,
    DynamicQuantizedLSTMCell,
    DynamicQuantizedRNN,
    DynamicQuantizedRNNCell,
)
from tests.samples import leaves, same_bits

LAYERS = {
    "gru": (DynamicQuantizedGRU, lambda **options: nn.GRU(9, 7, **options)),
    "tanh": (DynamicQuantizedRNN, lambda **options: nn.RNN(9, 7, **options)),
    "relu": (DynamicQuantizedRNN, lambda **options: nn.RNN(9, 7, nonlinearity="relu", **options)),
}
CELLS = {
    "lstm": (DynamicQuantizedLSTMCell, lambda **options: nn.LSTMCell(9, 7, **options)),
    "gru": (DynamicQuantizedGRUCell, lambda **options: nn.GRUCell(9, 7, **options)),
    "tanh": (DynamicQuantizedRNNCell, lambda **options: nn.RNNCell(9, 7, **options)),
    "relu": (DynamicQuantizedRNNCell, lambda **options: nn.RNNCell(9, 7, nonlinearity="relu", **options)),
}
OPTIONS = [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}]
layers = pytest.mark.parametrize("kind", LAYERS)
cells = pytest.mark.parametrize("kind", CELLS)


def pair(table, kind, qconfig=None, **options):
    torch.manual_seed(3)
    quantized, make = table[kind]
    module = make(**options).eval()
    return module, quantized.from_float(module, *([qconfig] if qconfig else []))


@layers
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float16_weights_are_nearly_the_float_layer(kind, options):
    module, quantized = pair(LAYERS, kind, float16_dynamic_qconfig, **options)
    x = torch.randn(5, 4, 9)
    for got, expected in zip(leaves(quantized(x)), leaves(module(x)), strict=True):
        # a weight is off by 2^-11 of itself (|w| < 0.4), 16 products of |x| < 4 a gate, 5 steps of 2 layers
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 10 * 16 * 4 * 0.4 * 2**-11


@layers
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_int8_is_near_float_and_a_doubled_scale_is_not(kind, options):
    module, quantized = pair(LAYERS, kind, **options)
    x, doubled = torch.randn(5, 4, 9), quantized.__class__.from_float(module)
    for name, buffer in doubled.named_buffers():
        if name.endswith("_scale"):
            buffer.mul_(2)
    expected = leaves(module(x))[0]
    # steps of 1/255 and 1/254 of the range: about 1 % of the output, and twice the weights more than ten times that
    assert (quantized(x)[0] - expected).norm() <= 0.03 * expected.norm()
    assert (doubled(x)[0] - expected).norm() >= 0.15 * expected.norm()


@layers
def test_a_row_stands_alone_and_steps_are_the_sequence(kind):
    _, quantized = pair(LAYERS, kind, num_layers=2)
    x, h0 = torch.randn(6, 4, 9), torch.randn(2, 4, 7)
    whole, last = quantized(x, h0)
    alone, h = quantized(x[:, 2:3], h0[:, 2:3])
    assert torch.equal(alone, whole[:, 2:3])
    assert torch.equal(h, last[:, 2:3])
    steps, h = [], h0
    for t in range(6):
        out, h = quantized(x[t : t + 1], h)
        steps.append(out)
    assert torch.equal(torch.cat(steps), whole)
    assert torch.equal(h, last)


@layers
def test_a_packed_sequence_is_its_rows_alone(kind):
    _, quantized = pair(LAYERS, kind, bidirectional=True)
    x, lengths = torch.randn(6, 3, 9), [4, 6, 1]
    packed, h = quantized(pack_padded_sequence(x, lengths, enforce_sorted=False))
    padded, _ = nn.utils.rnn.pad_packed_sequence(packed)
    for b, length in enumerate(lengths):
        alone, last = quantized(x[:length, b : b + 1])
        assert torch.equal(padded[:length, b : b + 1], alone)
        assert torch.equal(h[:, b : b + 1], last)


@layers
def test_without_a_batch(kind):
    _, quantized = pair(LAYERS, kind)
    x, h0 = torch.randn(5, 9), torch.randn(1, 7)
    output, h = quantized(x, h0)
    batched, last = quantized(x.unsqueeze(1), h0.unsqueeze(1))
    assert torch.equal(output, batched.squeeze(1))
    assert torch.equal(h, last.squeeze(1))


@layers
def test_a_state_of_another_shape_is_refused(kind):
    _, quantized = pair(LAYERS, kind)
    with pytest.raises(ShapeError, match=r"needs h0 of shape \(1, 4, 7\), got \(1, 3, 7\)"):
        quantized(torch.randn(5, 4, 9), torch.zeros(1, 3, 7))


@cells
@pytest.mark.parametrize("bias", [True, False])
def test_a_cell_is_one_step_of_its_layer(kind, bias):
    module, quantized = pair(CELLS, kind, bias=bias)
    layer_kind, make = {**LAYERS, "lstm": (DynamicQuantizedLSTM, lambda **options: nn.LSTM(9, 7, **options))}[kind]
    layer = make(bias=bias)
    layer.load_state_dict({f"{name}_l0": tensor for name, tensor in module.state_dict().items()})
    x, h = torch.randn(4, 9), torch.randn(4, 7)
    hx = (h, torch.randn(4, 7)) if kind == "lstm" else h
    stacked = tuple(s.unsqueeze(0) for s in hx) if kind == "lstm" else h.unsqueeze(0)
    expected = leaves(layer_kind.from_float(layer)(x.unsqueeze(0), stacked)[1])
    assert same_bits(leaves(quantized(x, hx)), [state.squeeze(0) for state in expected])


@cells
def test_a_cell_without_state_or_batch(kind):
    module, quantized = pair(CELLS, kind)
    x = torch.randn(4, 9)
    for got, expected in zip(leaves(quantized(x)), leaves(module(x)), strict=True):
        assert got.shape == expected.shape
        assert (got - expected).norm() <= 0.03 * expected.norm()
    assert same_bits(leaves(quantized(x[1])), [state[1] for state in leaves(quantized(x))])


@cells
def test_a_cell_refuses_a_mixture_of_batched_and_not(kind):
    _, quantized = pair(CELLS, kind)
    state = torch.zeros(7)
    with pytest.raises(ShapeError, match="both with or both without a batch"):
        quantized(torch.randn(4, 9), (state, state) if kind == "lstm" else state)
    with pytest.raises(ShapeError, match=r"takes \(B, I\) or \(I,\)"):
        quantized(torch.randn(2, 4, 9))


def errors_of(kind):
    is_lstm, is_cell = "LSTM" in kind.__name__, "Cell" in kind.__name__
    x = torch.randn(5, 10) if is_cell else torch.randn(4, 5, 10)
    state = torch.randn(5, 8) if is_cell else torch.randn(1, 5, 8)
    name, pair = f"a quantized {kind.__name__}", "a pair of tensors" if is_lstm else "a tensor"
    yield x.numpy(), None, rf"{name} takes float tensors, got input of float32 \(ndarray\)"
    yield x.long(), None, rf"{name} takes float tensors, got input of torch.int64 \(Tensor\)"
    yield x, 3, f"{name} takes hx as {pair}, got int"
    yield x, state.numpy(), f"{name} takes hx as {pair}, got ndarray"
    yield x, (state, None), rf"{name} takes hx as {pair}, got \(Tensor, NoneType\)"
    yield (x, state, f"{name} takes hx as {pair}, got Tensor") if is_lstm else (
        x, (state,), rf"{name} takes hx as {pair}, got \(Tensor\)"
    )  # fmt: skip


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_what_is_no_tensor_is_an_error_that_says_so(kind):
    quantized = fxquant.quantize_dynamic(kind(10, 8))
    for x, hx, message in errors_of(kind):
        with pytest.raises(DTypeError, match=message):
            quantized(x, hx)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cells_errors_speak_of_cells(kind):
    quantized, name = fxquant.quantize_dynamic(kind(10, 8)), f"a quantized {kind.__name__}"
    for shape in ((5, 11), (11,), (2, 5, 10)):
        with pytest.raises(
            ShapeError, match=rf"{name} takes \(B, I\) or \(I,\) with I = 10, got {re.escape(str(shape))}"
        ):
            quantized(torch.randn(shape))
    for shape, wanted in (((5, 9), (5, 8)), ((4, 8), (5, 8))):
        state = torch.randn(shape)
        with pytest.raises(ShapeError, match=re.escape(f"{name} needs hx of shape {wanted}, got {shape}")):
            quantized(torch.randn(5, 10), (state, state) if kind is nn.LSTMCell else state)
