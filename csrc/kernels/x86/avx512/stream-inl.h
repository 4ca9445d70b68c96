/* Large outputs leave by non-temporal stores, which write whole lines without reading them first: 20 GB/s instead of 8.
 * A row need not begin at a line (33278 floats are no whole number of lines), so that the end of each row's last
 * outputs is carried on to the next.
 *
 * Expects: first_lanes() of common-inl.h. */

enum {
    STREAM_OUTPUTS = 64,
    STREAM_ROWS = 512,       /* at a time: what is carried takes 64 bytes a row */
    STREAMED_BYTES = 8 << 20 /* of all outputs: fewer are better left in the caches */
};

static bool is_streamed(int64_t rows, int64_t outputs) {
    return rows * outputs * (int64_t)sizeof(float) >= STREAMED_BYTES;
}

/* 64 outputs of each row, or the fewer that are left. */
struct streamed_block {
    bool is_first, is_last;
    int64_t outputs;
};

FXQ_INLINE struct streamed_block streamed_block_at(int64_t n, int64_t n0, int64_t n1) {
    const int64_t left = n1 - n;
    return (struct streamed_block){n == n0, left <= STREAM_OUTPUTS, left < STREAM_OUTPUTS ? left : STREAM_OUTPUTS};
}

/* 64 outputs y that belong at `out`, in whole lines: the first begins with what is carried. */
FXQ_INLINE void stream_row(const struct streamed_block *b, const __m512 y[4], float *out, float *carried) {
    const int before = (int)((uintptr_t)out % 64 / 4); /* how many floats of out's line are before it */
    const __mmask16 in_line = (__mmask16)(0xffff << before), left_over = (__mmask16) ~(0xffff >> before);
    if (b->outputs < STREAM_OUTPUTS) {
        if (!b->is_first) _mm512_mask_storeu_ps(out - 16, left_over, _mm512_load_ps(carried));
        FXQ_FOR(4, int i = 0; i < 4; i++) _mm512_mask_storeu_ps(out + 16 * i, first_lanes(b->outputs - 16 * i), y[i]);
        return;
    }
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i from = _mm512_add_epi32(lanes, _mm512_set1_epi32(16 - before)); /* of two registers in a row */
    const __m512 first = _mm512_permutex2var_ps(_mm512_load_ps(carried), from, y[0]);
    float *line = out - before;
    if (b->is_first) _mm512_mask_store_ps(line, in_line, first);
    else _mm512_stream_ps(line, first);
    FXQ_FOR(3, int i = 1; i < 4; i++) {
        _mm512_stream_ps(line + 16 * i, _mm512_permutex2var_ps(y[i - 1], from, y[i]));
    }
    if (b->is_last) _mm512_mask_storeu_ps(out + 48, left_over, y[3]);
    else _mm512_store_ps(carried, y[3]);
}
