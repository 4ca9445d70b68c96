/* AVX2 without VNNI: products of 16-bit pairs (vpmaddwd). They are exact: q - zero_point is within ±255 and a weight
 * within -128 … 127, so that a pair's sum is at most 65,280. vpmaddubsw, twice as fast, saturates: docs/kernels.md has
 * what was tried. */
#include "runtime/isa.h"

#ifdef FXQ_HAS_AVX2
#include <immintrin.h>
FXQ_TARGET_BEGIN("avx2,fma,f16c")

#define FXQ_VALUE int16_t
#define PANEL_TOKENS 4
#include "kernels/x86/unpack-inl.h"
#include "kernels/x86/ymm_measure-inl.h"
#include "kernels/generic/row_major-inl.h"
#include "kernels/x86/ymm_epilogue-inl.h"
#include "kernels/x86/ymm-inl.h"

FXQ_INLINE __m256i load_weights(const int8_t *w) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w)); }

/* Not the intrinsics: gcc 12 copies and spills the sums. */
FXQ_INLINE void add_product(__m256i *sum, __m256i values, __m256i weights) {
    __m256i product;
    __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(*sum), "=&x"(product) : "x"(values), "x"(weights));
}

/* Columns 0 and 1 of 8 outputs, and 2 and 3. */
FXQ_INLINE void store_words(int8_t *panel, int half, __m256i words) {
    const __m256i pairs =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    words = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(words, pairs), 0xd8);
    _mm_store_si128((__m128i *)panel + half, _mm256_castsi256_si128(words));
    _mm_store_si128((__m128i *)panel + 2 + half, _mm256_extracti128_si256(words, 1));
}

FXQ_INLINE __m256i load_words(const int8_t *panel, int half) { return load_weights(panel + 16 * half); }

FXQ_INLINE __m256i add_pairs(__m256i sum, __m256i a, __m256i w) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, w));
}

#include "kernels/x86/ymm_lstm-inl.h"
#include "kernels/x86/ymm_low_high-inl.h"
#include "kernels/x86/ymm_floats-inl.h"
#include "kernels/generic/tables-inl.h"
#include "kernels/x86/ymm_convolution-inl.h"

const struct fxq_kernels fxq_avx2 = {.name = "avx2",
                                     .value_bytes = 2,
                                     .thresholds = {LEAST_PANEL_TOKENS - 1, LEAST_PANEL_TOKENS, LEAST_PANEL_TOKENS},
                                     .quantize = quantize,
                                     .matmul = matmul,
                                     .pack_lstm = pack_lstm,
                                     .lstm_step = lstm_step,
                                     FXQ_INT16,
                                     FXQ_FLOATS,
                                     FXQ_STATIC,
                                     FXQ_ELEMENTWISE};
FXQ_TARGET_END
#endif
