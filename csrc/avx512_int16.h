/* The registers of int16.h in AVX512-VNNI: 64 products an instruction pair, 8 int64 sums at once. */
#define FXQ_LANES __m512i
#define FXQ_TILE 8

FXQ_INLINE __m512i load_16(const int16_t *p) { return _mm512_loadu_si512(p); }

FXQ_INLINE __m512i load_first_16(const int16_t *p, int64_t count) {
    return _mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), p);
}

FXQ_INLINE __m512i add_pairs(__m512i sum, __m512i a, __m512i w) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w)); /* see add_products */
    return sum;
}

FXQ_INLINE __m512i add_wide(__m512i total, __m512i low, __m512i high) {
    const __m512i one = _mm512_set1_epi64(1), shift = _mm512_set1_epi64(256); /* even lanes times these */
    const __m512i even = _mm512_add_epi64(_mm512_mul_epi32(low, one), _mm512_mul_epi32(high, shift));
    const __m512i odd_high = _mm512_mul_epi32(_mm512_srli_epi64(high, 32), shift);
    const __m512i odd = _mm512_add_epi64(_mm512_srai_epi64(low, 32), odd_high);
    return _mm512_add_epi64(total, _mm512_add_epi64(even, odd));
}

FXQ_INLINE void sum_lanes(const __m512i v[8], int64_t *sums) {
    __m512i pair[4], half[2];
    FXQ_UNROLL(4) for (int i = 0; i < 4; i++) { /* 128 bits: of v[2 i] and v[2 i + 1] */
        pair[i] = _mm512_add_epi64(_mm512_unpacklo_epi64(v[2 * i], v[2 * i + 1]),
                                   _mm512_unpackhi_epi64(v[2 * i], v[2 * i + 1]));
    }
    FXQ_UNROLL(2) for (int i = 0; i < 2; i++) {
        half[i] = _mm512_add_epi64(_mm512_shuffle_i64x2(pair[2 * i], pair[2 * i + 1], 0x88),
                                   _mm512_shuffle_i64x2(pair[2 * i], pair[2 * i + 1], 0xdd));
    }
    _mm512_storeu_si512(sums, _mm512_add_epi64(_mm512_shuffle_i64x2(half[0], half[1], 0x88),
                                               _mm512_shuffle_i64x2(half[0], half[1], 0xdd)));
}

#include "int16.h"
