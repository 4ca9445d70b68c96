/* The gemv: few rows, weights read as they lie.
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

/* The same minus the products with a second row `z`: each weight is read once. 8 outputs at a time: 16 accumulators. */
FXQ_INLINE __m512i dot_16_minus(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *q, const uint8_t *z) {
    __m512i difference[16];
    FXQ_FOR(2, int half = 0; half < 16; half += 8) {
        struct rows_16 rows = begin_rows(w + half * stride, stride);
        /* These rows' places in the next group: the weights come from the L3 cache. Of long rows only the next lines,
         * for which the L1 cache has room: 1.1 to 1.3 times faster from 1536 columns on. */
        const int64_t ahead = stride < 1536 ? 16 * stride : 512;
        __m512i acc[8], less[8];
        FXQ_FOR(8, int i = 0; i < 8; i++) acc[i] = less[i] = _mm512_setzero_si512();
        for (int64_t k = 0; k < depth; k += 64) {
            const __m512i a = _mm512_load_si512(q + k), b = _mm512_load_si512(z + k);
            FXQ_FOR(8, int i = 0; i < 8; i++) {
                acc[i] = add_products(acc[i], a, row_of(&rows, i));
                less[i] = add_products(less[i], b, row_of(&rows, i));
                _mm_prefetch((const char *)row_of(&rows, i) + ahead, _MM_HINT_T0);
            }
            advance_rows(&rows);
        }
        FXQ_FOR(8, int i = 0; i < 8; i++) difference[half + i] = _mm512_sub_epi32(acc[i], less[i]);
    }
    return sum_16(difference);
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
    const uint8_t *q = x->packed, *extra = q + x->rows * x->depth;
    struct weight_reader reader = read_weight(job->weight, scratch);
    for (int64_t n = n0; n < n1; n += 16) {
        int64_t stride;
        const int8_t *w = weight_rows(&reader, n, 16, &stride);
        const struct outputs_16 o = begin_outputs(job, n, n1);
        if (x->rows == 1 && !job->sums) {
            const struct fxq_target row = fxq_target_at(to, 0, n - n0);
            const __m512i sums = dot_16_minus(w, stride, x->depth, q, extra);
            store_outputs(&o, dequantize_outputs(&o, sums, x->row[0].scale, row.addend), row.out);
            continue;
        }
        __m512i row_sums;
        if (job->sums) row_sums = _mm512_maskz_loadu_epi32(o.lanes, job->sums + n);
        else row_sums = dot_16(w, stride, x->depth, extra);
        for (int64_t m = 0; m < x->rows; m++) {
            const struct fxq_target row = fxq_target_at(to, m, n - n0);
            const __m512i zero_point = _mm512_set1_epi32(x->row[m].zero_point);
            __m512i sums = dot_16(w, stride, x->depth, q + m * x->depth);
            sums = _mm512_sub_epi32(sums, _mm512_mullo_epi32(zero_point, row_sums));
            store_outputs(&o, dequantize_outputs(&o, sums, x->row[m].scale, row.addend), row.out);
        }
    }
}
