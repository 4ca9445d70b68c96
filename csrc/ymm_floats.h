/* The registers of floats.h in 256 bits: two for sixteen lanes. 12 of 16 hold the sums of 3 rows by 2 outputs. */
#define FXQ_REALS struct reals
#define FXQ_REAL_ROWS 3
#define FXQ_REAL_OUTPUTS 2

struct reals {
    __m256 low, high;
};

FXQ_INLINE struct reals no_reals(void) { return (struct reals){_mm256_setzero_ps(), _mm256_setzero_ps()}; }

FXQ_INLINE struct reals load_reals(const float *p) { return (struct reals){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

FXQ_INLINE struct reals load_halves(const uint16_t *p) {
    return (struct reals){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}

FXQ_INLINE void store_reals(float *p, struct reals v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
}

FXQ_INLINE struct reals fuse(struct reals a, struct reals b, struct reals sum) {
    return (struct reals){_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high)};
}

FXQ_INLINE float sum_reals(struct reals v) {
    const __m256 eight = _mm256_add_ps(v.low, v.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#include "floats.h"
