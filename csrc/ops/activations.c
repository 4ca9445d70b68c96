/* The quantization of tokens (fxquant.numerics.quantize_tokens, to the bit), and who multiplies them: the table
 * of formats and two switches over forms. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels.h"

#if FLT_EVAL_METHOD != 0
#error "float arithmetic must be plain IEEE single precision: the results would differ from the reference"
#endif

/* Adding this to a float of less than 2^22 rounds it to a whole number, halves to even, as torch.round does. */
static const float ROUND = 12582912.0f;

enum fxq_method fxq_only_method = FXQ_METHODS;

int64_t fxq_depth(int64_t columns) { return (columns + FXQ_DEPTH - 1) / FXQ_DEPTH * FXQ_DEPTH; }

int64_t fxq_nibble_depth(int64_t columns) { return (columns + 127) / 128 * 128; }

const struct fxq_format_entry fxq_formats[FXQ_FORMATS] = {
    [FXQ_INT8] = {1, 1, false, FXQ_TO_UINT8},    [FXQ_INT16] = {1, 2, false, FXQ_TO_INT16},
    [FXQ_INT4] = {2, 1, true, FXQ_TO_UINT8},     [FXQ_INT3] = {8, 3, true, FXQ_TO_UINT8},
    [FXQ_FLOAT16] = {1, 2, false, FXQ_TO_FLOAT}, [FXQ_FLOAT32] = {1, 4, false, FXQ_TO_FLOAT},
    [FXQ_UINT8] = {1, 1, false, FXQ_TO_FLOAT},   [FXQ_UINT4] = {2, 1, false, FXQ_TO_FLOAT},
};

int64_t fxq_activation_bytes(const struct fxq_weight *weight, int64_t rows) {
    if (weight->format == FXQ_NONE) return 0;
    const int64_t values = rows * fxq_depth(weight->columns);
    if (fxq_formats[weight->format].takes != FXQ_TO_UINT8) return values * 4; /* a low and a high half, or a float */
    /* 16 more rows: a block of 16 may be partly filled, and the gemv keeps a row of its own (see common-inl.h). */
    const int64_t bytes = (rows + 16) * fxq_depth(weight->columns) * fxq_active->value_bytes;
    const int64_t grouped = weight->group ? fxq_group_activation_bytes(weight, rows) : 0;
    return bytes > grouped ? bytes : grouped;
}

void fxq_begin_activations(struct fxq_activations *x, const struct fxq_weight *weight) {
    x->columns = weight->columns;
    x->depth = fxq_depth(weight->columns);
    switch (fxq_formats[weight->format].takes) {
        case FXQ_TO_UINT8: x->form = FXQ_BYTES; break;
        case FXQ_TO_INT16: x->form = FXQ_LOW_HIGH; break;
        case FXQ_TO_FLOAT: x->form = FXQ_FLOATS; break;
    }
    if (weight->group && !x->is_row_major) fxq_begin_groups(x, weight); /* a packed weight takes whole rows */
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

/* fxquant.numerics.quantize_tokens_int16, to the bit. */
void fxq_set_int16_row(struct fxq_row *row, const struct fxq_range *range) {
    const float largest = -range->low > range->high ? -range->low : range->high;
    float scale = (largest > FLT_MAX ? FLT_MAX : largest) / 32767.0f;
    if (scale < FLT_MIN) scale = 1.0f;
    if (range->is_nan) scale = NAN;
    *row = (struct fxq_row){.scale = scale, .inverse = 1.0f / scale};
}

struct fxq_range fxq_join_ranges(const struct fxq_range *ranges, int64_t count) {
    struct fxq_range range = {0.0f, 0.0f, false};
    for (int64_t i = 0; i < count; i++) {
        range.low = ranges[i].low < range.low ? ranges[i].low : range.low;
        range.high = ranges[i].high > range.high ? ranges[i].high : range.high;
        range.is_nan |= ranges[i].is_nan;
    }
    return range;
}

void fxq_set_rows(const struct fxq_activations *x, int64_t first, int64_t last, const struct fxq_range *range) {
    for (int64_t m = first; m < last && x->form != FXQ_FLOATS; m++) {
        if (x->form == FXQ_LOW_HIGH) fxq_set_int16_row(&x->row[m], range);
        else fxq_set_row(&x->row[m], range, x->qmax);
    }
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
    switch (x->form) {
        case FXQ_BYTES: fxq_active->quantize(x, first, count, rows); break;
        case FXQ_LOW_HIGH: fxq_active->quantize_int16(x, first, count, rows); break;
        case FXQ_FLOATS: copy_floats(x, first, count, rows); break;
        default: fxq_quantize_groups(x, first, count, rows);
    }
}

void fxq_multiply(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch) {
    switch (job->x->form) {
        case FXQ_BYTES: fxq_active->matmul(job, n0, n1, to, scratch); break;
        case FXQ_LOW_HIGH: fxq_active->matmul_int16(job, n0, n1, to); break;
        case FXQ_FLOATS: fxq_active->matmul_floats(job, n0, n1, to, scratch); break;
        default: fxq_multiply_groups(job, n0, n1, to, scratch);
    }
}

const float *fxq_find_row(const struct fxq_rows *rows, int64_t row) {
    const float *found = rows->data;
    for (int i = rows->dimensions - 1; i > 0; i--) {
        found += row % rows->sizes[i] * rows->strides[i];
        row /= rows->sizes[i];
    }
    return found + row * rows->strides[0];
}

void fxq_quantize_rows(const struct fxq_activations *x, const struct fxq_rows *source, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += 16) {
        const float *rows[16];
        const int count = last - row < 16 ? (int)(last - row) : 16;
        for (int i = 0; i < count; i++) rows[i] = fxq_find_row(source, row + i);
        fxq_quantize(x, row, count, rows);
    }
}

/* The copy of a weight's last rows (row_major-inl.h), 64 of them in the tiled gemm; or a packed part of it; or 4 rows
 * of floats. */
int64_t fxq_product_scratch_bytes(const struct fxq_weight *weight) {
    const int64_t rows = 64 * fxq_depth(weight->columns), bytes = rows < FXQ_PACKED_BYTES ? FXQ_PACKED_BYTES : rows;
    const int64_t grouped = weight->group ? fxq_group_scratch_bytes(weight) : 0;
    return fxq_aligned(bytes > grouped ? bytes : grouped);
}
