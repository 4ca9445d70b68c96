"""Triton's tanh, and steps of an LSTM, a GRU and a plain RNN: the operations of `elementwise`, in their order."""

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.ops import elementwise
from fxquant.ops.triton_common import clamped, rounded

_LOG2E = tl.constexpr(elementwise.LOG2E)
_LN2_HIGH = tl.constexpr(elementwise.LN2_HIGH)
_LN2_LOW = tl.constexpr(elementwise.LN2_LOW)
_C0, _C1, _C2, _C3, _C4, _C5 = (tl.constexpr(coefficient) for coefficient in elementwise.SERIES)


@triton.jit
def expm1(x):
    """Return exp(x) - 1 for x clamped to ±43, as elementwise.expm1_ does. NaN stays NaN."""
    x = clamped(x, -43.0, 43.0)
    n = rounded(x * _LOG2E)
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = r * _C0
    p = (p + _C1) * r
    p = (p + _C2) * r
    p = (p + _C3) * r
    p = (p + _C4) * r
    p = (p + _C5) * (r * r) + r
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return p * power + (power - 1.0)


@triton.jit
def tanh(x):
    """Return tanh(x)."""
    e = expm1(x * 2.0)
    return tl.div_rn(e, e + 2.0)


@triton.jit
def lstm_step(i, f, g, o, c):
    """Return (c', h) from the gates before their nonlinearities: elementwise.lstm_cell."""
    di, df, dg, do = expm1(-i) + 2.0, expm1(-f) + 2.0, expm1(g * 2.0), expm1(-o) + 2.0
    state = tl.div_rn(c, df) + tl.div_rn(dg, di * (dg + 2.0))
    e = expm1(state * 2.0)
    return state, tl.div_rn(e, do * (e + 2.0))


@triton.jit
def gru_step(r, z, h_n, x_n, h):
    """Return h' from the gates before their nonlinearities, and the two parts of n: elementwise.gru_cell."""
    dr, dz = expm1(-r) + 2.0, expm1(-z) + 2.0
    n = tanh(x_n + tl.div_rn(h_n, dr))
    return n + tl.div_rn(h - n, dz)


@triton.jit
def relu(x):
    """Return max(x, 0); NaN and -0 stay, as with torch.relu_."""
    return tl.where(x < 0, 0.0, x)
