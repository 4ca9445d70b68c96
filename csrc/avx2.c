/* AVX2 without VNNI: products of int16 pairs (vpmaddwd). They are exact; vpmaddubsw, twice as fast, saturates. */
#include "isa.h"

#ifdef FXQ_HAS_AVX2
#include <immintrin.h>
FXQ_TARGET_BEGIN("avx2")

#define FXQ_VALUE int16_t
#include "row_major.h"
#include "ymm.h"

enum { WIDE_ROWS = 3 }; /* from so many rows of activations, the weights are converted to int16 once and kept */

FXQ_INLINE __m256i load_weights(const struct group *g, int row, int64_t k) {
    const int64_t at = row * g->stride + k;
    if (g->is_wide) return _mm256_loadu_si256((const __m256i *)((const int16_t *)g->weights + at));
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)((const int8_t *)g->weights + at)));
}

FXQ_INLINE __m256i load_values(const int16_t *a) { return _mm256_loadu_si256((const __m256i *)a); }

FXQ_INLINE __m256i add_product(__m256i sum, __m256i a, __m256i w) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, w)); }

static __m128i dot_4x1(const struct group *g, int first, const int16_t *a) {
    __m256i acc[4];
    FXQ_UNROLL(4) for (int i = 0; i < 4; i++) acc[i] = _mm256_setzero_si256();
    for (int64_t k = 0; k < g->depth; k += 16) {
        const __m256i values = load_values(a + k);
        FXQ_UNROLL(4) for (int i = 0; i < 4; i++) acc[i] = add_product(acc[i], values, load_weights(g, first + i, k));
    }
    return sum_4(acc[0], acc[1], acc[2], acc[3]);
}

FXQ_INLINE void dot_4x2_any(const struct group *g, int first, const int16_t *a, const int16_t *b, __m128i sums[2]) {
    __m256i acc[4], more[4];
    FXQ_UNROLL(4) for (int i = 0; i < 4; i++) acc[i] = more[i] = _mm256_setzero_si256();
    for (int64_t k = 0; k < g->depth; k += 16) {
        const __m256i values = load_values(a + k), others = load_values(b + k);
        FXQ_UNROLL(4) for (int i = 0; i < 4; i++) {
            const __m256i weights = load_weights(g, first + i, k);
            acc[i] = add_product(acc[i], values, weights);
            more[i] = add_product(more[i], others, weights);
        }
    }
    sums[0] = sum_4(acc[0], acc[1], acc[2], acc[3]);
    sums[1] = sum_4(more[0], more[1], more[2], more[3]);
}

static void dot_4x2(const struct group *g, int first, const int16_t *a, const int16_t *b, __m128i sums[2]) {
    dot_4x2_any(g, first, a, b, sums);
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

const struct fxq_kernels fxq_avx2 = {.name = "avx2", .value_bytes = 2, .quantize = quantize, .matmul = matmul, FXQ_ELEMENTWISE};
FXQ_TARGET_END
#endif
