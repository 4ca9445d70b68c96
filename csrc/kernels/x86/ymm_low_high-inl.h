/* The registers of low_high-inl.h in 256 bits. Expects: add_pairs, and what low_high-inl.h does. */
#define FXQ_LANES __m256i
#define FXQ_TILE 4

FXQ_INLINE __m256i load_16(const int16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

FXQ_INLINE __m256i load_first_16(const int16_t *p, int64_t count) {
    int16_t copy[16] = {0};
    memcpy(copy, p, (size_t)count * sizeof *copy);
    return load_16(copy);
}

FXQ_INLINE __m256i add_wide(__m256i total, __m256i low, __m256i high) {
    const __m256i one = _mm256_set1_epi64x(1), shift = _mm256_set1_epi64x(256); /* even lanes times these */
    const __m256i odd_low = _mm256_srli_epi64(low, 32), odd_high = _mm256_srli_epi64(high, 32);
    const __m256i even = _mm256_add_epi64(_mm256_mul_epi32(low, one), _mm256_mul_epi32(high, shift));
    const __m256i odd = _mm256_add_epi64(_mm256_mul_epi32(odd_low, one), _mm256_mul_epi32(odd_high, shift));
    return _mm256_add_epi64(total, _mm256_add_epi64(even, odd));
}

FXQ_INLINE void sum_lanes(const __m256i v[4], int64_t *sums) {
    __m256i pair[2];
    FXQ_FOR(2, int i = 0; i < 2; i++) { /* 128 bits: of v[2 i] and v[2 i + 1] */
        pair[i] = _mm256_add_epi64(_mm256_unpacklo_epi64(v[2 * i], v[2 * i + 1]),
                                   _mm256_unpackhi_epi64(v[2 * i], v[2 * i + 1]));
    }
    _mm256_storeu_si256((__m256i *)sums, _mm256_add_epi64(_mm256_permute2x128_si256(pair[0], pair[1], 0x20),
                                                          _mm256_permute2x128_si256(pair[0], pair[1], 0x31)));
}

#include "kernels/generic/low_high-inl.h"
