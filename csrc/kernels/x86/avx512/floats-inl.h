/* The registers of floats-inl.h in AVX512: 24 of 32 hold the sums of 6 rows by 4 outputs, and 10 loads serve 24
 * products. Expects: common-inl.h. */
#define FXQ_REALS __m512
#define FXQ_REAL_ROWS 6
#define FXQ_REAL_OUTPUTS 4
#define FXQ_ROW_OUTPUTS 8
#define FXQ_TILE_ROWS 6
#define FXQ_TILE_REALS 4

FXQ_INLINE __m512 no_reals(void) { return _mm512_setzero_ps(); }

FXQ_INLINE __m512 load_reals(const float *p) { return _mm512_loadu_ps(p); }

FXQ_INLINE __m512 load_halves(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

FXQ_INLINE void store_reals(float *p, __m512 v) { _mm512_storeu_ps(p, v); }

FXQ_INLINE __m512 spread(float x) { return _mm512_set1_ps(x); }

FXQ_INLINE __m512 plus(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }

FXQ_INLINE __m512 times(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }

FXQ_INLINE __m512 greater(__m512 a, __m512 b) { return _mm512_max_ps(a, b); } /* b where one is NaN */

FXQ_INLINE __m512 powers(__m512 shifted) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23), _mm512_set1_epi32(0x3f800000)));
}

FXQ_INLINE __m512 keep_from(__m512 x, float limit, __m512 y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), y);
}

FXQ_INLINE __m512 fuse(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }

FXQ_INLINE void sum_4_reals(const __m512 v[4], float *sums) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1])); /* lanes 2 apart */
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 quads = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

#include "kernels/generic/floats-inl.h"
