/* NEON with the dot product instructions (ARMv8.2): 16 products of int8 by int8 an instruction (SDOT). */
#include "runtime/isa.h"

#ifdef FXQ_HAS_NEON_DOT
#include <arm_neon.h>
#ifdef __clang__
FXQ_TARGET_BEGIN("dotprod")
#else
FXQ_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif

#define FXQ_VALUE uint8_t
#include "kernels/generic/row_major-inl.h"
#include "kernels/generic/epilogue-inl.h"
#include "kernels/generic/low_high-inl.h"
#include "kernels/arm/neon_floats-inl.h"
#include "kernels/generic/tables-inl.h"
#include "kernels/generic/plain_convolution-inl.h"
#include "kernels/generic/unpack-inl.h"

/* SDOT takes signed values: rows hold q - 128, 0 in the padding, so that
 * sum((q - zero_point) w) = sum((q - 128) w) + (128 - zero_point) sum(w). After the last row comes one of ones. */
static void quantize(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    uint8_t *packed = x->packed;
    set_own_rows(x, first, count, rows);
    quantize_row_major(x, first, count, rows);
    for (int i = 0; i < count; i++) {
        uint8_t *q = packed + (first + i) * x->depth;
        for (int64_t k = 0; k < x->columns; k++) q[k] ^= 0x80;
    }
    if (first + count == x->rows) memset(packed + x->rows * x->depth, 1, (size_t)x->columns);
}

/* 4 outputs with one row: 4 accumulators of 4 lanes, added up at the end. */
FXQ_INLINE int32x4_t dot_4(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *values) {
    int32x4_t s0 = vdupq_n_s32(0), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t k = 0; k < depth; k += 16) {
        const int8x16_t a = vld1q_s8((const int8_t *)values + k);
        s0 = vdotq_s32(s0, a, vld1q_s8(w + k));
        s1 = vdotq_s32(s1, a, vld1q_s8(w + stride + k));
        s2 = vdotq_s32(s2, a, vld1q_s8(w + 2 * stride + k));
        s3 = vdotq_s32(s3, a, vld1q_s8(w + 3 * stride + k));
    }
    return vpaddq_s32(vpaddq_s32(s0, s1), vpaddq_s32(s2, s3));
}

static void row_sums(const struct fxq_weight *weight, int64_t n0, int64_t n1, int32_t *sums, void *scratch) {
    (void)scratch;
    for (int64_t n = n0; n < n1; n++) {
        const int8_t *w = (const int8_t *)weight->data + n * weight->columns;
        int32_t sum = 0;
        for (int64_t k = 0; k < weight->columns; k++) sum += w[k];
        sums[n - n0] = sum;
    }
}

static void matmul(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch) {
    const struct fxq_activations *x = job->x;
    const uint8_t *values = x->packed;
    struct weight_reader reader = read_weight(job->weight, scratch);
    for (int64_t n = n0; n < n1; n += 4) {
        const int count = n1 - n < 4 ? (int)(n1 - n) : 4;
        int64_t stride;
        const int8_t *w = weight_rows(&reader, n, 4, &stride);
        int32_t given[4] = {0};
        float sums[4];
        if (job->sums) memcpy(given, job->sums + n, (size_t)count * sizeof *given);
        const uint8_t *ones = values + x->rows * x->depth;
        const int32x4_t row_sums = job->sums ? vld1q_s32(given) : dot_4(w, stride, x->depth, ones);
        for (int64_t m = 0; m < x->rows; m++) {
            const int32x4_t dots = dot_4(w, stride, x->depth, values + m * x->depth);
            vst1q_f32(sums, vcvtq_f32_s32(vmlaq_n_s32(dots, row_sums, 128 - x->row[m].zero_point)));
            finish_sums(job, to, m, n, n0, count, sums);
        }
    }
}

const struct fxq_kernels fxq_neon_dot = {.name = "neon_dot",
                                         .value_bytes = 1,
                                         .quantize = quantize,
                                         .row_sums = row_sums,
                                         .matmul = matmul,
                                         FXQ_INT16,
                                         FXQ_FLOATS,
                                         FXQ_STATIC,
                                         FXQ_ELEMENTWISE};
FXQ_TARGET_END
#endif
