/* Rows of quantized tables, and their sums. Expects: floats-inl.h. */

/* Columns [first, first + count) of a table's row. first is even. */
static void put_columns(const struct fxq_table *table, int64_t row, int64_t first, int64_t count, float *restrict out) {
    const int64_t columns = table->columns;
    if (table->format == FXQ_FLOAT16) {
        widen((const uint16_t *)table->values + row * columns + first, count, out);
        return;
    }
    const float scale = table->scale[row], zero = table->zero_point ? table->zero_point[row] : 0.0f;
    if (table->format == FXQ_UINT4) {
        const uint8_t *packed = (const uint8_t *)table->values + row * fxq_row_bytes(FXQ_UINT4, columns) + first / 2;
        for (int64_t k = 0; k < count / 2; k++) {
            out[2 * k] = ((float)(packed[k] & 15) - zero) * scale;
            out[2 * k + 1] = ((float)(packed[k] >> 4) - zero) * scale;
        }
        if (count % 2) out[count - 1] = ((float)(packed[count / 2] & 15) - zero) * scale;
    } else if (table->format == FXQ_INT8) {
        const int8_t *values = (const int8_t *)table->values + row * columns + first;
        for (int64_t k = 0; k < count; k++) out[k] = ((float)values[k] - zero) * scale;
    } else {
        const uint8_t *values = (const uint8_t *)table->values + row * columns + first;
        for (int64_t k = 0; k < count; k++) out[k] = ((float)values[k] - zero) * scale;
    }
}

static void put_row(const struct fxq_table *table, int64_t row, float *out) {
    put_columns(table, row, 0, table->columns, out);
}

static void add_rows(const struct fxq_table *table, const int64_t *rows, const float *weights, int64_t count,
                     float *out) {
    enum { TOGETHER = 256 };
    float part[TOGETHER];
    for (int64_t first = 0; first < table->columns; first += TOGETHER) {
        const int64_t width = table->columns - first < TOGETHER ? table->columns - first : TOGETHER;
        float *restrict sums = out + first;
        for (int64_t i = 0; i < count; i++) {
            put_columns(table, rows[i], first, width, part);
            const float weight = weights ? weights[i] : 1.0f;
            for (int64_t k = 0; k < width; k++) sums[k] += part[k] * weight;
        }
    }
}
