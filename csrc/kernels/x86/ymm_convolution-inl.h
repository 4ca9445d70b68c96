/* The products of convolutions on 256-bit registers: tiles of some pixels by 16 outputs.
 *
 * Expects: ymm-inl.h. */
#define CONV_VALUE FXQ_VALUE
#include "kernels/generic/windows-inl.h"
#include "kernels/generic/ending-inl.h"
#include "kernels/generic/values-inl.h"
#include "kernels/generic/depthwise-inl.h"
#include "kernels/generic/plain_depthwise-inl.h"
enum { TILE_PIXELS = PANEL_TOKENS, REGISTERS_TOGETHER = 0 };
#include "kernels/generic/convolution-inl.h"

/* 8 rows, from column k on: whole, or what is there of them. */
FXQ_INLINE void load_8_rows(const int8_t *rows, int64_t stride, int64_t count, int64_t columns, __m256i v[8]) {
    _Alignas(32) int8_t copy[8][32] = {{0}};
    if (count >= 8 && columns >= 32) {
        FXQ_FOR(8, int i = 0; i < 8; i++) v[i] = _mm256_loadu_si256((const __m256i *)(rows + i * stride));
        return;
    }
    for (int64_t i = 0; i < count && i < 8; i++) {
        memcpy(copy[i], rows + i * stride, (size_t)(columns < 32 ? columns : 32));
    }
    FXQ_FOR(8, int i = 0; i < 8; i++) v[i] = _mm256_load_si256((const __m256i *)copy[i]);
}

FXQ_INLINE void pack_runs(const int8_t *rows, int64_t stride, int64_t count, int64_t columns, int8_t *packed,
                          int64_t step, int32_t *sums) {
    const __m256i ones = _mm256_set1_epi8(1);
    for (int half = 0; half < 2; half++) {
        __m256i sum = _mm256_load_si256((const __m256i *)(sums + 8 * half));
        for (int64_t k = 0; k < columns; k += 32) {
            const int64_t words = columns - k >= 32 ? 8 : (columns - k + 3) / 4;
            __m256i v[8];
            load_8_rows(rows + 8 * half * stride + k, stride, count - 8 * half, columns - k, v);
            transpose_8x8(v);
            for (int64_t i = 0; i < words; i++) {
                store_words(packed + (k / 4 + i) * step, half, v[i]);
                const __m256i pairs = _mm256_maddubs_epi16(ones, v[i]); /* within ±256 */
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
        }
        _mm256_store_si256((__m256i *)(sums + 8 * half), sum);
    }
}

/* 16 outputs; count: a constant wherever this is inlined. */
FXQ_INLINE void multiply_pixels_by(const struct tile *tile, const int8_t *w, int count, int32_t (*sums)[BLOCK_OUTPUTS],
                                   int first) {
    const struct windows *v = tile->windows;
    const int64_t run = (v->run + 3) / 4 * 4;
    int64_t offsets[TILE_PIXELS];
    FXQ_FOR(8, int i = 0; i < count; i++) {
        offsets[i] = tile->step ? tile->offsets[0] + i * tile->step : tile->offsets[i];
    }
    __m256i acc[TILE_PIXELS][2];
    FXQ_FOR(8, int i = 0; i < count; i++) {
        acc[i][0] = _mm256_load_si256((const __m256i *)(tile->outputs->start + first));
        acc[i][1] = _mm256_load_si256((const __m256i *)(tile->outputs->start + first + 8));
    }
    for (int64_t t = 0; t < v->taps; t++) {
        const CONV_VALUE *a[TILE_PIXELS];
        FXQ_FOR(8, int i = 0; i < count; i++) a[i] = v->at[t] + offsets[i];
        for (int64_t k = 0; k < run; k += WORD_VALUES, w += WORD_VALUES * PANEL) {
            const __m256i w0 = load_words(w, 0), w1 = load_words(w, 1);
            FXQ_FOR(8, int i = 0; i < count; i++) {
                const __m256i values = word_in_all_lanes(a[i] + k);
                add_product(&acc[i][0], values, w0);
                add_product(&acc[i][1], values, w1);
            }
        }
    }
    FXQ_FOR(8, int i = 0; i < count; i++) {
        _mm256_store_si256((__m256i *)(sums[i] + first), acc[i][0]);
        _mm256_store_si256((__m256i *)(sums[i] + first + 8), acc[i][1]);
    }
}

static void multiply_pixels(const struct tile *tile, int count, int registers, int64_t at) {
    _Alignas(64) int32_t sums[TILE_PIXELS][BLOCK_OUTPUTS];
    for (int r = 0; r < registers; r++) {
        const int8_t *w = tile->weights + r * tile->register_bytes;
        switch (count) {
#if PANEL_TOKENS == 6
            case 6: multiply_pixels_by(tile, w, 6, sums, 16 * r); break;
            case 5: multiply_pixels_by(tile, w, 5, sums, 16 * r); break;
#endif
            case 4: multiply_pixels_by(tile, w, 4, sums, 16 * r); break;
            case 3: multiply_pixels_by(tile, w, 3, sums, 16 * r); break;
            case 2: multiply_pixels_by(tile, w, 2, sums, 16 * r); break;
            default: multiply_pixels_by(tile, w, 1, sums, 16 * r);
        }
    }
    end_pixels(tile, count, sums, at);
}

FXQ_INLINE void end_pixel(const struct ending *e, const struct outputs_64 *o, const int32_t *sums, int64_t at) {
    end_plainly(e, o, sums, at);
}
