/* The gemv: few rows, weights read as they lie. Adding up lanes at the end takes as long as 64 columns' products of
 * three rows, so that long rows suit it.
 *
 * Expects: common-inl.h's reductions, and epilogue-inl.h. */

/* sum + the products of 64 columns, 4 a lane. Not the intrinsic: gcc 12 copies and spills its accumulators. */
FXQ_INLINE __m512i add_products(__m512i sum, __m512i q, const int8_t *w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(q), "m"(*(const __m512i_u *)w));
    return sum;
}

/* 16 rows from 4 addresses and multiples of the stride, which an x86 address can hold: left to itself gcc keeps 16
 * addresses, most of them in vector registers. */
struct rows_16 {
    const int8_t *row[4]; /* 0, 4, 8, 12 */
    int64_t stride;
};

FXQ_INLINE struct rows_16 begin_rows(const int8_t *w, int64_t stride) {
    return (struct rows_16){{w, w + 4 * stride, w + 8 * stride, w + 12 * stride}, stride};
}

FXQ_INLINE const int8_t *row_of(const struct rows_16 *rows, int i) { return rows->row[i / 4] + i % 4 * rows->stride; }

FXQ_INLINE void advance_rows(struct rows_16 *rows) {
    FXQ_FOR(4, int j = 0; j < 4; j++) {
        rows->row[j] += 64;
        __asm__("" : "+r"(rows->row[j])); /* hides the sum */
    }
}

/* 16 outputs' products with one row: 16 accumulators, a register of q, the weights from memory. */
FXQ_INLINE __m512i dot_16(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *q) {
    struct rows_16 rows = begin_rows(w, stride);
    __m512i acc[16];
    FXQ_FOR(16, int i = 0; i < 16; i++) acc[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < depth; k += 64) {
        const __m512i a = _mm512_load_si512(q + k);
        FXQ_FOR(16, int i = 0; i < 16; i++) acc[i] = add_products(acc[i], a, row_of(&rows, i));
        advance_rows(&rows);
    }
    return sum_16(acc);
}

enum { GEMV_TOGETHER = 3 };

/* 16 outputs' products with `count` (a constant, 2 or 3) rows of q, `depth` apart: each weight is read once. 8 outputs
 * at a time: up to 24 accumulators. is_difference: of two rows, the first one's products minus the second one's. */
FXQ_INLINE void dot_16_together(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *q, int count,
                                bool is_difference, __m512i *sums) {
    __m512i halves[GEMV_TOGETHER][2];
    FXQ_FOR(2, int half = 0; half < 2; half++) {
        struct rows_16 rows = begin_rows(w + 8 * half * stride, stride);
        /* These rows' places in the next group: the weights come from the L3 cache. Of long rows only the next lines,
         * for which the L1 cache has room: 1.1 to 1.3 times faster from 1536 columns on. */
        const int64_t ahead = stride < 1536 ? 16 * stride : 512;
        __m512i acc[GEMV_TOGETHER][8];
        FXQ_FOR(24, int i = 0; i < 8 * count; i++) acc[i / 8][i % 8] = _mm512_setzero_si512();
        for (int64_t k = 0; k < depth; k += 64) {
            __m512i a[GEMV_TOGETHER];
            FXQ_FOR(3, int m = 0; m < count; m++) a[m] = _mm512_load_si512(q + m * depth + k);
            FXQ_FOR(8, int i = 0; i < 8; i++) {
                const __m512i weights = _mm512_loadu_si512(row_of(&rows, i));
                FXQ_FOR(3, int m = 0; m < count; m++) {
                    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc[m][i]) : "v"(a[m]), "v"(weights));
                }
                if (is_difference) _mm_prefetch((const char *)row_of(&rows, i) + ahead, _MM_HINT_T0);
            }
            advance_rows(&rows);
        }
        FXQ_FOR(8, int i = 0; i < 8 * is_difference; i++) acc[0][i] = _mm512_sub_epi32(acc[0][i], acc[1][i]);
        FXQ_FOR(3, int m = 0; m < count - is_difference; m++) halves[m][half] = sum_16_8(acc[m]);
    }
    FXQ_FOR(3, int m = 0; m < count - is_difference; m++) sums[m] = sum_16_lanes(halves[m][0], halves[m][1]);
}

static void row_sums(const struct fxq_weight *weight, int64_t n0, int64_t n1, int32_t *sums, void *scratch) {
    struct weight_reader reader = read_weight(weight, scratch);
    const int64_t columns = reader.columns;
    const __mmask64 in_last_step = columns % 64 ? ~0ull >> (64 - columns % 64) : ~0ull;
    const __m512i ones = _mm512_set1_epi8(1), last = _mm512_maskz_set1_epi8(in_last_step, 1);
    for (int64_t n = n0; n < n1; n += 16) {
        int64_t stride;
        const int8_t *w = weight_rows(&reader, n, 16, &stride);
        struct rows_16 rows = begin_rows(w, stride);
        __m512i acc[16];
        FXQ_FOR(16, int i = 0; i < 16; i++) acc[i] = _mm512_setzero_si512();
        for (int64_t k = 0; k < reader.depth; k += 64) {
            const __m512i a = k + 64 < reader.depth ? ones : last;
            FXQ_FOR(16, int i = 0; i < 16; i++) acc[i] = add_products(acc[i], a, row_of(&rows, i));
            advance_rows(&rows);
        }
        _mm512_mask_storeu_epi32(sums + n - n0, first_lanes(n1 - n), sum_16(acc));
    }
}

static void matmul_gemv(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                        void *scratch) {
    const struct fxq_activations *x = job->x;
    const uint8_t *q = x->packed;
    const int64_t rows = job->sums ? x->rows : x->rows + 1, parts = (rows + GEMV_TOGETHER - 1) / GEMV_TOGETHER;
    struct weight_reader reader = read_weight(job->weight, scratch);
    for (int64_t n = n0; n < n1; n += 16) {
        int64_t stride;
        const int8_t *w = weight_rows(&reader, n, 16, &stride);
        const struct outputs_16 o = begin_outputs(job, n, n1);
        if (rows == 2 && !job->sums) { /* of one token; the extra row gives the correction itself */
            const struct fxq_target row = fxq_target_at(to, 0, n - n0);
            __m512i sums;
            dot_16_together(w, stride, x->depth, q, 2, true, &sums);
            store_outputs(&o, dequantize_outputs(&o, sums, x->row[0].scale, row.addend), row.out);
            continue;
        }
        __m512i row_sums = job->sums ? _mm512_maskz_loadu_epi32(o.lanes, job->sums + n) : _mm512_setzero_si512();
        for (int64_t part = parts - 1; part >= 0; part--) { /* the extra row, which is the last one, comes first */
            const int64_t first = rows * part / parts, end = rows * (part + 1) / parts;
            const uint8_t *a = q + first * x->depth;
            __m512i sums[GEMV_TOGETHER];
            switch (end - first) {
                case 3: dot_16_together(w, stride, x->depth, a, 3, false, sums); break;
                case 2: dot_16_together(w, stride, x->depth, a, 2, false, sums); break;
                default: sums[0] = dot_16(w, stride, x->depth, a);
            }
            if (end > x->rows) row_sums = sums[x->rows - first];
            for (int64_t m = first; m < end && m < x->rows; m++) {
                const struct fxq_target row = fxq_target_at(to, m, n - n0);
                const __m512i zero_point = _mm512_set1_epi32(x->row[m].zero_point);
                const __m512i whole = _mm512_sub_epi32(sums[m - first], _mm512_mullo_epi32(zero_point, row_sums));
                store_outputs(&o, dequantize_outputs(&o, whole, x->row[m].scale, row.addend), row.out);
            }
        }
    }
}
