/* AVX2 without VNNI: products of 16-bit pairs (vpmaddwd). They are exact; vpmaddubsw, twice as fast, saturates. */
#include "runtime/isa.h"

#ifdef FXQ_HAS_AVX2
#include <immintrin.h>
FXQ_TARGET_BEGIN("avx2,fma,f16c")

#define FXQ_VALUE int16_t
#include "kernels/x86/unpack-inl.h"
#include "kernels/generic/row_major-inl.h"
#include "kernels/x86/ymm_epilogue-inl.h"
#include "kernels/x86/ymm-inl.h"

/* 8 words of two columns. */
FXQ_INLINE __m256i load_words(const int8_t *w) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w)); }

FXQ_INLINE __m256i load_values(const int16_t *a) { return _mm256_loadu_si256((const __m256i *)a); }

FXQ_INLINE __m256i add_product(__m256i sum, __m256i values, __m256i weights) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(values, weights));
}

FXQ_INLINE const int8_t *row_of(const struct group *g, int row) { return g->weights + row * g->stride; }

static __m128i dot_4x1(const struct group *g, int first, const int16_t *a) {
    const int8_t *w0 = row_of(g, first), *w1 = row_of(g, first + 1), *w2 = row_of(g, first + 2),
                 *w3 = row_of(g, first + 3);
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t k = 0, depth = g->depth; k < depth; k += 16) {
        const __m256i values = load_values(a + k);
        s0 = add_product(s0, values, load_words(w0 + k));
        s1 = add_product(s1, values, load_words(w1 + k));
        s2 = add_product(s2, values, load_words(w2 + k));
        s3 = add_product(s3, values, load_words(w3 + k));
    }
    return sum_4(s0, s1, s2, s3);
}

static void dot_4x2(const struct group *g, int first, const int16_t *a, const int16_t *b, __m128i sums[2]) {
    const int8_t *w0 = row_of(g, first), *w1 = row_of(g, first + 1), *w2 = row_of(g, first + 2),
                 *w3 = row_of(g, first + 3);
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0, t0 = s0, t1 = s0, t2 = s0, t3 = s0;
    for (int64_t k = 0, depth = g->depth; k < depth; k += 16) {
        const __m256i values = load_values(a + k), others = load_values(b + k);
        __m256i w = load_words(w0 + k);
        s0 = add_product(s0, values, w);
        t0 = add_product(t0, others, w);
        w = load_words(w1 + k);
        s1 = add_product(s1, values, w);
        t1 = add_product(t1, others, w);
        w = load_words(w2 + k);
        s2 = add_product(s2, values, w);
        t2 = add_product(t2, others, w);
        w = load_words(w3 + k);
        s3 = add_product(s3, values, w);
        t3 = add_product(t3, others, w);
    }
    sums[0] = sum_4(s0, s1, s2, s3);
    sums[1] = sum_4(t0, t1, t2, t3);
}

FXQ_INLINE __m256i add_pairs(__m256i sum, __m256i a, __m256i w) { return add_product(sum, a, w); }

#include "kernels/x86/ymm_int16-inl.h"
#include "kernels/x86/ymm_floats-inl.h"
#include "kernels/generic/tables-inl.h"

const struct fxq_kernels fxq_avx2 = {.name = "avx2",
                                     .value_bytes = 2,
                                     .thresholds = {LEAST_PANEL_ROWS - 1, LEAST_PANEL_ROWS, LEAST_PANEL_ROWS},
                                     .quantize = quantize,
                                     .matmul = matmul,
                                     FXQ_INT16,
                                     FXQ_FLOATS,
                                     FXQ_ELEMENTWISE};
FXQ_TARGET_END
#endif
