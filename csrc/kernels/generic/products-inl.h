/* Products of two activations, and the softmax of attention.
 *
 * Each sum goes through the depth in order, by fused multiply-adds from 0: sum = fma(a[m][k], b[k][n], sum), k = 0, 1,
 * …. So an element depends on its row and its column alone, not on how many others there are nor where they lie; and
 * terms of 0 at the end, as of keys that a mask keeps out, change nothing. Lanes are columns: nothing is added across
 * them.
 *
 * Expects: the registers that floats-inl.h has, at whose end this is included. */

#include <math.h>

/* Columns [16 n, 16 n + 16 reals) of `rows` rows; both numbers are constants wherever this is inlined. */
FXQ_INLINE void multiply_one_tile(const struct fxq_tiles *t, int64_t m, int64_t n, int rows, int reals) {
    const float *a = t->a + m * t->a_row, *b = t->b + n * REALS;
    const int64_t a_row = t->a_row, a_column = t->a_column, b_row = t->b_row;
    FXQ_REALS sums[FXQ_TILE_ROWS][FXQ_TILE_REALS];
    FXQ_FOR(8, int i = 0; i < rows; i++) {
        FXQ_FOR(8, int j = 0; j < reals; j++) sums[i][j] = no_reals();
    }
    for (int64_t k = 0; k < t->depth; k++, a += a_column, b += b_row) {
        FXQ_REALS values[FXQ_TILE_REALS];
        FXQ_FOR(8, int j = 0; j < reals; j++) values[j] = load_reals(b + j * REALS);
        FXQ_FOR(8, int i = 0; i < rows; i++) {
            const FXQ_REALS factor = spread(a[i * a_row]);
            FXQ_FOR(8, int j = 0; j < reals; j++) sums[i][j] = fuse(factor, values[j], sums[i][j]);
        }
    }
    const int64_t left = t->columns - n * REALS;
    FXQ_FOR(8, int i = 0; i < rows; i++) {
        float *out = t->out + (m + i) * t->out_row + n * REALS;
        FXQ_FOR(8, int j = 0; j < reals; j++) {
            if (left - j * REALS >= REALS) {
                store_reals(out + j * REALS, sums[i][j]);
                continue;
            }
            float last[REALS];
            store_reals(last, sums[i][j]);
            memcpy(out + j * REALS, last, (size_t)(left - j * REALS) * sizeof *last);
        }
    }
}

FXQ_INLINE void multiply_tile_columns(const struct fxq_tiles *t, int64_t m, int rows) {
    const int64_t reals = (t->columns + REALS - 1) / REALS;
    int64_t n = 0;
    for (; n + FXQ_TILE_REALS <= reals; n += FXQ_TILE_REALS) multiply_one_tile(t, m, n, rows, FXQ_TILE_REALS);
    switch (reals - n) {
#if FXQ_TILE_REALS > 3
        case 3: multiply_one_tile(t, m, n, rows, 3); break;
        case 2: multiply_one_tile(t, m, n, rows, 2); break;
#endif
#if FXQ_TILE_REALS > 1
        case 1: multiply_one_tile(t, m, n, rows, 1); break;
#endif
        default: break;
    }
}

static void multiply_tiles(const struct fxq_tiles *t) {
    const int64_t tiles = (t->rows + FXQ_TILE_ROWS - 1) / FXQ_TILE_ROWS; /* of nearly the same rows each */
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t m = t->rows * tile / tiles, rows = t->rows * (tile + 1) / tiles - m;
        switch (rows) {
#if FXQ_TILE_ROWS > 5
            case 6: multiply_tile_columns(t, m, 6); break;
#endif
#if FXQ_TILE_ROWS > 1
            case 5: multiply_tile_columns(t, m, 5); break;
            case 4: multiply_tile_columns(t, m, 4); break;
            case 3: multiply_tile_columns(t, m, 3); break;
            case 2: multiply_tile_columns(t, m, 2); break;
#endif
            default: multiply_tile_columns(t, m, 1);
        }
    }
}

/* exp(x) for x ≤ 0, and 0 below -87: exp_minus_1's reduction and series (elementwise-inl.h), here by fused
 * multiply-adds. */
FXQ_INLINE FXQ_REALS exp_of_negative(FXQ_REALS x) {
    const FXQ_REALS clamped = greater(spread(-87.0f), x); /* NaN stays NaN */
    const FXQ_REALS shifted = fuse(clamped, spread(1.4426950408889634f), spread(ROUND)),
                    n = plus(shifted, spread(-ROUND));
    const FXQ_REALS r = fuse(n, spread(2.1219444e-4f), fuse(n, spread(-0.693359375f), clamped));
    FXQ_REALS p = fuse(r, spread((float)(1.0 / 5040)), spread((float)(1.0 / 720)));
    p = fuse(p, r, spread((float)(1.0 / 120)));
    p = fuse(p, r, spread((float)(1.0 / 24)));
    p = fuse(p, r, spread((float)(1.0 / 6)));
    p = fuse(p, r, spread(0.5f));
    p = fuse(p, times(r, r), r);
    const FXQ_REALS power = powers(shifted);
    return keep_from(x, -87.0f, fuse(p, power, power));
}

/* Scores become scale score + mask, and -inf beyond them up to a whole number of sixteen; returns the greatest, NaN
 * left aside. */
FXQ_INLINE float scale_scores(const struct fxq_scores *row) {
    const FXQ_REALS scale = spread(row->scale);
    FXQ_REALS greatest = spread(-INFINITY);
    int64_t k = 0;
    for (; k + REALS <= row->count && (row->mask == NULL || row->mask_stride == 1); k += REALS) {
        FXQ_REALS value = times(load_reals(row->values + k), scale);
        if (row->mask) value = plus(value, load_reals(row->mask + k));
        store_reals(row->values + k, value);
        greatest = greater(value, greatest);
    }
    for (; k < row->count; k += REALS) {
        for (int64_t i = k; i < k + REALS; i++) {
            if (i >= row->count) row->values[i] = -INFINITY;
            else row->values[i] = row->values[i] * row->scale + (row->mask ? row->mask[i * row->mask_stride] : 0.0f);
        }
        greatest = greater(load_reals(row->values + k), greatest);
    }
    float lanes[REALS];
    store_reals(lanes, greatest);
    for (int half = REALS / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
    }
    return lanes[0];
}

/* Returns the sum of what it leaves in the row: sixteen sums side by side, of the keys k, k + 16, k + 32, …, added up
 * as floats-inl.h says. Where all keys are kept out (-inf) everything is 0, and so is the sum. */
static float softmax_row(const struct fxq_scores *row) {
    const float most = scale_scores(row);
    const FXQ_REALS less = spread(most == -INFINITY ? 0.0f : -most);
    FXQ_REALS sum = no_reals();
    int64_t k = 0;
    for (; k < row->count; k += REALS) {
        const FXQ_REALS value = exp_of_negative(plus(load_reals(row->values + k), less));
        store_reals(row->values + k, value);
        sum = plus(sum, value);
    }
    if (k < row->padded) memset(row->values + k, 0, (size_t)(row->padded - k) * sizeof *row->values);
    const FXQ_REALS four[4] = {sum, sum, sum, sum};
    float sums[4];
    sum_4_reals(four, sums);
    return sums[0];
}
