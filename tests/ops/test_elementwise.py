"""Exponentials, and the steps of an LSTM and a GRU, against their equations."""

import math

import torch

from fxquant.ops.elementwise import expm1_, gru_cell, lstm_cell, tanh


def test_expm1_is_accurate():
    x = torch.cat((torch.linspace(-43, 43, 20001), torch.logspace(-30, 0, 500), -torch.logspace(-30, 0, 500)))
    exact = torch.expm1(x.double())
    assert bool(((expm1_(x.clone()) - exact).abs() <= 4e-7 * exact.abs()).all())


def test_expm1_saturates_and_keeps_nan():
    got = expm1_(torch.tensor([math.inf, -math.inf, 0.0, math.nan]))
    assert got[0] == expm1_(torch.tensor([43.0]))
    assert got[1] == -1
    assert got[2] == 0
    assert got[3].isnan()


def test_lstm_cell_is_the_float_cell():
    gates, c = torch.randn(50, 4 * 16) * 4, torch.randn(50, 16)
    i, f, g, o = (part.double() for part in gates.chunk(4, dim=1))
    state = f.sigmoid() * c.double() + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * state.tanh()
    got_state, got_hidden = lstm_cell(gates.clone(), c)
    # each of exp's three results carries 4e-7 and a few roundings; tanh(c') inherits the error of c'
    assert (got_state - state).abs().max() <= 2e-6 * (1 + c.abs().max())
    assert (got_hidden - hidden).abs().max() <= 4e-6 * (1 + c.abs().max())


def test_lstm_cell_saturates():
    gates = torch.tensor([[100.0, -100.0, 100.0, 100.0], [math.inf, math.inf, -math.inf, -math.inf]])
    state, hidden = lstm_cell(gates, torch.tensor([[0.5], [0.25]]))
    assert torch.allclose(state, torch.tensor([[1.0], [-0.75]]), atol=1e-6)
    assert torch.allclose(hidden, torch.tensor([[math.tanh(1.0)], [0.0]]), atol=1e-6)


def test_gru_cell_is_the_float_cell():
    gates, x_n, h = torch.randn(50, 48) * 4, torch.randn(50, 16) * 4, torch.randn(50, 16)
    r, z, h_n = gates.double().chunk(3, dim=1)
    n = (x_n.double() + r.sigmoid() * h_n).tanh()
    expected = n + z.sigmoid() * (h.double() - n)
    got = gru_cell(gates, x_n, h)
    # σ(r) carries 4e-7 and a few roundings into n by |h_n|, then h' by |h - n|
    slack = 2e-6 * (2 + h_n.abs().max() + h.abs().max())
    assert (got - expected).abs().max() <= slack


def test_tanh_is_tanh():
    x = torch.linspace(-30, 30, 10001)
    assert (tanh(x.clone()) - x.double().tanh()).abs().max() <= 1e-6
    tiny = torch.tensor([1e-20, -1e-10])
    assert ((tanh(tiny.clone()) - tiny).abs() <= 4e-7 * tiny.abs()).all()
