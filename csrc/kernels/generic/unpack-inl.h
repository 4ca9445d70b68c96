/* Weights of grouped formats to int8, row by row.
 *
 * Expects: nothing. An includer that has faster code for a row's beginning defines FXQ_UNPACK_FIRST(format, from,
 * columns, values), which unpacks some whole blocks and returns how many columns they have. */
#ifndef FXQ_UNPACK_FIRST
#define FXQ_UNPACK_FIRST(format, from, columns, values) 0
#endif

static void unpack_int4(const uint8_t *from, int64_t columns, int8_t *restrict values) {
    for (int64_t k = 0; k < columns / 2; k++) {
        values[2 * k] = (int8_t)((from[k] & 15) - 8);
        values[2 * k + 1] = (int8_t)((from[k] >> 4) - 8);
    }
    if (columns % 2) values[columns - 1] = (int8_t)((from[columns / 2] & 15) - 8);
}

static void unpack_int3(const uint8_t *from, int64_t columns, int8_t *restrict values) {
    for (int64_t k = 0; k < columns; k += 8, from += 3) {
        const int first = (from[0] & 3) | (from[1] & 3) << 2 | (from[2] & 3) << 4;
        const int pairs[4] = {first, from[0] >> 2, from[1] >> 2, from[2] >> 2};
        const int64_t count = columns - k < 8 ? columns - k : 8;
        for (int64_t i = 0; i < count; i++) values[k + i] = (int8_t)((pairs[i / 2] >> i % 2 * 3 & 7) - 4);
    }
}

static void unpack(const struct fxq_weight *weight, int64_t n, int64_t count, int64_t k0, int64_t columns,
                   int8_t *values) {
    const int64_t stride = fxq_row_bytes(weight->format, weight->columns);
    const uint8_t *row = (const uint8_t *)weight->data + n * stride + fxq_row_bytes(weight->format, k0);
    for (int64_t i = 0; i < count; i++, row += stride, values += columns) {
        const int64_t done = FXQ_UNPACK_FIRST(weight->format, row, columns, values);
        const uint8_t *from = row + fxq_row_bytes(weight->format, done);
        if (weight->format == FXQ_INT3) unpack_int3(from, columns - done, values + done);
        else unpack_int4(from, columns - done, values + done);
    }
}
