/* AVX-VNNI: vpdpbusd on 256-bit registers, for processors without AVX512. 32 products an instruction, no saturation. */
#include "runtime/isa.h"

#ifdef FXQ_HAS_VNNI_AND_AMX
#include <immintrin.h>
FXQ_TARGET_BEGIN("avx2,avxvnni,fma,f16c")

#ifndef FXQ_VPDPBUSD
#define FXQ_VPDPBUSD "%{vex%} vpdpbusd"
#endif
#define FXQ_VALUE uint8_t
#define PANEL_TOKENS 6
#include "kernels/x86/unpack-inl.h"
#include "kernels/x86/ymm_measure-inl.h"
#include "kernels/generic/row_major-inl.h"
#include "kernels/x86/ymm_epilogue-inl.h"
#include "kernels/x86/ymm-inl.h"

FXQ_INLINE __m256i load_weights(const int8_t *w) { return _mm256_loadu_si256((const __m256i *)w); }

/* Not the intrinsic: gcc 12 copies and spills the sums. */
FXQ_INLINE void add_product(__m256i *sum, __m256i values, __m256i weights) {
    __asm__(FXQ_VPDPBUSD " %2, %1, %0" : "+x"(*sum) : "x"(values), "x"(weights));
}

FXQ_INLINE void store_words(int8_t *panel, int half, __m256i words) {
    _mm256_store_si256((__m256i *)panel + half, words);
}

FXQ_INLINE __m256i load_words(const int8_t *panel, int half) {
    return _mm256_load_si256((const __m256i *)panel + half);
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

#include "kernels/x86/ymm_lstm-inl.h"
#include "kernels/x86/ymm_low_high-inl.h"
#include "kernels/x86/ymm_floats-inl.h"
#include "kernels/generic/tables-inl.h"
#include "kernels/x86/ymm_convolution-inl.h"

const struct fxq_kernels fxq_avx_vnni = {.name = "avx_vnni",
                                         .value_bytes = 1,
                                         .thresholds = {LEAST_PANEL_TOKENS - 1, LEAST_PANEL_TOKENS, LEAST_PANEL_TOKENS},
                                         .quantize = quantize,
                                         .row_sums = row_sums,
                                         .matmul = matmul,
                                         .pack_lstm = pack_lstm,
                                         .lstm_step = lstm_step,
                                         FXQ_INT16,
                                         FXQ_FLOATS,
                                         FXQ_STATIC,
                                         FXQ_ELEMENTWISE};
FXQ_TARGET_END
#endif
