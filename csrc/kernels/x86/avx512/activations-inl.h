/* The quantization of activations in AVX512, as elementwise-inl.h and activations.c have it, to the bit.
 *
 * Expects: what common-inl.h has before its includes. */

/* Widen 16 ranges by x's values; whether there is a NaN among them. */
FXQ_INLINE bool measure_lanes(const float *x, int64_t count, __m512 *least, __m512 *greatest) {
    __m512 low = *least, high = *greatest, low2 = low, high2 = high;
    __mmask16 nan = 0;
    int64_t k = 0;
    for (; k + 32 <= count; k += 32) {
        const __m512 v = _mm512_loadu_ps(x + k), w = _mm512_loadu_ps(x + k + 16);
        low = _mm512_min_ps(v, low); /* the second operand where one is NaN */
        high = _mm512_max_ps(v, high);
        low2 = _mm512_min_ps(w, low2);
        high2 = _mm512_max_ps(w, high2);
        nan |= _mm512_cmp_ps_mask(v, w, _CMP_UNORD_Q);
    }
    for (; k < count; k += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(first_lanes(count - k), x + k);
        low = _mm512_min_ps(v, low);
        high = _mm512_max_ps(v, high);
        nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
    *least = _mm512_min_ps(low, low2);
    *greatest = _mm512_max_ps(high, high2);
    return nan != 0;
}

/* As in elementwise-inl.h, in fewer instructions than compilers find: a step of an LSTM waits for these. */
static void measure(const float *x, int64_t count, struct fxq_range *range) {
    __m512 low = _mm512_set1_ps(range->low), high = _mm512_set1_ps(range->high);
    range->is_nan |= measure_lanes(x, count, &low, &high);
    range->low = _mm512_reduce_min_ps(low);
    range->high = _mm512_reduce_max_ps(high);
}

FXQ_INLINE void quantize_values(const float *x, int64_t count, const struct fxq_row *row, int qmax, uint8_t *q) {
    const __m512 inverse = _mm512_set1_ps(row->inverse), round = _mm512_set1_ps(12582912.0f); /* 1.5 * 2^23 */
    const __m512 least = _mm512_set1_ps((float)-row->zero_point),
                 most = _mm512_set1_ps((float)(qmax - row->zero_point));
    const __m512i offset = _mm512_set1_epi32(row->zero_point);
    for (int64_t k = 0; k < count; k += 16) {
        const __mmask16 lanes = first_lanes(count - k);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + k), inverse);
        v = _mm512_min_ps(_mm512_max_ps(v, least), most); /* NaN -> least */
        const __m512i whole = _mm512_add_epi32(_mm512_castps_si512(_mm512_add_ps(v, round)), offset);
        if (lanes == 0xffff) _mm_storeu_si128((__m128i *)(q + k), _mm512_cvtepi32_epi8(whole));
        else _mm512_mask_cvtepi32_storeu_epi8(q + k, lanes, whole);
    }
}

#include "kernels/generic/row_major-inl.h"

/* fxq_set_row for 16 rows at once, to the bit. nan: the rows that have one. */
static void set_rows_16(struct fxq_row *row, int count, __m512 low, __m512 high, __mmask16 nan, int qmax) {
    const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f), round = _mm512_set1_ps(12582912.0f);
    const __m512 most = _mm512_set1_ps((float)qmax);
    low = _mm512_max_ps(low, _mm512_set1_ps(-3.4028234663852886e38f));
    high = _mm512_min_ps(high, _mm512_set1_ps(3.4028234663852886e38f));
    __m512 scale = _mm512_sub_ps(_mm512_mul_ps(high, half), _mm512_mul_ps(low, half));
    scale = _mm512_div_ps(scale, _mm512_mul_ps(most, half));
    scale = _mm512_mask_mov_ps(scale, _mm512_cmp_ps_mask(scale, _mm512_set1_ps(1.17549435e-38f), _CMP_LT_OQ), one);
    scale = _mm512_mask_mov_ps(scale, nan, _mm512_set1_ps(__builtin_nanf("")));
    const __m512 inverse = _mm512_div_ps(one, scale);
    const __m512 minus =
        _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(inverse), _mm512_set1_epi32(INT32_MIN)));
    __m512 zero = _mm512_sub_ps(_mm512_add_ps(_mm512_mul_ps(low, minus), round), round);
    zero = _mm512_min_ps(_mm512_max_ps(zero, _mm512_setzero_ps()), most); /* NaN: 0 */
    const __m512i zero_point = _mm512_cvttps_epi32(zero),
                  minus_zero = _mm512_sub_epi32(_mm512_setzero_si512(), zero_point);
    const __m512i pair =
        _mm512_or_si512(_mm512_slli_epi32(minus_zero, 16 + 7), _mm512_and_si512(minus_zero, _mm512_set1_epi32(0xffff)));
    _Alignas(64) float scales[16], inverses[16];
    _Alignas(64) int32_t zero_points[16], pairs[16];
    _mm512_store_ps(scales, scale);
    _mm512_store_ps(inverses, inverse);
    _mm512_store_si512(zero_points, zero_point);
    _mm512_store_si512(pairs, pair);
    for (int i = 0; i < count; i++) row[i] = (struct fxq_row){scales[i], inverses[i], zero_points[i], pairs[i]};
}

/* As set_own_rows in elementwise-inl.h: the lanes of all rows are reduced together. */
static void set_own_rows_16(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    __m512 low[16], high[16];
    __mmask16 nan = 0;
    for (int i = 0; i < 16; i++) {
        low[i] = high[i] = _mm512_setzero_ps();
        if (i < count) nan |= (__mmask16)(measure_lanes(rows[i], x->columns, &low[i], &high[i]) << i);
    }
    set_rows_16(x->row + first, count, least_16(low), greatest_16(high), nan, x->qmax);
}

static void set_scales(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    if (x->per_token && count >= 4) set_own_rows_16(x, first, count, rows);
    else set_own_rows(x, first, count, rows); /* a few: no longer than the reduction of 16 */
}
