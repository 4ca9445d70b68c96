/* Activations token by token, and weights as they lie: what every form of product but the tiled gemm uses.
 *
 * FXQ_VALUE int16_t: rows of q - zero_point, `depth` values apart; sums need no correction.
 * FXQ_VALUE uint8_t: rows of q, and one more row, for sum((q - zero_point) w) = sum(q w) - zero_point sum(w): ones (in
 * the real columns), whose product is sum(w). For a single token it is the zero point itself, whose
 * product is the whole correction: then each weight is read once.
 *
 * Expects: what elementwise-inl.h does. */
#include "kernels/generic/elementwise-inl.h"

static void quantize_row_major(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    FXQ_VALUE *packed = x->packed;
    const size_t columns = (size_t)x->columns, padding = (size_t)(x->depth - x->columns) * sizeof *packed;
    for (int i = 0; i < count; i++) {
        FXQ_VALUE *q = packed + (first + i) * x->depth;
        quantize_values(rows[i], x->columns, &x->row[first + i], x->qmax, q);
        memset(q + columns, 0, padding);
    }
    if (sizeof *packed == 1 && first + count == x->rows && !x->is_row_major) {
        FXQ_VALUE *extra = packed + x->rows * x->depth;
        memset(extra, x->rows == 1 ? x->row[0].zero_point : 1, columns);
        memset(extra + columns, 0, padding);
    }
}

/* Reads groups of a weight's rows `depth` bytes wide, though they are only `columns` wide: activations are 0 beyond, so
 * that the next row's weights do no harm. At the end of the tensor, which must not be passed, a copy is read. */
struct weight_reader {
    const int8_t *weight;
    int64_t outputs, columns, depth;
    int8_t *copy;   /* as many rows as a group has, `depth` bytes each */
    int64_t copied; /* the row that `copy` begins with */
};

static inline struct weight_reader read_weight(const struct fxq_weight *weight, void *scratch) {
    return (struct weight_reader){
        weight->data, weight->outputs, weight->columns, fxq_depth(weight->columns), scratch, -1};
}

/* Return where rows n .. n + count - 1 are, `stride` bytes apart. Rows beyond the last output hold anything. */
static inline const int8_t *weight_rows(struct weight_reader *reader, int64_t n, int64_t count, int64_t *stride) {
    const int64_t columns = reader->columns, end = reader->outputs * columns;
    if ((n + count - 1) * columns + reader->depth <= end) {
        *stride = columns;
        return reader->weight + n * columns;
    }
    if (reader->copied != n) {
        const int64_t left = reader->outputs - n < count ? reader->outputs - n : count;
        for (int64_t i = 0; i < left; i++) {
            memcpy(reader->copy + i * reader->depth, reader->weight + (n + i) * columns, (size_t)columns);
        }
        reader->copied = n;
    }
    *stride = reader->depth;
    return reader->copy;
}
