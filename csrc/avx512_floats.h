/* The registers of floats.h in AVX512: 24 of 32 hold the sums of 6 rows by 4 outputs, and 10 loads serve 24 products. */
#define FXQ_REALS __m512
#define FXQ_REAL_ROWS 6
#define FXQ_REAL_OUTPUTS 4

FXQ_INLINE __m512 no_reals(void) { return _mm512_setzero_ps(); }

FXQ_INLINE __m512 load_reals(const float *p) { return _mm512_loadu_ps(p); }

FXQ_INLINE __m512 load_halves(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

FXQ_INLINE void store_reals(float *p, __m512 v) { _mm512_storeu_ps(p, v); }

FXQ_INLINE __m512 fuse(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }

FXQ_INLINE float sum_reals(__m512 v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#include "floats.h"
