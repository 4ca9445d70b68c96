"""Sigmoid, tanh and the steps of an LSTM and a GRU from single float32 operations: the same bits at every position, and
in the kernels (csrc/kernels/generic/elementwise-inl.h).
"""

from __future__ import annotations

import torch

LOG2E = 1.4426950408889634
LN2_HIGH = 0.693359375  # 10 significant bits: n * LN2_HIGH is exact
LN2_LOW = -2.1219444e-4
SERIES = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2)  # Taylor's, of (exp(r) - 1 - r) / r², highest first
_LEAST = -87.0  # below it exp is 0 here: above it the result is a normal float32


def expm1_(x: torch.Tensor) -> torch.Tensor:
    """Return exp(x) - 1 in place, for x clamped to ±43; relative error below 4e-7. NaN stays NaN.

    exp(x) - 1 = 2ⁿ (exp(r) - 1) + (2ⁿ - 1). ±43 keeps a product of two results finite.
    """
    p, power = _reduce_(x.clamp_(-43.0, 43.0))
    return x.copy_(p.mul_(power).add_(power - 1.0))


CURVES = ("leaky_relu", "hardswish", "silu")
"""What a static product can end with, in the order of the library's numbers from 1 on: csrc/static.h."""


def curved(y: torch.Tensor, curve: str | None, slope: float) -> torch.Tensor:
    """Return a curve of y, from single float32 operations; y itself where it is None. docs/numerics.md, "curves"."""
    if curve is None:
        return y
    if curve == "leaky_relu":
        return torch.where(y > 0, y, y * slope)
    if curve == "hardswish":
        return y * (y + 3.0).clamp_(0.0, 6.0) * (1.0 / 6.0)
    return y / expm1_(-y).add_(2.0)


def exp_of_negative(x: torch.Tensor) -> torch.Tensor:
    """Return exp(x) for x ≤ 0, and 0 below -87."""
    p, power = _reduce_(x.clamp(min=_LEAST))
    return torch.where(x < _LEAST, 0.0, p.mul_(power).add_(power))


def _reduce_(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return exp(r) - 1 and 2ⁿ, where x = n ln 2 + r with whole n and |r| ≤ ln 2 / 2; x is overwritten.

    Cody and Waite's two-part reduction.
    """
    n = (x * LOG2E).round_()
    r = x.sub_(n * LN2_HIGH).sub_(n * LN2_LOW)
    p = r * SERIES[0]
    for coefficient in SERIES[1:-1]:
        p.add_(coefficient).mul_(r)
    p.add_(SERIES[-1]).mul_(r * r).add_(r)
    bits = n.nan_to_num_(nan=0.0).to(torch.int32).add_(127).bitwise_left_shift_(23)
    return p, bits.view(torch.float32)


def lstm_cell(gates: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (c', h) of one LSTM step: c' = σ(f) c + σ(i) tanh(g), h = σ(o) tanh(c'). docs/numerics.md, "LSTM cell".

    gates: (B, 4H) float32, i f g o before their nonlinearities, overwritten; c: (B, H) float32.
    With e(x) = exp(x) - 1: σ(x) = 1 / (2 + e(-x)) and tanh(x) = e(2x) / (2 + e(2x)), so that a product of the two
    costs one division.
    """
    hidden = c.shape[-1]
    gates[:, : 2 * hidden].neg_()
    gates[:, 2 * hidden : 3 * hidden].mul_(2.0)
    gates[:, 3 * hidden :].neg_()
    e = expm1_(gates)
    di, df, dg, do = (e + 2.0).chunk(4, dim=1)
    state = (c / df).add_(e[:, 2 * hidden : 3 * hidden].div(di * dg))
    ec = expm1_(state * 2.0)
    return state, ec / (do * (ec + 2.0))


def gru_cell(gates: torch.Tensor, x_n: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Return h' of one GRU step: n = tanh(x_n + σ(r) (h_n + b_hn)), h' = n + σ(z) (h - n).

    docs/numerics.md, "GRU output". gates: (B, 3H) float32, r and z before their nonlinearities, then h_n + b_hn; x_n:
    (B, H), the input's part of n; h: (B, H).
    """
    size = h.shape[-1]
    dr, dz = expm1_(-gates[:, : 2 * size]).add_(2.0).chunk(2, dim=1)
    n = tanh(x_n + gates[:, 2 * size :] / dr)
    return n + (h - n) / dz


def tanh(x: torch.Tensor) -> torch.Tensor:
    """Return tanh(x) = e(2x) / (2 + e(2x)), overwriting x: (…) float32."""
    e = expm1_(x.mul_(2.0))
    return e / (e + 2.0)
