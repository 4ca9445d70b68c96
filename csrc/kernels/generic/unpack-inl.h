/* 4-bit weights to int8. Expects: nothing. */

static void unpack(const struct fxq_weight *weight, int64_t n, int64_t count, int64_t k0, int64_t columns,
                   int8_t *restrict values) {
    const int64_t stride = fxq_row_bytes(weight->format, weight->columns);
    const uint8_t *nibbles = (const uint8_t *)weight->data + n * stride + k0 / 2;
    for (int64_t i = 0; i < count; i++, nibbles += stride, values += columns) {
        for (int64_t k = 0; k < columns / 2; k++) {
            values[2 * k] = (int8_t)((nibbles[k] & 15) - 8);
            values[2 * k + 1] = (int8_t)((nibbles[k] >> 4) - 8);
        }
        if (columns % 2) values[columns - 1] = (int8_t)((nibbles[columns / 2] & 15) - 8);
    }
}
