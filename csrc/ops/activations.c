/* The quantization of activation rows: fxquant.numerics.quantize_rows, to the bit. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "fxquant.h"

#if FLT_EVAL_METHOD != 0
#error "float arithmetic must be plain IEEE single precision: the results would differ from the reference"
#endif

/* Adding this to a float of less than 2^22 rounds it to a whole number, halves to even, as torch.round does. */
static const float ROUND = 12582912.0f;

int64_t fxq_depth(int64_t columns) { return (columns + FXQ_DEPTH - 1) / FXQ_DEPTH * FXQ_DEPTH; }

int64_t fxq_nibble_depth(int64_t columns) { return (columns + 127) / 128 * 128; }

/* 16 more rows: a block of 16 may be partly filled, and the dot form keeps a row of its own (see common-inl.h). */
static int64_t packed_bytes(int64_t rows, int64_t columns) {
    return (rows + 16) * fxq_depth(columns) * fxq_active->value_bytes;
}

int64_t fxq_activation_bytes(enum fxq_kind kind, int64_t rows, int64_t columns) {
    if (kind == FXQ_KIND_UINT8) return packed_bytes(rows, columns);
    return rows * fxq_depth(columns) * 4; /* two int16 or a float */
}

void fxq_set_row(struct fxq_row *row, const struct fxq_range *range, int qmax) {
    const float low = range->low < -FLT_MAX ? -FLT_MAX : range->low;
    const float high = range->high > FLT_MAX ? FLT_MAX : range->high;
    float scale = (high * 0.5f - low * 0.5f) / ((float)qmax * 0.5f);
    if (scale < FLT_MIN) scale = 1.0f;
    if (range->is_nan) scale = NAN;
    const float inverse = 1.0f / scale;
    float zero = (low * -inverse + ROUND) - ROUND;
    if (!(zero > 0.0f)) zero = 0.0f; /* NaN too */
    if (zero > (float)qmax) zero = (float)qmax;
    const int32_t zero_point = (int32_t)zero;
    const uint32_t pair = (uint32_t)(-128 * zero_point) << 16 | ((uint32_t)-zero_point & 0xffffu);
    *row = (struct fxq_row){scale, inverse, zero_point, (int32_t)pair};
}

/* fxquant.numerics.quantize_rows_int16, to the bit. */
void fxq_set_int16_row(struct fxq_row *row, const struct fxq_range *range) {
    const float largest = -range->low > range->high ? -range->low : range->high;
    float scale = (largest > FLT_MAX ? FLT_MAX : largest) / 32767.0f;
    if (scale < FLT_MIN) scale = 1.0f;
    if (range->is_nan) scale = NAN;
    *row = (struct fxq_row){.scale = scale, .inverse = 1.0f / scale};
}

/* Floats stay as they are. */
static void copy_floats(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    const size_t columns = (size_t)x->columns, padding = (size_t)(x->depth - x->columns);
    for (int i = 0; i < count; i++) {
        float *to = (float *)x->packed + (first + i) * x->depth;
        if (columns) memcpy(to, rows[i], columns * sizeof *to); /* else there may be no row */
        memset(to + columns, 0, padding * sizeof *to);
    }
}

void fxq_quantize(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    switch (x->kind) {
        case FXQ_KIND_UINT8: fxq_active->quantize(x, first, count, rows); break;
        case FXQ_KIND_INT16: fxq_active->quantize_int16(x, first, count, rows); break;
        case FXQ_KIND_FLOAT: copy_floats(x, first, count, rows); break;
    }
}

void fxq_multiply(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch) {
    switch (job->x->kind) {
        case FXQ_KIND_UINT8: fxq_active->matmul(job, n0, n1, to, scratch); break;
        case FXQ_KIND_INT16: fxq_active->matmul_int16(job, n0, n1, to); break;
        case FXQ_KIND_FLOAT: fxq_active->matmul_floats(job, n0, n1, to, scratch); break;
    }
}

void fxq_quantize_rows(const struct fxq_activations *x, const struct fxq_rows *source, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += 16) {
        const float *rows[16];
        const int count = last - row < 16 ? (int)(last - row) : 16;
        for (int i = 0; i < count; i++) rows[i] = fxq_find_row(source, row + i);
        fxq_quantize(x, row, count, rows);
    }
}

/* The copy of a weight's last rows (row_major-inl.h), 64 of them in the block form; or a packed part of it; or 4 rows of floats. */
int64_t fxq_matmul_scratch_bytes(int64_t columns) {
    const int64_t bytes = 64 * fxq_depth(columns);
    return bytes < FXQ_PACKED_BYTES ? FXQ_PACKED_BYTES : bytes;
}
