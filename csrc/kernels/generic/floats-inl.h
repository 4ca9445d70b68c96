/* Products of float weights, float16 or float32, with float activations: the one form of product that is not exact.
 *
 * A dot product is sixteen sums side by side, of the columns k, k + 16, k + 32, …, each by fused multiply-adds; then of
 * each four lanes those 2 apart are added, and then the two; then the four sums in the same order. Every
 * instruction set keeps this order, so that all give the same bits, and a token's bits do not depend on other tokens.
 * Activations lie token by token as floats, 0 beyond the last column.
 *
 * A tile of some rows by some outputs stays in registers while the columns go by, DEPTH_BLOCK at a time: so much of the
 * rows stays in the L1 cache while all outputs of a block pass. Halves are widened once for all rows, but for a single
 * row on the way.
 *
 * Expects: elementwise-inl.h, an epilogue-inl.h, and a description of registers; without FXQ_REALS there is plain C:
 *
 * FXQ_REALS                                           sixteen floats
 * FXQ_REAL_ROWS, FXQ_REAL_OUTPUTS                     the tile
 * FXQ_ROW_OUTPUTS                                     outputs of a tile of one row: enough sums to hide the latency
 * static FXQ_REALS no_reals(void);                    0 in each lane
 * static FXQ_REALS load_reals(const float *p);
 * static FXQ_REALS load_halves(const uint16_t *p);    float16
 * static void store_reals(float *p, FXQ_REALS v);
 * static FXQ_REALS spread(float x);                   x in each lane
 * static FXQ_REALS plus(FXQ_REALS a, FXQ_REALS b), times(FXQ_REALS a, FXQ_REALS b);
 * static FXQ_REALS greater(FXQ_REALS a, FXQ_REALS b);              a > b ? a : b
 * static FXQ_REALS powers(FXQ_REALS shifted);         2^n of n + ROUND
 * static FXQ_REALS keep_from(FXQ_REALS x, float limit, FXQ_REALS y);   x < limit ? 0 : y
 * FXQ_TILE_ROWS, FXQ_TILE_REALS                       the tile of products-inl.h
 * static FXQ_REALS fuse(FXQ_REALS a, FXQ_REALS b, FXQ_REALS sum);  a b + sum, rounded once
 * static void sum_4_reals(const FXQ_REALS v[4], float *sums);      sums[i]: the sum of v[i]'s lanes, in that order */

#define FXQ_FLOATS .matmul_floats = matmul_floats, .multiply_tiles = multiply_tiles, .softmax_row = softmax_row

enum {
    REALS = 16,
    DEPTH_BLOCK = 1024,
    MOST_BLOCK_OUTPUTS = 32,
    ROW_BYTES = 1 << 20,   /* of rows that stay in the L2 cache */
    WIDE_BYTES = 256 << 10 /* of a block's widened weights: they stay in the L2 cache; more where a tile needs it */
};

#ifndef FXQ_REALS
#include <math.h>
#define FXQ_REAL_ROWS 1
#define FXQ_REAL_OUTPUTS 1
#define FXQ_ROW_OUTPUTS 1
#define FXQ_TILE_ROWS 1
#define FXQ_TILE_REALS 1
#define FXQ_REALS struct reals

struct reals {
    float lane[REALS];
};

FXQ_INLINE struct reals no_reals(void) { return (struct reals){{0.0f}}; }

FXQ_INLINE struct reals load_reals(const float *p) {
    struct reals v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Without a float16 type: its bits moved up, and the exponent's bias made float32's; subnormals are multiples of 2^-24.
 */
FXQ_INLINE float widen_half(uint16_t half) {
    const uint32_t magnitude = half & 0x7fffu, sign = (uint32_t)(half & 0x8000u) << 16, bias = 112u << 23;
    const uint32_t normal =
        (magnitude << 13) + bias + (magnitude >= 0x7c00u ? bias : 0); /* infinity and NaN keep theirs */
    return bits_float(sign | (magnitude < 0x400u ? float_bits((float)magnitude * 0x1p-24f) : normal));
}

FXQ_INLINE struct reals load_halves(const uint16_t *p) {
    struct reals v;
    for (int i = 0; i < REALS; i++) v.lane[i] = widen_half(p[i]);
    return v;
}

FXQ_INLINE void store_reals(float *p, struct reals v) { memcpy(p, &v, sizeof v); }

FXQ_INLINE struct reals spread(float x) {
    struct reals v;
    for (int i = 0; i < REALS; i++) v.lane[i] = x;
    return v;
}

FXQ_INLINE struct reals plus(struct reals a, struct reals b) {
    for (int i = 0; i < REALS; i++) a.lane[i] += b.lane[i];
    return a;
}

FXQ_INLINE struct reals times(struct reals a, struct reals b) {
    for (int i = 0; i < REALS; i++) a.lane[i] *= b.lane[i];
    return a;
}

FXQ_INLINE struct reals greater(struct reals a, struct reals b) {
    for (int i = 0; i < REALS; i++) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}

FXQ_INLINE struct reals powers(struct reals shifted) {
    for (int i = 0; i < REALS; i++) shifted.lane[i] = bits_float((float_bits(shifted.lane[i]) << 23) + 0x3f800000u);
    return shifted;
}

FXQ_INLINE struct reals keep_from(struct reals x, float limit, struct reals y) {
    for (int i = 0; i < REALS; i++) y.lane[i] = x.lane[i] < limit ? 0.0f : y.lane[i];
    return y;
}

FXQ_INLINE struct reals fuse(struct reals a, struct reals b, struct reals sum) {
    for (int i = 0; i < REALS; i++) sum.lane[i] = fmaf(a.lane[i], b.lane[i], sum.lane[i]);
    return sum;
}

FXQ_INLINE float sum_four(const float v[4]) { return (v[0] + v[2]) + (v[1] + v[3]); }

FXQ_INLINE void sum_4_reals(const struct reals v[4], float *sums) {
    for (int i = 0; i < 4; i++) {
        float fours[4];
        for (int j = 0; j < 4; j++) fours[j] = sum_four(v[i].lane + 4 * j);
        sums[i] = sum_four(fours);
    }
}
#endif

FXQ_INLINE FXQ_REALS load_first_halves(const uint16_t *p, int64_t count) {
    uint16_t copy[REALS] = {0};
    memcpy(copy, p, (size_t)count * sizeof *copy);
    return load_halves(copy);
}

FXQ_INLINE FXQ_REALS load_first_reals(const float *p, int64_t count) {
    float copy[REALS] = {0};
    memcpy(copy, p, (size_t)count * sizeof *copy);
    return load_reals(copy);
}

static void widen(const uint16_t *halves, int64_t count, float *out) {
    int64_t i = 0;
    for (; i + REALS <= count; i += REALS) store_reals(out + i, load_halves(halves + i));
    if (i == count) return;
    float rest[REALS];
    store_reals(rest, load_first_halves(halves + i, count - i));
    memcpy(out + i, rest, (size_t)(count - i) * sizeof *out);
}

/* A weight's rows as they lie, of one of two types: a constant wherever it is used. */
struct float_rows {
    const void *values;
    int64_t columns;
    bool is_half;
};

FXQ_INLINE FXQ_REALS weights_at(struct float_rows w, int64_t row, int64_t k, bool is_whole) {
    const int64_t at = row * w.columns + k, left = w.columns - k;
    if (w.is_half) {
        const uint16_t *p = (const uint16_t *)w.values + at;
        return is_whole ? load_halves(p) : load_first_halves(p, left);
    }
    const float *p = (const float *)w.values + at;
    return is_whole ? load_reals(p) : load_first_reals(p, left);
}

/* Its first `rows` rows and `outputs` columns are in use, so that the rest takes no registers. */
typedef FXQ_REALS float_tile[FXQ_REAL_ROWS][FXQ_ROW_OUTPUTS];

/* Columns [k, end) of a tile; `rows` and `outputs` are constants wherever this is inlined. */
FXQ_INLINE void add_float_columns(const float *x, int64_t depth, struct float_rows w, int64_t n, int64_t k, int64_t end,
                                  int rows, int outputs, float_tile sums) {
    for (; k + REALS <= end; k += REALS) {
        FXQ_REALS weights[FXQ_ROW_OUTPUTS];
        FXQ_FOR(8, int j = 0; j < outputs; j++) weights[j] = weights_at(w, n + j, k, true);
        FXQ_FOR(8, int i = 0; i < rows; i++) {
            const FXQ_REALS values = load_reals(x + i * depth + k);
            FXQ_FOR(8, int j = 0; j < outputs; j++) sums[i][j] = fuse(values, weights[j], sums[i][j]);
        }
    }
    if (k >= end) return;
    FXQ_FOR(8, int j = 0; j < outputs; j++) {
        const FXQ_REALS weights = weights_at(w, n + j, k, false);
        FXQ_FOR(8, int i = 0; i < rows; i++) sums[i][j] = fuse(load_reals(x + i * depth + k), weights, sums[i][j]);
    }
}

/* Sums of a block of outputs whose columns are not all added yet. */
typedef float float_lanes[FXQ_REAL_ROWS][MOST_BLOCK_OUTPUTS][REALS];
typedef float float_sums[FXQ_REAL_ROWS][MOST_BLOCK_OUTPUTS];

FXQ_INLINE void sum_tile_row(const FXQ_REALS *row, int outputs, float *sums) {
    if (outputs % 4 == 0) {
        FXQ_FOR(2, int j = 0; j < outputs; j += 4) sum_4_reals(row + j, sums + j);
        return;
    }
    const FXQ_REALS four[4] = {row[0], row[outputs - 1], row[0], row[0]};
    float summed[4];
    sum_4_reals(four, summed);
    for (int j = 0; j < outputs; j++) sums[j] = summed[j];
}

FXQ_INLINE void multiply_float_tile(const float *x, int64_t depth, struct float_rows w, int64_t n, int64_t k,
                                    int64_t end, int rows, int outputs, float_lanes lanes, float_sums sums) {
    float_tile tile;
    FXQ_FOR(8, int i = 0; i < rows; i++) {
        FXQ_FOR(8, int j = 0; j < outputs; j++) tile[i][j] = k ? load_reals(lanes[i][n + j]) : no_reals();
    }
    add_float_columns(x, depth, w, n, k, end, rows, outputs, tile);
    FXQ_FOR(8, int i = 0; i < rows; i++) {
        if (end == w.columns) sum_tile_row(tile[i], outputs, sums[i] + n);
        if (end == w.columns) continue;
        FXQ_FOR(8, int j = 0; j < outputs; j++) store_reals(lanes[i][n + j], tile[i][j]);
    }
}

/* Some rows (a constant) by `count` outputs of w. */
FXQ_INLINE void multiply_float_rows(const float *x, int64_t depth, struct float_rows w, int64_t count, int rows,
                                    float_sums sums) {
    float_lanes lanes;
    int64_t k = 0;
    do {
        const int64_t end = w.columns - k < DEPTH_BLOCK ? w.columns : k + DEPTH_BLOCK;
        const int outputs = rows == 1 ? FXQ_ROW_OUTPUTS : FXQ_REAL_OUTPUTS;
        int64_t n = 0;
        for (; n + outputs <= count; n += outputs)
            multiply_float_tile(x, depth, w, n, k, end, rows, outputs, lanes, sums);
        for (; n < count; n++) multiply_float_tile(x, depth, w, n, k, end, rows, 1, lanes, sums);
        k = end;
    } while (k < w.columns);
}

/* The rows of a tile, or fewer. */
static void multiply_tile_rows(const float *x, int64_t depth, const float *weights, int64_t columns, int64_t count,
                               int64_t rows, float_sums sums) {
    const struct float_rows w = {weights, columns, false};
    switch (rows) {
#if FXQ_REAL_ROWS > 3
        case 6: multiply_float_rows(x, depth, w, count, 6, sums); break;
        case 5: multiply_float_rows(x, depth, w, count, 5, sums); break;
        case 4: multiply_float_rows(x, depth, w, count, 4, sums); break;
#endif
#if FXQ_REAL_ROWS > 1
        case 3: multiply_float_rows(x, depth, w, count, 3, sums); break;
        case 2: multiply_float_rows(x, depth, w, count, 2, sums); break;
#endif
        default: multiply_float_rows(x, depth, w, count, 1, sums);
    }
}

/* Rows [m0, m1), which stay in the L2 cache while all outputs pass. */
static void multiply_float_block(const struct fxq_matmul *job, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                                 const struct fxq_target *to, float *wide) {
    const struct fxq_activations *x = job->x;
    const float *values = (const float *)x->packed + m0 * x->depth;
    const int64_t fits = WIDE_BYTES / (int64_t)sizeof(float) / (x->depth + 1) / FXQ_REAL_OUTPUTS * FXQ_REAL_OUTPUTS;
    const int64_t block = fxq_clamp(fits, FXQ_REAL_OUTPUTS, MOST_BLOCK_OUTPUTS);
    for (int64_t n = n0; n < n1; n += block) {
        const int64_t count = n1 - n < block ? n1 - n : block;
        float_sums sums;
        const uint16_t *halves =
            job->weight->format == FXQ_FLOAT16 ? (const uint16_t *)job->weight->data + n * x->columns : NULL;
        if (halves && x->rows == 1) {
            const struct float_rows w = {halves, x->columns, true};
            multiply_float_rows(values, x->depth, w, count, 1, sums);
            finish_sums(job, to, 0, n, n0, count, sums[0]);
            continue;
        }
        const float *weights = halves ? wide : (const float *)job->weight->data + n * x->columns;
        if (halves) widen(halves, count * x->columns, wide);
        const int64_t rows = m1 - m0,
                      tiles = (rows + FXQ_REAL_ROWS - 1) / FXQ_REAL_ROWS; /* of nearly the same rows each */
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t m = rows * tile / tiles, end = rows * (tile + 1) / tiles;
            multiply_tile_rows(values + m * x->depth, x->depth, weights, x->columns, count, end - m, sums);
            for (int64_t i = m; i < end; i++) finish_sums(job, to, m0 + i, n, n0, count, sums[i - m]);
        }
    }
}

static void matmul_floats(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                          void *scratch) {
    const struct fxq_activations *x = job->x;
    const int64_t row_bytes = x->depth * (int64_t)sizeof(float) + 1, most = ROW_BYTES / row_bytes + FXQ_REAL_ROWS;
    for (int64_t m = 0; m < x->rows; m += most) {
        multiply_float_block(job, m, x->rows - m < most ? x->rows : m + most, n0, n1, to, scratch);
    }
}

#include "kernels/generic/products-inl.h"
