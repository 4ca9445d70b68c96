/* Rows of quantized tables: real = (value - zero_point) * scale, as in generic/tables-inl.h. Rows may be short, so
 * that 16 columns at a time and a masked end serve them better than what compilers find; and the sums of 64 columns of
 * a bag stay in registers until all its rows are added. `format` is a constant where it is used, so that each has loops
 * of its own.
 *
 * Expects: first_lanes() of common-inl.h. */

struct table_row {
    const uint8_t *values;
    __m512 zero, scale;
};

FXQ_INLINE struct table_row row_at(const struct fxq_table *table, int64_t row, enum fxq_format format) {
    const int64_t bytes = fxq_row_bytes(format, table->columns);
    if (format == FXQ_FLOAT16) return (struct table_row){.values = (const uint8_t *)table->values + row * bytes};
    const float zero = table->zero_point ? table->zero_point[row] : 0.0f;
    return (struct table_row){(const uint8_t *)table->values + row * bytes, _mm512_set1_ps(zero),
                              _mm512_set1_ps(table->scale[row])};
}

/* 16 columns from k on, or as many as `lanes` has. */
FXQ_INLINE __m512 reals_at(struct table_row row, int64_t k, __mmask16 lanes, enum fxq_format format) {
    __m512i values;
    if (format == FXQ_FLOAT16) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, row.values + 2 * k));
    } else if (format == FXQ_UINT4) {
        const __mmask16 pairs = first_lanes((__builtin_popcount(lanes) + 1) / 2);
        const __m128i bytes = _mm_cvtepu8_epi16(_mm_maskz_loadu_epi8(pairs, row.values + k / 2));
        const __m128i nibbles = _mm_and_si128(_mm_or_si128(bytes, _mm_slli_epi16(bytes, 4)), _mm_set1_epi8(15));
        values = _mm512_cvtepu8_epi32(nibbles);
    } else {
        const __m128i bytes = _mm_maskz_loadu_epi8(lanes, row.values + k);
        values = format == FXQ_INT8 ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
    }
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(values), row.zero), row.scale);
}

FXQ_INLINE void put_row_of(const struct fxq_table *table, int64_t index, float *out, enum fxq_format format) {
    const struct table_row row = row_at(table, index, format);
    int64_t k = 0;
    for (; k + 16 <= table->columns; k += 16) _mm512_storeu_ps(out + k, reals_at(row, k, 0xffff, format));
    const __mmask16 rest = first_lanes(table->columns - k);
    if (rest) _mm512_mask_storeu_ps(out + k, rest, reals_at(row, k, rest, format));
}

static void put_row(const struct fxq_table *table, int64_t row, float *out) {
    switch (table->format) {
        case FXQ_INT8: put_row_of(table, row, out, FXQ_INT8); break;
        case FXQ_UINT4: put_row_of(table, row, out, FXQ_UINT4); break;
        case FXQ_FLOAT16: put_row_of(table, row, out, FXQ_FLOAT16); break;
        default: put_row_of(table, row, out, FXQ_UINT8);
    }
}

/* `vectors` (a constant, 1 to 4) of 16 columns from k on; only a single one has a mask. */
FXQ_INLINE void add_table_columns(const struct fxq_table *table, const int64_t *rows, const float *weights,
                                  int64_t count, int64_t k, int vectors, __mmask16 lanes, float *out,
                                  enum fxq_format format) {
    __m512 sums[4];
    FXQ_FOR(4, int j = 0; j < vectors; j++) sums[j] = _mm512_maskz_loadu_ps(lanes, out + k + 16 * j);
    for (int64_t i = 0; i < count; i++) {
        const struct table_row row = row_at(table, rows[i], format);
        const __m512 weight = _mm512_set1_ps(weights ? weights[i] : 1.0f);
        FXQ_FOR(4, int j = 0; j < vectors; j++) {
            sums[j] = _mm512_add_ps(sums[j], _mm512_mul_ps(reals_at(row, k + 16 * j, lanes, format), weight));
        }
    }
    FXQ_FOR(4, int j = 0; j < vectors; j++) _mm512_mask_storeu_ps(out + k + 16 * j, lanes, sums[j]);
}

FXQ_INLINE void add_rows_of(const struct fxq_table *table, const int64_t *rows, const float *weights, int64_t count,
                            float *out, enum fxq_format format) {
    int64_t k = 0;
    for (; k + 64 <= table->columns; k += 64) add_table_columns(table, rows, weights, count, k, 4, 0xffff, out, format);
    for (; k < table->columns; k += 16) {
        add_table_columns(table, rows, weights, count, k, 1, first_lanes(table->columns - k), out, format);
    }
}

static void add_rows(const struct fxq_table *table, const int64_t *rows, const float *weights, int64_t count,
                     float *out) {
    switch (table->format) {
        case FXQ_INT8: add_rows_of(table, rows, weights, count, out, FXQ_INT8); break;
        case FXQ_UINT4: add_rows_of(table, rows, weights, count, out, FXQ_UINT4); break;
        case FXQ_FLOAT16: add_rows_of(table, rows, weights, count, out, FXQ_FLOAT16); break;
        default: add_rows_of(table, rows, weights, count, out, FXQ_UINT8);
    }
}
