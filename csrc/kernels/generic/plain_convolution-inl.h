/* The products of convolutions in plain C: a pixel by 16 outputs beside each other, which the compiler vectorizes.
 *
 * Expects: elementwise-inl.h. */
#define CONV_VALUE int16_t
#include "kernels/generic/windows-inl.h"
#include "kernels/generic/ending-inl.h"
#include "kernels/generic/values-inl.h"
#include "kernels/generic/depthwise-inl.h"
#include "kernels/generic/plain_depthwise-inl.h"
enum { TILE_PIXELS = 4, REGISTERS_TOGETHER = 0 };
#include "kernels/generic/convolution-inl.h"

/* Packed: [columns][16]. */
FXQ_INLINE void pack_runs(const int8_t *rows, int64_t stride, int64_t count, int64_t columns, int8_t *packed,
                          int64_t step, int32_t *sums) {
    for (int64_t k = 0; k < (columns + 3) / 4 * 4; k++) {
        for (int64_t i = 0; i < 16; i++) {
            const int8_t w = k < columns && i < count ? rows[i * stride + k] : 0;
            packed[step / 4 * k + i] = w;
            sums[i] += w;
        }
    }
}

static void multiply_pixel(const struct tile *tile, int64_t offset, const int8_t *restrict w, const int32_t *start,
                           int32_t *restrict sums) {
    const struct windows *v = tile->windows;
    const int64_t run = (v->run + 3) / 4 * 4;
    int32_t acc[16];
    memcpy(acc, start, sizeof acc);
    for (int64_t t = 0; t < v->taps; t++) {
        const CONV_VALUE *restrict a = v->at[t] + offset;
        for (int64_t k = 0; k < run; k++, w += 16) {
            for (int i = 0; i < 16; i++) acc[i] += (int32_t)a[k] * w[i];
        }
    }
    memcpy(sums, acc, sizeof acc);
}

static void multiply_pixels(const struct tile *tile, int count, int registers, int64_t at) {
    int32_t sums[TILE_PIXELS][BLOCK_OUTPUTS];
    for (int r = 0; r < registers; r++) {
        for (int i = 0; i < count; i++) {
            multiply_pixel(tile, tile->step ? tile->offsets[0] + i * tile->step : tile->offsets[i],
                           tile->weights + r * tile->register_bytes, tile->outputs->start + 16 * r, sums[i] + 16 * r);
        }
    }
    end_pixels(tile, count, sums, at);
}

FXQ_INLINE void end_pixel(const struct ending *e, const struct outputs_64 *o, const int32_t *sums, int64_t at) {
    end_plainly(e, o, sums, at);
}
