/* The quantization of activation rows: fxquant.numerics.quantize_rows, to the bit. */
#include <float.h>
#include <math.h>

#include "fxquant.h"

#if FLT_EVAL_METHOD != 0
#error "float arithmetic must be plain IEEE single precision: the results would differ from the reference"
#endif

/* Adding this to a float of less than 2^22 rounds it to a whole number, halves to even, as torch.round does. */
static const float ROUND = 12582912.0f;

int64_t fxq_depth(int64_t columns) { return (columns + FXQ_DEPTH - 1) / FXQ_DEPTH * FXQ_DEPTH; }

int64_t fxq_nibble_depth(int64_t columns) { return (columns + 127) / 128 * 128; }

/* 16 more rows: a block of 16 may be partly filled, and the dot form keeps a row of its own (see avx512.h). */
int64_t fxq_packed_bytes(int64_t rows, int64_t columns) {
    return (rows + 16) * fxq_depth(columns) * fxq_active->value_bytes;
}

/* Low and high bytes, an int16 each: see int16.h. */
int64_t fxq_int16_bytes(int64_t rows, int64_t columns) { return rows * fxq_depth(columns) * 2 * (int64_t)sizeof(int16_t); }

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

/* The copy of a weight's last rows (row_major.h), 64 of them in the block form; or a packed part of it. */
int64_t fxq_matmul_scratch_bytes(int64_t columns) {
    const int64_t bytes = 64 * fxq_depth(columns);
    return bytes < FXQ_PACKED_BYTES ? FXQ_PACKED_BYTES : bytes;
}
