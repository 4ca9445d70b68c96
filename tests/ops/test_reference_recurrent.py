"""The recurrent layers and cells in plain torch, against float64."""

import math

import pytest
import torch
from torch import nn

from fxquant.ops import reference_recurrent as reference
from fxquant.qconfig import float16_dynamic_qconfig


def test_lstm_cell_is_the_float_cell():
    gates, c = torch.randn(50, 4 * 16) * 4, torch.randn(50, 16)
    i, f, g, o = (part.double() for part in gates.chunk(4, dim=1))
    state = f.sigmoid() * c.double() + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * state.tanh()
    got_state, got_hidden = reference.lstm_cell(gates.clone(), c)
    # each of exp's three results carries 4e-7 and a few roundings; tanh(c') inherits the error of c'
    assert (got_state - state).abs().max() <= 2e-6 * (1 + c.abs().max())
    assert (got_hidden - hidden).abs().max() <= 4e-6 * (1 + c.abs().max())


def test_lstm_cell_saturates():
    gates = torch.tensor([[100.0, -100.0, 100.0, 100.0], [math.inf, math.inf, -math.inf, -math.inf]])
    state, hidden = reference.lstm_cell(gates, torch.tensor([[0.5], [0.25]]))
    assert torch.allclose(state, torch.tensor([[1.0], [-0.75]]), atol=1e-6)
    assert torch.allclose(hidden, torch.tensor([[math.tanh(1.0)], [0.0]]), atol=1e-6)


def test_gru_cell_is_the_float_cell():
    gates, x_n, h = torch.randn(50, 48) * 4, torch.randn(50, 16) * 4, torch.randn(50, 16)
    r, z, h_n = gates.double().chunk(3, dim=1)
    n = (x_n.double() + r.sigmoid() * h_n).tanh()
    expected = n + z.sigmoid() * (h.double() - n)
    got = reference.gru_cell(gates, x_n, h)
    # σ(r) carries 4e-7 and a few roundings into n by |h_n|, then h' by |h - n|
    slack = 2e-6 * (2 + h_n.abs().max() + h.abs().max())
    assert (got - expected).abs().max() <= slack


def test_tanh_is_tanh():
    x = torch.linspace(-30, 30, 10001)
    assert (reference.tanh(x.clone()) - x.double().tanh()).abs().max() <= 1e-6
    tiny = torch.tensor([1e-20, -1e-10])
    assert ((reference.tanh(tiny.clone()) - tiny).abs() <= 4e-7 * tiny.abs()).all()


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
        got, h = reference.rnn(x, None, h0, weights, [], biases, hidden_biases, mode, True)
    # float32 roundings of sums of at most 12 products of about 1, over 7 steps of 2 layers
    assert (got - expected).abs().max() <= 1e-5
    assert (h - expected_h).abs().max() <= 1e-5
