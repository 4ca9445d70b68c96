"""Triton's walk of a recurrent layer through its sequence, in one launch.

Tokens are independent, so programs that have other rows of the batch need nothing of each other. The programs of the
same rows share the hidden units, and meet after each step: then each finds the whole new state in the output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.ops.triton_cells import gru_step, lstm_step, relu, tanh
from fxquant.ops.triton_states import add_product, places_of, quantize_states, states

KINDS = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}
"""The layers by what the kernel calls them, as KIND."""


@triton.jit
def _meet(counter, expected, MEETS: tl.constexpr):
    """Wait until `expected` programs in all have come to meetings; then what they wrote is seen."""
    tl.debug_barrier()
    if MEETS:
        tl.atomic_add(counter, 1, sem="release")
        while tl.atomic_add(counter, 0, sem="acquire") < expected:
            pass
        tl.debug_barrier()


@triton.jit
def _rows_at(sizes, t, steps, batch, PACKED: tl.constexpr):
    """Return how many rows of the batch step t has, and which of the output's rows is its first; 0 if there is none."""
    is_step = (t >= 0) & (t < steps)
    if PACKED:
        size = tl.load(sizes + t, mask=is_step, other=0)
        return size.to(tl.int32), tl.load(sizes + steps + t, mask=is_step, other=0).to(tl.int64)
    else:
        return tl.where(is_step, batch, 0), tl.where(is_step, t, 0).to(tl.int64) * batch


@triton.jit
def _started(gates, hidden_bias, live, unit, gate, hidden, KIND: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Return what the product of a hidden state is added to, (BM, N): the input's part, of a GRU's n the other bias."""
    fits = (unit < hidden) & (gate < (2 if KIND == 1 else 4))
    places = gates[:, None] + (gate * hidden + unit)[None, :]
    start = tl.load(places, mask=live[:, None] & fits[None, :], other=-0.0)  # y + -0 is y, to the bit
    if HAS_BIAS:
        bias = tl.load(hidden_bias + unit, mask=(unit < hidden) & (gate == 2), other=0.0)
        start = tl.where((gate == 2)[None, :], bias[None, :], start)
    return start


@triton.jit
def _loaded(c, gates, former, units, keep, hidden, KIND: tl.constexpr):
    """Return what a step takes beside its sums, (BM, BU) each: c; of a GRU the input's part of n, and h."""
    if KIND == 0:
        c_or_n = tl.load(c[:, None] + units[None, :], mask=keep, other=0.0)
        return c_or_n, c_or_n
    elif KIND == 1:
        c_or_n = tl.load(gates[:, None] + (2 * hidden + units)[None, :], mask=keep, other=0.0)
        return c_or_n, states(former, units, hidden)
    else:
        return units, units


@triton.jit
def _stepped(y, c_or_n, before, c, units, keep, KIND: tl.constexpr, BM: tl.constexpr, BU: tl.constexpr):
    """Return the new hidden values of some units, (BM, BU), from their gates' sums; an LSTM's c is advanced."""
    if KIND < 2:
        even, odd = tl.split(tl.reshape(y, (BM, BU, 2, 2)))  # the sums lie unit by unit
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
    if KIND == 0:
        state, new = lstm_step(first, second, third, fourth, c_or_n)
        tl.store(c[:, None] + units[None, :], state, mask=keep)
        return new
    elif KIND == 1:
        return gru_step(first, second, third, c_or_n, before)
    elif KIND == 2:
        return tanh(y)
    else:
        return relu(y)


@triton.jit
def _store(out, h, values, keep, ends, columns):
    """Write new hidden values to the output, and where a row's sequence ends to its last state."""
    tl.store(out[:, None] + columns[None, :], values, mask=keep)
    tl.store(h[:, None] + columns[None, :], values, mask=keep & ends[:, None])


@triton.jit
def _advanced(
    x, hidden_bias, c, former, live, unit, q, qparams, r, stride, hidden, width, w, w_scale, stored,
    KIND: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return (new hidden values, which units, which of them there are), from `unit` on; an LSTM's c is advanced."""
    GATES: tl.constexpr = 4 if KIND == 0 else 3 if KIND == 1 else 1
    WAYS: tl.constexpr = 4 if KIND < 2 else 1
    column = tl.arange(0, WAYS * BU)
    of, gate, units = unit + column // WAYS, column % WAYS, unit + tl.arange(0, BU)
    channel = tl.where((of < hidden) & (gate < GATES), gate * hidden + of, 0)
    keep = live[:, None] & (units < hidden)[None, :]
    y = _started(x, hidden_bias, live, of, gate, hidden, KIND, HAS_BIAS)
    c_or_n, own = _loaded(c, x, former, units, keep, hidden, KIND)
    y = add_product(y, q, qparams, r, stride, width, w, w_scale, channel, stored, FORMAT, GROUP, BM, BK, WAYS * BU)
    return _stepped(y, c_or_n, own, c, units, keep, KIND, BM, BU), units, keep


@triton.jit
def _projected(
    unit, q, qparams, r, stride, hidden, width, p, p_scale, stored,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return (projected hidden values, which), from `unit` on."""
    units = unit + tl.arange(0, BU)
    nothing, channel = tl.full((BM, BU), -0.0, tl.float32), tl.where(units < width, units, 0)
    y = add_product(nothing, q, qparams, r, stride, hidden, p, p_scale, channel, stored, FORMAT, GROUP, BM, BK, BU)
    return y, units


@triton.jit(do_not_specialize=("first", "last", "steps", "batch"))  # one kernel for sequences of all lengths
def walk_kernel(
    gates, out, h0, h, c, inner, w, w_scale, hidden_bias, p, p_scale, sizes, q, p_q, qparams, counters,
    first, last, steps, batch, hidden, width, out_stride, stored, p_stored, stride, p_stride, qmax,
    KIND: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, P_FORMAT: tl.constexpr, P_GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, REVERSED: tl.constexpr, PACKED: tl.constexpr, MEETS: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr, ONCE: tl.constexpr,
    P_BH: tl.constexpr, P_ONCE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Take some rows of the batch, and some of their hidden units, from step `first` to before step `last`.

    gates: (N, G·H), the input's part; out: its rows are out_stride apart; h0, h: (B, P); c, inner: (B, H); w: (G·H, P);
    p: (P, H), where P_FORMAT is not -1; sizes: (2, T), how many rows each step has, and where they begin; q, p_q,
    qparams: memory of each program for its tokens of width P, of width H, and for their scales.
    """
    GATES: tl.constexpr = 4 if KIND == 0 else 3 if KIND == 1 else 1
    share, shares, met = tl.program_id(1), tl.num_programs(1), 0
    program = (tl.program_id(0) * shares + share).to(tl.int64)
    q, p_q, qparams = q + program * BR * stride, p_q + program * BR * p_stride, qparams + program * 2 * BM
    r, some = tl.arange(0, BM), tl.program_id(0) * BM + tl.arange(0, BR)
    row, some_place = tl.program_id(0) * BM + r, tl.where(some < batch, some, 0).to(tl.int64)
    r = tl.where(row < batch, r, 0)  # a row beyond the batch reads what the tile's first one does
    place = (tl.program_id(0) * BM + r).to(tl.int64)
    counter = counters + tl.program_id(0)
    for i in range(first, last):
        t = steps - 1 - i if REVERSED else i
        size, start = _rows_at(sizes, t, steps, batch, PACKED)
        had, before = _rows_at(sizes, t + 1 if REVERSED else t - 1, steps, batch, PACKED)
        kept, _ = _rows_at(sizes, t - 1 if REVERSED else t + 1, steps, batch, PACKED)
        live, ends, new = row < size, row >= kept, out + (start + place) * out_stride
        former = places_of(row < had, out + (before + place) * out_stride, h0 + place * width, ALIGNED)
        places = places_of(some < had, out + (before + some_place) * out_stride, h0 + some_place * width, ALIGNED)
        quantize_states(places, q, qparams, width, stride, qmax, FORMAT, BM, BR, BH, ONCE)
        x = gates + (start + place) * (GATES * hidden)
        for unit in range(share * BU, hidden, shares * BU):
            values, units, keep = _advanced(
                x, hidden_bias, c + place * hidden, former, live, unit, q, qparams, r, stride, hidden, width,
                w, w_scale, stored, KIND, FORMAT, GROUP, HAS_BIAS, BM, BU, BK,
            )  # fmt: skip
            if P_FORMAT >= 0:
                tl.store((inner + place * hidden)[:, None] + units[None, :], values, mask=keep)
            else:
                _store(new, h + place * width, values, keep, ends, units)
        if P_FORMAT >= 0:
            met += shares
            _meet(counter, met, MEETS)
            places = inner + some_place * hidden
            quantize_states(places, p_q, qparams, hidden, p_stride, qmax, P_FORMAT, BM, BR, P_BH, P_ONCE)
            for unit in range(share * BU, width, shares * BU):
                values, units = _projected(
                    unit, p_q, qparams, r, p_stride, hidden, width, p, p_scale, p_stored, P_FORMAT, P_GROUP, BM, BU, BK
                )
                _store(new, h + place * width, values, live[:, None] & (units < width)[None, :], ends, units)
        if i + 1 < last:
            met += shares
            _meet(counter, met, MEETS)
