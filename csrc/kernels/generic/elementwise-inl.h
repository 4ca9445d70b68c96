/* The arithmetic on single elements, in plain C, included by each instruction set's file and vectorized for it by the
 * compiler: so that it is the same arithmetic everywhere.
 *
 * Expects: FXQ_VALUE, the type of a packed activation: uint8_t (q) or int16_t (q - zero_point); before it measure and
 * quantize_values, if FXQ_OWN_QUANTIZATION says that the includer has its own (FXQ_OWN_MEASURE: measure alone); and in
 * the same file one of each tables-inl.h and unpack-inl.h.
 *
 * The order of a comparison's operands matters: a < b ? b : a keeps a where a is NaN. */
#include <string.h>

#include "runtime/isa.h"

#define ROUND 12582912.0f /* 1.5 * 2^23: see activations.c */
#define FXQ_ELEMENTWISE                                                                                       \
    .measure = measure, .lstm_cell = lstm_cell, .gru_cell = gru_cell, .rnn_cell = rnn_cell, .unpack = unpack, \
    .put_row = put_row, .add_rows = add_rows, .take_greater = take_greater

FXQ_INLINE uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

FXQ_INLINE float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

#if !defined(FXQ_OWN_QUANTIZATION) && !defined(FXQ_OWN_MEASURE)
static void measure(const float *x, int64_t count, struct fxq_range *range) {
    enum { LANES = 32 };
    float low[LANES], high[LANES];
    uint32_t nan[LANES];
    for (int i = 0; i < LANES; i++) {
        low[i] = range->low;
        high[i] = range->high;
        nan[i] = 0;
    }
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) {
        for (int i = 0; i < LANES; i++) {
            const float v = x[k + i];
            low[i] = v < low[i] ? v : low[i];
            high[i] = v > high[i] ? v : high[i];
            nan[i] |= v != v;
        }
    }
    for (int i = 0; k < count; k++, i++) {
        low[i] = x[k] < low[i] ? x[k] : low[i];
        high[i] = x[k] > high[i] ? x[k] : high[i];
        nan[i] |= x[k] != x[k];
    }
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            low[i] = low[i + half] < low[i] ? low[i + half] : low[i];
            high[i] = high[i + half] > high[i] ? high[i + half] : high[i];
            nan[i] |= nan[i + half];
        }
    }
    *range = (struct fxq_range){low[0], high[0], range->is_nan || nan[0]};
}
#endif

#ifndef FXQ_OWN_QUANTIZATION
/* q = clamp(round(x * inverse) + zero_point, 0, qmax), NaN -> 0. The clamp comes first: its ends are whole numbers, so
 * nothing changes but that infinities are gone before the conversion to an integer. The rounded number is the low bits
 * of the sum with ROUND. */
FXQ_INLINE void quantize_values(const float *restrict x, int64_t count, const struct fxq_row *row, int qmax,
                                FXQ_VALUE *restrict q) {
    const float inverse = row->inverse, least = (float)-row->zero_point, most = (float)(qmax - row->zero_point);
    const uint32_t offset = sizeof(FXQ_VALUE) == 1 ? (uint32_t)row->zero_point : 0;
    for (int64_t k = 0; k < count; k++) {
        float v = x[k] * inverse;
        v = v > least ? v : least; /* NaN -> least */
        v = v < most ? v : most;
        q[k] = (FXQ_VALUE)(float_bits(v + ROUND) + offset);
    }
}
#endif

/* Measure the tokens where they have scales of their own. */
static void set_own_rows(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    for (int i = 0; x->per_token && i < count; i++) {
        struct fxq_range range = {0.0f, 0.0f, false}; /* real 0 must be exact */
        measure(rows[i], x->columns, &range);
        fxq_set_row(&x->row[first + i], &range, x->qmax);
    }
}

/* exp(x) - 1 for x clamped to ±43: fxquant.ops.elementwise.expm1_, which has the constants' meaning. */
FXQ_INLINE float exp_minus_1(float x) {
    x = x < -43.0f ? -43.0f : x;
    x = x > 43.0f ? 43.0f : x;
    const float shifted = x * 1.4426950408889634f + ROUND;
    const float n = shifted - ROUND;
    const float r = (x - n * 0.693359375f) - n * -2.1219444e-4f;
    float p = r * (float)(1.0 / 5040);
    p = (p + (float)(1.0 / 720)) * r;
    p = (p + (float)(1.0 / 120)) * r;
    p = (p + (float)(1.0 / 24)) * r;
    p = (p + (float)(1.0 / 6)) * r;
    p = (p + 0.5f) * (r * r) + r;
    const float power = bits_float((float_bits(shifted) << 23) + 0x3f800000u); /* 2^n: the shift keeps n's low bits */
    return p * power + (power - 1.0f);
}

static void lstm_cell(const float *restrict gates, int64_t gate_stride, int64_t units, float *restrict c,
                      float *restrict h) {
    const float *gi = gates, *gf = gates + gate_stride, *gg = gates + 2 * gate_stride, *go = gates + 3 * gate_stride;
    for (int64_t u = 0; u < units; u++) {
        const float di = exp_minus_1(-gi[u]) + 2.0f, df = exp_minus_1(-gf[u]) + 2.0f;
        const float eg = exp_minus_1(gg[u] * 2.0f), d_o = exp_minus_1(-go[u]) + 2.0f;
        const float state = c[u] / df + eg / (di * (eg + 2.0f));
        const float ec = exp_minus_1(state * 2.0f);
        c[u] = state;
        h[u] = ec / (d_o * (ec + 2.0f));
    }
}

FXQ_INLINE float tanh_of(float x) {
    const float e = exp_minus_1(x * 2.0f);
    return e / (e + 2.0f);
}

static void gru_cell(const float *restrict gates, int64_t gate_stride, int64_t units, const float *restrict x_n,
                     const float *restrict before, float *restrict h) {
    const float *gr = gates, *gz = gates + gate_stride, *inner = gates + 2 * gate_stride;
    for (int64_t u = 0; u < units; u++) {
        const float dr = exp_minus_1(-gr[u]) + 2.0f, dz = exp_minus_1(-gz[u]) + 2.0f;
        const float n = tanh_of(x_n[u] + inner[u] / dr);
        h[u] = n + (before[u] - n) / dz;
    }
}

static void rnn_cell(const float *restrict gates, int64_t units, bool is_relu, float *restrict h) {
    if (is_relu) {
        for (int64_t u = 0; u < units; u++) h[u] = gates[u] < 0.0f ? 0.0f : gates[u];
    } else {
        for (int64_t u = 0; u < units; u++) h[u] = tanh_of(gates[u]);
    }
}

static void take_greater(float *restrict out, const float *restrict x, int64_t count) {
    for (int64_t k = 0; k < count; k++) out[k] = x[k] > out[k] ? x[k] : out[k];
}
