/* AVX-VNNI: vpdpbusd on 256-bit registers, for processors without AVX512. 32 products an instruction, no saturation. */
#include "runtime/isa.h"

#ifdef FXQ_HAS_VNNI_AND_AMX
#include <immintrin.h>
FXQ_TARGET_BEGIN("avx2,avxvnni,fma,f16c")

#define FXQ_VALUE uint8_t
#include "kernels/x86/unpack-inl.h"
#include "kernels/generic/row_major-inl.h"
#include "kernels/x86/ymm_epilogue-inl.h"
#include "kernels/x86/ymm-inl.h"

FXQ_INLINE __m256i load_bytes(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

FXQ_INLINE __m256i load_words(const int8_t *w) { return load_bytes(w); } /* of 4 columns */

FXQ_INLINE __m256i add_product(__m256i sum, __m256i values, __m256i weights) {
    return _mm256_dpbusd_avx_epi32(sum, values, weights);
}

FXQ_INLINE const int8_t *group_row(const struct group *g, int row) { return g->weights + row * g->stride; }

static __m128i dot_4x1(const struct group *g, int first, const uint8_t *a) {
    const int8_t *w = group_row(g, first);
    __m256i acc[4];
    FXQ_FOR(4, int i = 0; i < 4; i++) acc[i] = _mm256_setzero_si256();
    for (int64_t k = 0; k < g->depth; k += 32) {
        const __m256i values = load_bytes(a + k);
        FXQ_FOR(4, int i = 0; i < 4; i++) {
            acc[i] = _mm256_dpbusd_avx_epi32(acc[i], values, load_bytes(w + i * g->stride + k));
        }
    }
    return sum_4(acc[0], acc[1], acc[2], acc[3]);
}

static void dot_4x2(const struct group *g, int first, const uint8_t *a, const uint8_t *b, __m128i sums[2]) {
    const int8_t *w = group_row(g, first);
    __m256i acc[4], more[4];
    FXQ_FOR(4, int i = 0; i < 4; i++) acc[i] = more[i] = _mm256_setzero_si256();
    for (int64_t k = 0; k < g->depth; k += 32) {
        const __m256i values = load_bytes(a + k), others = load_bytes(b + k);
        FXQ_FOR(4, int i = 0; i < 4; i++) {
            const __m256i weights = load_bytes(w + i * g->stride + k);
            acc[i] = _mm256_dpbusd_avx_epi32(acc[i], values, weights);
            more[i] = _mm256_dpbusd_avx_epi32(more[i], others, weights);
        }
    }
    sums[0] = sum_4(acc[0], acc[1], acc[2], acc[3]);
    sums[1] = sum_4(more[0], more[1], more[2], more[3]);
}

static void row_sums(const struct fxq_weight *weight, int64_t n0, int64_t n1, int32_t *sums, void *scratch) {
    struct weight_reader reader = read_weight(weight, scratch);
    uint8_t *ones = (uint8_t *)scratch + 8 * reader.depth;
    memset(ones, 1, (size_t)reader.columns);
    memset(ones + reader.columns, 0, (size_t)(reader.depth - reader.columns));
    for (int64_t n = n0; n < n1; n += 8) {
        int64_t stride;
        const int8_t *w = weight_rows(&reader, n, 8, &stride);
        const struct group g = {w, stride, reader.depth};
        int32_t eight[8];
        _mm256_storeu_si256((__m256i *)eight, dot_8x1(&g, ones));
        memcpy(sums + n - n0, eight, (size_t)(n1 - n < 8 ? n1 - n : 8) * sizeof *sums);
    }
}

FXQ_INLINE __m256i add_pairs(__m256i sum, __m256i a, __m256i w) { return _mm256_dpwssd_avx_epi32(sum, a, w); }

#include "kernels/x86/ymm_int16-inl.h"
#include "kernels/x86/ymm_floats-inl.h"
#include "kernels/generic/tables-inl.h"

const struct fxq_kernels fxq_avx_vnni = {.name = "avx_vnni",
                                         .value_bytes = 1,
                                         .thresholds = {LEAST_PANEL_ROWS - 1, LEAST_PANEL_ROWS, LEAST_PANEL_ROWS},
                                         .quantize = quantize,
                                         .row_sums = row_sums,
                                         .matmul = matmul,
                                         FXQ_INT16,
                                         FXQ_FLOATS,
                                         FXQ_ELEMENTWISE};
FXQ_TARGET_END
#endif
