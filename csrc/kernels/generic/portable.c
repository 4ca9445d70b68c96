/* Plain C for any processor, as fast as the compiler's own vectorization makes it. */
#define FXQ_VALUE int16_t
#include "kernels/generic/row_major-inl.h"
#include "kernels/generic/epilogue-inl.h"
#include "kernels/generic/low_high-inl.h"
#include "kernels/generic/floats-inl.h"
#include "kernels/generic/tables-inl.h"
#include "kernels/generic/plain_convolution-inl.h"
#include "kernels/generic/unpack-inl.h"

static void quantize(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    set_own_rows(x, first, count, rows);
    quantize_row_major(x, first, count, rows);
}

static int32_t dot(const int16_t *a, const int8_t *w, int64_t count) {
    uint32_t sum = 0; /* unsigned: wraps, as the reference's int32 does, where more than 66,000 columns overflow */
    for (int64_t k = 0; k < count; k++) sum += (uint32_t)((int32_t)a[k] * (int32_t)w[k]);
    return (int32_t)sum;
}

static void matmul(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch) {
    enum { TOGETHER = 16 };
    (void)scratch;
    const struct fxq_activations *x = job->x;
    const int8_t *w = job->weight->data;
    for (int64_t m = 0; m < x->rows; m++) {
        const int16_t *a = (const int16_t *)x->packed + m * x->depth;
        for (int64_t n = n0; n < n1; n += TOGETHER) {
            const int64_t count = n1 - n < TOGETHER ? n1 - n : TOGETHER;
            float sums[TOGETHER];
            for (int64_t i = 0; i < count; i++) sums[i] = (float)dot(a, w + (n + i) * x->columns, x->columns);
            finish_sums(job, to, m, n, n0, count, sums);
        }
    }
}

const struct fxq_kernels fxq_portable = {.name = "portable",
                                         .value_bytes = 2,
                                         .quantize = quantize,
                                         .matmul = matmul,
                                         FXQ_INT16,
                                         FXQ_FLOATS,
                                         FXQ_STATIC,
                                         FXQ_ELEMENTWISE};
