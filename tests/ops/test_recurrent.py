"""The operators lstm and rnn: what they refuse, and float16 weights."""

import pytest
import torch
from torch import nn

from fxquant import ArgumentError, DTypeError, ShapeError, ops
from fxquant.qconfig import float16_dynamic_qconfig
from tests.ops import reference
from tests.ops.operands import lstm_arguments, rnn_arguments


@pytest.mark.parametrize("mode", ["gru", "rnn_tanh", "rnn_relu"])
def test_float16_weights_run_as_nn_does_with_those_weights(mode):
    """Float16 weights leave the activations alone, so torch's own layers of the same weights are the specification."""
    size = 6
    kind = nn.GRU(5, size, 2, bidirectional=True) if mode == "gru" else nn.RNN(5, size, 2, mode[4:], bidirectional=True)
    weights, biases, hidden_biases = [], [], []
    with torch.no_grad():
        for cell in ("l0", "l0_reverse", "l1", "l1_reverse"):
            for matrix in ("ih", "hh"):
                weight = getattr(kind, f"weight_{matrix}_{cell}")
                weights.append(float16_dynamic_qconfig.quantize_weight(weight).values)
                weight.copy_(weights[-1])
            ours, theirs = getattr(kind, f"bias_ih_{cell}"), getattr(kind, f"bias_hh_{cell}")
            if mode == "gru":
                biases.append(torch.cat((ours[: 2 * size] + theirs[: 2 * size], ours[2 * size :])))
                hidden_biases.append(theirs[2 * size :])
            else:
                biases.append(ours + theirs)
        x, h0 = torch.randn(7, 3, 5), torch.randn(4, 3, size)
        expected, expected_h = kind(x, h0)
        got, h = reference.rnn(x, None, h0, weights, [], biases, hidden_biases, mode, True, formats=["float16"] * 8)
    # float32 roundings of sums of at most 12 products of about 1, over 7 steps of 2 layers
    assert (got - expected).abs().max() <= 1e-5
    assert (h - expected_h).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 6), (6,)])
def test_lstm_refuses_another_shape(shape):
    _, *rest = lstm_arguments()
    with pytest.raises(ShapeError, match="of 6 inputs takes 3-D input whose last dimension is 6"):
        ops.lstm(torch.zeros(shape), *rest)


@pytest.mark.parametrize("state", [2, 3])
def test_lstm_refuses_a_state_of_another_batch(state):
    arguments = list(lstm_arguments())
    arguments[state] = torch.zeros(1, 9, 5)
    with pytest.raises(ShapeError, match=rf"with batch 4 got {'h0' if state == 2 else 'c0'} of shape \(1, 9, 5\)"):
        ops.lstm(*arguments)


@pytest.mark.parametrize(("packed", "h0", "c0"), [(False, 1, 2), (True, 1, 2), (False, 0, 0)])
def test_lstm_refuses_states_of_other_cells_than_each_other_or_of_none(packed, h0, c0):
    x, sizes, *_, weights, scales, biases, bidirectional = lstm_arguments(packed=packed)
    states = torch.zeros(h0, 4, 5), torch.zeros(c0, 4, 5)
    with pytest.raises(ShapeError, match=rf"got \({h0}, 4, 5\) and \({c0}, 4, 5\)"):
        ops.lstm(x, sizes, *states, weights, scales, biases, bidirectional)


def test_lstm_refuses_states_of_another_packed_batch_than_each_other():
    arguments = list(lstm_arguments(packed=True))
    arguments[3] = torch.zeros(1, 3, 5)
    with pytest.raises(ShapeError, match=r"got \(1, 4, 5\) and \(1, 3, 5\)"):
        ops.lstm(*arguments)


def test_rnn_refuses_another_mode():
    arguments = list(rnn_arguments("gru"))
    arguments[-2] = "lstm"
    with pytest.raises(ArgumentError, match="takes one of the modes 'gru', 'rnn_tanh', 'rnn_relu', got 'lstm'"):
        ops.rnn(*arguments)


@pytest.mark.parametrize(("place", "name"), [(0, "input"), (2, "h0"), (3, "c0")])
def test_lstm_refuses_integers(place, name):
    arguments = list(lstm_arguments())
    arguments[place] = arguments[place].long()
    with pytest.raises(DTypeError, match=rf"takes float tensors, got {name} of torch\.int64"):
        ops.lstm(*arguments)
