/* Weights packed: four columns of 16 outputs a register, [depth / 4][outputs][4]. Lanes are outputs then.
 *
 * Expects: common-inl.h. */

enum { PACKED_OUTPUTS = 64 };

FXQ_INLINE __m512i sum_columns(__m512i sums, __m512i four) {
    return _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), four);
}

/* Sixteen rows to lanes, 32 columns of each: v[i] has those of a row and of the fourth row after it, of rows 0 to 3 and
 * 8 to 11; then v[i] has 4 columns of each row. */
FXQ_INLINE void transpose_rows(__m512i v[8]) {
    __m512i t[8];
    FXQ_FOR(4, int i = 0; i < 4; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    FXQ_FOR(2, int i = 0; i < 8; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    FXQ_FOR(4, int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    }
    FXQ_FOR(8, int i = 0; i < 8; i++) v[i] = t[i];
}

FXQ_INLINE void load_rows(const int8_t *rows, int64_t stride, __m512i v[8]) {
    FXQ_FOR(8, int i = 0; i < 8; i++) {
        const int8_t *row = rows + (i < 4 ? i : i + 4) * stride;
        const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)row));
        v[i] = _mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i *)(row + 4 * stride)), 1);
    }
}

/* The same of fewer rows or columns, the others 0. */
FXQ_INLINE void load_some_rows(const int8_t *rows, int64_t stride, int64_t count, int64_t columns, __m512i v[8]) {
    const __mmask32 real = columns >= 32 ? ~0u : columns <= 0 ? 0 : ~0u >> (32 - columns);
    FXQ_FOR(8, int i = 0; i < 8; i++) {
        const int64_t index = i < 4 ? i : i + 4;
        const int8_t *row = rows + index * stride;
        const __m256i first = _mm256_maskz_loadu_epi8(index < count ? real : 0, row);
        const __m256i second = _mm256_maskz_loadu_epi8(index + 4 < count ? real : 0, row + 4 * stride);
        v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    }
}

/* 16 rows of a weight, `count` of them real, to every fourth 64 bytes of packed, 4 columns of each row there. Returns
 * their sums as pairs (see make_pairs). */
FXQ_INLINE __m512i pack_16(const int8_t *rows, int64_t count, int64_t columns, int8_t *packed) {
    __m512i sums = _mm512_setzero_si512();
    for (int64_t k = 0; k < fxq_depth(columns); k += 32) {
        __m512i v[8];
        if (count >= 16 && columns - k >= 32) load_rows(rows + k, columns, v);
        else load_some_rows(rows + k, columns, count, columns - k, v);
        transpose_rows(v);
        FXQ_FOR(8, int i = 0; i < 8; i++) {
            _mm512_store_si512(packed + 64 * k + 256 * i, v[i]);
            sums = sum_columns(sums, v[i]);
        }
    }
    return make_pairs(sums);
}

/* Rows [n, n + 64) of the weight, as far as n1. */
static void pack_block(const struct fxq_matmul *job, int64_t n, int64_t n1, int8_t *packed, int32_t *pairs) {
    for (int i = 0; i < PACKED_OUTPUTS; i += 16) {
        const int64_t left = n1 - n - i, columns = job->x->columns;
        const __m512i sums = pack_16((const int8_t *)job->weight->data + (n + i) * columns, left < 0 ? 0 : left,
                                     columns, packed + 4 * i);
        _mm512_store_si512(pairs + i, sums);
    }
}

/* `count` tokens (a constant, up to 6) by 64 packed outputs, of `columns` columns, a multiple of 4. */
FXQ_INLINE void add_packed(const uint8_t *q, int64_t depth, int count, const int8_t *w, int64_t columns,
                           __m512i (*sums)[4]) {
    for (int64_t k = 0; k < columns; k += 4, w += 4 * PACKED_OUTPUTS) {
        __m512i weights[4];
        FXQ_FOR(4, int j = 0; j < 4; j++) weights[j] = _mm512_load_si512(w + 64 * j);
        FXQ_FOR(6, int i = 0; i < count; i++) {
            int32_t four;
            memcpy(&four, q + i * depth + k, sizeof four);
            const __m512i a = _mm512_set1_epi32(four);
            FXQ_FOR(4, int j = 0; j < 4; j++) {
                __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[i][j]) : "v"(a), "v"(weights[j])); /* as add_products */
            }
        }
    }
}
