/* Products of int16 weights with int16 activations, exact, in pieces that instructions for pairs of int16 take.
 *
 * An activation lies as its low byte (0 … 255) and its high byte (-128 … 127), an int16 each, a token's low bytes
 * first: sum(q w) = sum(low w) + 256 sum(high w). A product is below 2^23 then, so that 256 of them always fit an
 * int32; after that many the sums are widened to int64. Activations are 0 beyond the last column, and no weight is read
 * there.
 *
 * Expects: elementwise-inl.h and an epilogue-inl.h. The includer may describe registers; without FXQ_LANES there is
 * plain C:
 *
 * FXQ_LANES, FXQ_TILE                               a register, and how many int64 sums are formed at once
 * static FXQ_LANES load_16(const int16_t *p);       all 16-bit lanes
 * static FXQ_LANES load_first_16(const int16_t *p, int64_t count);  0 in the others
 * static FXQ_LANES add_pairs(sum, a, w);            an int32 lane: sum and the products of two 16-bit lanes
 * static FXQ_LANES add_wide(total, low, high);      int64 lanes: total and, all together, those of low + 256 high
 * static void sum_lanes(const FXQ_LANES v[FXQ_TILE], int64_t *sums);  sums[i]: the sum of v[i]'s int64 lanes
 *
 * and with FXQ_LEAST_PANEL_ROWS it has matmul_int16_panels, another form, for so many rows. */

#define FXQ_INT16 .quantize_int16 = quantize_int16, .matmul_int16 = matmul_int16

enum {
    EXACT_PRODUCTS = 256,
    BLOCK_16 = 16 /* outputs whose weights stay in the cache while the rows go by */
};

static void quantize_int16(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    for (int i = 0; i < count; i++) {
        struct fxq_row *row = &x->row[first + i];
        if (x->per_token) {
            struct fxq_range range = {0.0f, 0.0f, false};
            measure(rows[i], x->columns, &range);
            fxq_set_int16_row(row, &range);
        }
        const float *restrict values = rows[i];
        int16_t *restrict low = (int16_t *)x->packed + 2 * (first + i) * x->depth, *restrict high = low + x->depth;
        const size_t padding = (size_t)(x->depth - x->columns) * sizeof *low;
        const float inverse = row->inverse;
        for (int64_t k = 0; k < x->columns; k++) {
            float v = values[k] * inverse;
            v = v > -32767.0f ? v : -32767.0f; /* a NaN too: its token's scale is NaN */
            v = v < 32767.0f ? v : 32767.0f;
            const int32_t q = (int32_t)(float_bits(v + ROUND) - float_bits(ROUND));
            low[k] = (int16_t)(q & 255);
            high[k] = (int16_t)(q >> 8);
        }
        memset(low + x->columns, 0, padding);
        memset(high + x->columns, 0, padding);
    }
}

/* The conversion of a sum rounds once, to nearest. */
FXQ_INLINE void finish_int16(const struct fxq_matmul *job, const struct fxq_target *to, int64_t m, int64_t n,
                             int64_t n0, int64_t count, const int64_t *restrict sums) {
    float rounded[BLOCK_16];
    for (int64_t i = 0; i < count; i++) rounded[i] = (float)sums[i];
    finish_sums(job, to, m, n, n0, count, rounded);
}

#ifdef FXQ_LANES

enum { LANES_16 = sizeof(FXQ_LANES) / 2, WIDEN_AFTER = EXACT_PRODUCTS * sizeof(FXQ_LANES) / 4 };

/* A tile: `rows` rows (1 or 2, a constant wherever this is inlined) by FXQ_TILE / rows outputs, from column k on. */
FXQ_INLINE void add_tile_columns(const int16_t *a, int64_t depth, const int16_t *const *w, int64_t k, int64_t left,
                                 int rows, FXQ_LANES low[FXQ_TILE], FXQ_LANES high[FXQ_TILE]) {
    const int outputs = FXQ_TILE / rows;
    FXQ_LANES weights[FXQ_TILE];
    FXQ_FOR(8, int i = 0; i < outputs; i++) {
        weights[i] = left >= LANES_16 ? load_16(w[i] + k) : load_first_16(w[i] + k, left);
    }
    FXQ_FOR(2, int m = 0; m < rows; m++) {
        const FXQ_LANES a_low = load_16(a + 2 * m * depth + k), a_high = load_16(a + (2 * m + 1) * depth + k);
        FXQ_FOR(8, int i = 0; i < outputs; i++) {
            low[m * outputs + i] = add_pairs(low[m * outputs + i], a_low, weights[i]);
            high[m * outputs + i] = add_pairs(high[m * outputs + i], a_high, weights[i]);
        }
    }
}

/* sums[m * FXQ_TILE / rows + i]: of row m of a with w[i]. */
FXQ_INLINE void multiply_tile(const int16_t *a, int64_t depth, const int16_t *const *w, int64_t columns, int rows,
                              int64_t *sums) {
    FXQ_LANES total[FXQ_TILE], low[FXQ_TILE], high[FXQ_TILE];
    FXQ_FOR(8, int i = 0; i < FXQ_TILE; i++) total[i] = (FXQ_LANES){0};
    for (int64_t k = 0; k < columns;) {
        const int64_t end = columns - k < WIDEN_AFTER ? columns : k + WIDEN_AFTER;
        FXQ_FOR(8, int i = 0; i < FXQ_TILE; i++) low[i] = high[i] = (FXQ_LANES){0};
        for (; k + LANES_16 <= end; k += LANES_16) add_tile_columns(a, depth, w, k, LANES_16, rows, low, high);
        if (k < end) add_tile_columns(a, depth, w, k, end - k, rows, low, high);
        k = end;
        FXQ_FOR(8, int i = 0; i < FXQ_TILE; i++) total[i] = add_wide(total[i], low[i], high[i]);
    }
    sum_lanes(total, sums);
}

/* Of `rows` rows and outputs [n, n + count): a tile beyond the last output takes that one again. */
FXQ_INLINE void multiply_rows(const struct fxq_matmul *job, int64_t m, int rows, int64_t n, int64_t count,
                              int64_t sums[2][BLOCK_16]) {
    const struct fxq_activations *x = job->x;
    const int16_t *a = (const int16_t *)x->packed + 2 * m * x->depth;
    const int outputs = FXQ_TILE / rows;
    for (int64_t at = 0; at < count; at += outputs) {
        const int16_t *w[FXQ_TILE];
        int64_t tile[FXQ_TILE];
        for (int i = 0; i < outputs; i++) {
            w[i] = (const int16_t *)job->weight->data + (n + (at + i < count ? at + i : count - 1)) * x->columns;
        }
        multiply_tile(a, x->depth, w, x->columns, rows, tile);
        for (int i = 0; i < rows; i++) memcpy(&sums[i][at], tile + i * outputs, (size_t)outputs * sizeof *tile);
    }
}

#else

FXQ_INLINE void multiply_rows(const struct fxq_matmul *job, int64_t m, int rows, int64_t n, int64_t count,
                              int64_t sums[2][BLOCK_16]) {
    const struct fxq_activations *x = job->x;
    for (int i = 0; i < rows; i++) {
        const int16_t *low = (const int16_t *)x->packed + 2 * (m + i) * x->depth, *high = low + x->depth;
        for (int64_t j = 0; j < count; j++) {
            const int16_t *w = (const int16_t *)job->weight->data + (n + j) * x->columns;
            sums[i][j] = 0;
            for (int64_t k = 0; k < x->columns;) {
                const int64_t end = x->columns - k < EXACT_PRODUCTS ? x->columns : k + EXACT_PRODUCTS;
                int32_t lows = 0, highs = 0;
                for (; k < end; k++) lows += (int32_t)low[k] * w[k], highs += (int32_t)high[k] * w[k];
                sums[i][j] += lows + 256 * (int64_t)highs;
            }
        }
    }
}

#endif

#ifdef FXQ_LEAST_PANEL_ROWS
static void matmul_int16_panels(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to);
#else
#define FXQ_LEAST_PANEL_ROWS INT64_MAX
#define matmul_int16_panels(...)
#endif

static void matmul_int16(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to) {
    int64_t sums[2][BLOCK_16];
    if (job->x->rows >= FXQ_LEAST_PANEL_ROWS) {
        matmul_int16_panels(job, n0, n1, to);
        return;
    }
    for (int64_t n = n0; n < n1; n += BLOCK_16) {
        const int64_t count = n1 - n < BLOCK_16 ? n1 - n : BLOCK_16;
        int64_t m = 0;
        for (; m + 2 <= job->x->rows; m += 2) {
            multiply_rows(job, m, 2, n, count, sums);
            finish_int16(job, to, m, n, n0, count, sums[0]);
            finish_int16(job, to, m + 1, n, n0, count, sums[1]);
        }
        if (m < job->x->rows) {
            multiply_rows(job, m, 1, n, count, sums);
            finish_int16(job, to, m, n, n0, count, sums[0]);
        }
    }
}
