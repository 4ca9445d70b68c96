/* `measure` on 256-bit registers. gcc does not vectorize the plain one for tokens of less than 32 values, nor the rest
 * of wider ones. Values may be seen twice: that changes nothing, and the last ones need no loop of their own.
 *
 * Expects: a target with AVX2 begun. */
#include "runtime/isa.h"

#define FXQ_OWN_MEASURE

struct ranges_8 {
    __m256 low, high, nan;
};

FXQ_INLINE void take_in(struct ranges_8 *r, __m256 v) { /* min and max give the second operand where one is NaN */
    r->low = _mm256_min_ps(v, r->low);
    r->high = _mm256_max_ps(v, r->high);
    r->nan = _mm256_or_ps(r->nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

/* Fewer than 8 values, and the range's own in place of the others. */
FXQ_INLINE __m256 load_few(const float *x, int64_t count, const struct fxq_range *range) {
    const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_blendv_ps(_mm256_set1_ps(range->low), _mm256_maskload_ps(x, lanes), _mm256_castsi256_ps(lanes));
}

static void measure(const float *x, int64_t count, struct fxq_range *range) {
    struct ranges_8 r[4];
    FXQ_FOR(4, int i = 0; i < 4; i++) {
        r[i] = (struct ranges_8){_mm256_set1_ps(range->low), _mm256_set1_ps(range->high), _mm256_setzero_ps()};
    }
    int64_t k = 0;
    for (; k + 32 <= count; k += 32)
        FXQ_FOR(4, int i = 0; i < 4; i++) take_in(&r[i], _mm256_loadu_ps(x + k + 8 * i));
    for (; k + 8 <= count; k += 8) take_in(&r[0], _mm256_loadu_ps(x + k));
    if (k < count) take_in(&r[1], count < 8 ? load_few(x, count, range) : _mm256_loadu_ps(x + count - 8));
    FXQ_FOR(3, int i = 1; i < 4; i++) {
        r[0].low = _mm256_min_ps(r[i].low, r[0].low);
        r[0].high = _mm256_max_ps(r[i].high, r[0].high);
        r[0].nan = _mm256_or_ps(r[i].nan, r[0].nan);
    }
    __m128 low = _mm_min_ps(_mm256_extractf128_ps(r[0].low, 1), _mm256_castps256_ps128(r[0].low));
    __m128 high = _mm_max_ps(_mm256_extractf128_ps(r[0].high, 1), _mm256_castps256_ps128(r[0].high));
    low = _mm_min_ps(_mm_movehl_ps(low, low), low);
    high = _mm_max_ps(_mm_movehl_ps(high, high), high);
    low = _mm_min_ss(_mm_movehdup_ps(low), low);
    high = _mm_max_ss(_mm_movehdup_ps(high), high);
    const bool is_nan = range->is_nan || _mm256_movemask_ps(r[0].nan);
    *range = (struct fxq_range){_mm_cvtss_f32(low), _mm_cvtss_f32(high), is_nan};
}
