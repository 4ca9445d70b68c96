/* Panels of a product's second operand: FXQ_PANEL columns side by side, row after row, for products-inl.h. */
#include <string.h>

#include "kernels.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

enum { WHOLE = 16 }; /* columns of a register */

int64_t fxq_panel_columns(int64_t columns) { return (columns + WHOLE - 1) / WHOLE * WHOLE; }

/* `columns` dense runs of `depth` floats, `stride` apart, turned into columns of a panel of `width`. */
static void turn_columns(const float *b, int64_t stride, int64_t depth, int64_t columns, int64_t width, float *out) {
    int64_t n = 0;
#if defined(__SSE__)
    for (; n + 4 <= columns; n += 4) {
        const float *x = b + n * stride;
        int64_t k = 0;
        for (; k + 4 <= depth; k += 4) {
            __m128 v0 = _mm_loadu_ps(x + k), v1 = _mm_loadu_ps(x + stride + k);
            __m128 v2 = _mm_loadu_ps(x + 2 * stride + k), v3 = _mm_loadu_ps(x + 3 * stride + k);
            _MM_TRANSPOSE4_PS(v0, v1, v2, v3);
            float *to = out + k * width + n;
            _mm_storeu_ps(to, v0), _mm_storeu_ps(to + width, v1);
            _mm_storeu_ps(to + 2 * width, v2), _mm_storeu_ps(to + 3 * width, v3);
        }
        for (; k < depth; k++) {
            for (int i = 0; i < 4; i++) out[k * width + n + i] = x[i * stride + k];
        }
    }
#endif
    for (; n < columns; n++) {
        for (int64_t k = 0; k < depth; k++) out[k * width + n] = b[n * stride + k];
    }
}

static void pack_panel(const float *b, int64_t row, int64_t column, int64_t depth, int64_t columns, float *out) {
    const int64_t width = fxq_panel_columns(columns);
    if (column != 1 && row == 1) {
        turn_columns(b, column, depth, columns, width, out);
    } else {
        for (int64_t k = 0; k < depth; k++) {
            float *to = out + k * width;
            if (column == 1) memcpy(to, b + k * row, (size_t)columns * sizeof *to);
            else
                for (int64_t n = 0; n < columns; n++) to[n] = b[k * row + n * column];
        }
    }
    for (int64_t k = 0; columns < width && k < depth; k++) {
        memset(out + k * width + columns, 0, (size_t)(width - columns) * sizeof *out);
    }
}

void fxq_pack_panels(const float *b, int64_t row, int64_t column, int64_t depth, int64_t columns, float *panels) {
    for (int64_t n = 0; n < columns; n += FXQ_PANEL) {
        pack_panel(b + n * column, row, column, depth, columns - n < FXQ_PANEL ? columns - n : FXQ_PANEL,
                   panels + n * depth);
    }
}
