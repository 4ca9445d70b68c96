/* The registers of floats-inl.h in 256 bits: two for sixteen lanes. 12 of 16 hold the sums of 3 rows by 2 outputs.
 * Expects: what floats-inl.h does. */
#define FXQ_REALS struct reals
#define FXQ_REAL_ROWS 3
#define FXQ_REAL_OUTPUTS 2
#define FXQ_ROW_OUTPUTS 4
#define FXQ_TILE_ROWS 6
#define FXQ_TILE_REALS 1

struct reals {
    __m256 low, high;
};

FXQ_INLINE struct reals no_reals(void) { return (struct reals){_mm256_setzero_ps(), _mm256_setzero_ps()}; }

FXQ_INLINE struct reals load_reals(const float *p) {
    return (struct reals){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}

FXQ_INLINE struct reals load_halves(const uint16_t *p) {
    return (struct reals){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}

FXQ_INLINE void store_reals(float *p, struct reals v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
}

FXQ_INLINE struct reals spread(float x) { return (struct reals){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

FXQ_INLINE struct reals plus(struct reals a, struct reals b) {
    return (struct reals){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}

FXQ_INLINE struct reals times(struct reals a, struct reals b) {
    return (struct reals){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}

FXQ_INLINE struct reals greater(struct reals a, struct reals b) { /* b where one is NaN */
    return (struct reals){_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}

FXQ_INLINE __m256 powers_8(__m256 shifted) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23), _mm256_set1_epi32(0x3f800000)));
}

FXQ_INLINE struct reals powers(struct reals shifted) {
    return (struct reals){powers_8(shifted.low), powers_8(shifted.high)};
}

FXQ_INLINE struct reals keep_from(struct reals x, float limit, struct reals y) {
    const __m256 limits = _mm256_set1_ps(limit);
    return (struct reals){_mm256_and_ps(_mm256_cmp_ps(x.low, limits, _CMP_NLT_UQ), y.low),
                          _mm256_and_ps(_mm256_cmp_ps(x.high, limits, _CMP_NLT_UQ), y.high)};
}

FXQ_INLINE struct reals fuse(struct reals a, struct reals b, struct reals sum) {
    return (struct reals){_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high)};
}

/* Of each 128 bits the sums of a, b, c and d. */
FXQ_INLINE __m256 sum_quads(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); /* a b a b: lanes 2 apart */
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
}

FXQ_INLINE void sum_4_reals(const struct reals v[4], float *sums) {
    const __m256 eight = _mm256_add_ps(sum_quads(v[0].low, v[1].low, v[2].low, v[3].low),
                                       sum_quads(v[0].high, v[1].high, v[2].high, v[3].high));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

#include "kernels/generic/floats-inl.h"
