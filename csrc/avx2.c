/* AVX2 without VNNI: products of int16 pairs (vpmaddwd). They are exact; vpmaddubsw, twice as fast, saturates. */
#include "isa.h"

#ifdef FXQ_HAS_AVX2
#include <immintrin.h>
FXQ_TARGET_BEGIN("avx2")

#define FXQ_VALUE int16_t
#include "row_major.h"
#include "ymm.h"

enum { WIDE_ROWS = 3 }; /* from so many rows of activations, the weights are converted to int16 once and kept */

/* 16 weights of a row: as they are, or converted from int8. `is_wide` is a constant wherever this is inlined. */
FXQ_INLINE __m256i load_weights(const void *row, int64_t k, bool is_wide) {
    if (is_wide) return _mm256_loadu_si256((const __m256i *)((const int16_t *)row + k));
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)((const int8_t *)row + k)));
}

FXQ_INLINE __m256i load_values(const int16_t *a) { return _mm256_loadu_si256((const __m256i *)a); }

FXQ_INLINE __m256i add_product(__m256i sum, __m256i a, __m256i w) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, w));
}

FXQ_INLINE const void *row_of(const struct group *g, int row, bool is_wide) {
    return (const char *)g->weights + row * g->stride * (is_wide ? 2 : 1);
}

FXQ_INLINE __m128i dot_4x1_as(const struct group *g, int first, const int16_t *a, bool is_wide) {
    const void *w0 = row_of(g, first, is_wide), *w1 = row_of(g, first + 1, is_wide);
    const void *w2 = row_of(g, first + 2, is_wide), *w3 = row_of(g, first + 3, is_wide);
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t k = 0, depth = g->depth; k < depth; k += 16) {
        const __m256i values = load_values(a + k);
        s0 = add_product(s0, values, load_weights(w0, k, is_wide));
        s1 = add_product(s1, values, load_weights(w1, k, is_wide));
        s2 = add_product(s2, values, load_weights(w2, k, is_wide));
        s3 = add_product(s3, values, load_weights(w3, k, is_wide));
    }
    return sum_4(s0, s1, s2, s3);
}

FXQ_INLINE void dot_4x2_as(const struct group *g, int first, const int16_t *a, const int16_t *b, __m128i sums[2],
                           bool is_wide) {
    const void *w0 = row_of(g, first, is_wide), *w1 = row_of(g, first + 1, is_wide);
    const void *w2 = row_of(g, first + 2, is_wide), *w3 = row_of(g, first + 3, is_wide);
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0, t0 = s0, t1 = s0, t2 = s0, t3 = s0;
    for (int64_t k = 0, depth = g->depth; k < depth; k += 16) {
        const __m256i values = load_values(a + k), others = load_values(b + k);
        __m256i w = load_weights(w0, k, is_wide);
        s0 = add_product(s0, values, w);
        t0 = add_product(t0, others, w);
        w = load_weights(w1, k, is_wide);
        s1 = add_product(s1, values, w);
        t1 = add_product(t1, others, w);
        w = load_weights(w2, k, is_wide);
        s2 = add_product(s2, values, w);
        t2 = add_product(t2, others, w);
        w = load_weights(w3, k, is_wide);
        s3 = add_product(s3, values, w);
        t3 = add_product(t3, others, w);
    }
    sums[0] = sum_4(s0, s1, s2, s3);
    sums[1] = sum_4(t0, t1, t2, t3);
}

static __m128i dot_4x1(const struct group *g, int first, const int16_t *a) {
    return g->is_wide ? dot_4x1_as(g, first, a, true) : dot_4x1_as(g, first, a, false);
}

static void dot_4x2(const struct group *g, int first, const int16_t *a, const int16_t *b, __m128i sums[2]) {
    if (g->is_wide) dot_4x2_as(g, first, a, b, sums, true);
    else dot_4x2_as(g, first, a, b, sums, false);
}

static void widen_rows(const int8_t *w, int64_t stride, int64_t depth, int16_t *wide) {
    for (int row = 0; row < 8; row++) {
        for (int64_t k = 0; k < depth; k++) wide[row * depth + k] = w[row * stride + k];
    }
}

/* scratch: 8 rows copied from the tensor's end, then 8 rows of int16: 24 of its 64 bytes a column. */
static void matmul(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch) {
    const int64_t depth = job->x->depth;
    struct weight_reader reader = read_weight(job->weight, job->outputs, job->x->columns, scratch);
    int16_t *wide = (int16_t *)((char *)scratch + 8 * depth);
    for (int64_t n = n0; n < n1; n += 8) {
        int64_t stride;
        const int8_t *w = weight_rows(&reader, n, 8, &stride);
        struct group g = {w, stride, depth, false};
        if (job->x->rows >= WIDE_ROWS) {
            widen_rows(w, stride, depth, wide);
            g = (struct group){wide, depth, depth, true};
        }
        struct outputs_8 o = begin_outputs(job, to, n, n0, n1);
        matmul_group(job, &g, &o, n);
    }
}

const struct fxq_kernels fxq_avx2 = {.name = "avx2", .value_bytes = 2, .quantize = quantize, .matmul = matmul,
                                     FXQ_ELEMENTWISE};
FXQ_TARGET_END
#endif
