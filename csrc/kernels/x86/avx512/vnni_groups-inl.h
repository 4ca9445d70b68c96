/* What groups-inl.h needs, in vpdpbusd: rows of q and the weights as int8, 4 columns of 16 outputs a register. Lanes
 * are outputs. Of each 8 columns, 0 to 7, both sides have 0 2 4 6 1 3 5 7: the low nibbles of four bytes, then the high
 * ones.
 *
 * Expects: groups-inl.h. */

enum { GROUP_ROWS_TOGETHER = 8 }; /* so many integer sums and as many float ones, half of the registers */

FXQ_INLINE void unpack_words(__m512i words, void *to) {
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    _mm512_store_si512(to, _mm512_sub_epi8(_mm512_and_si512(words, low), eight));
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(words, 4), low);
    _mm512_store_si512((char *)to + 64, _mm512_sub_epi8(high, eight));
}

/* Rows of `depth` bytes. Beyond the last column lie zero points, whose products the correction takes away again. */
static void quantize_groups(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    const int64_t columns = x->columns, depth = fxq_depth(columns);
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    for (int i = 0; i < count; i++) {
        const struct fxq_row *row = &x->row[first + i];
        uint8_t *to = (uint8_t *)x->packed + (first + i) * depth;
        for (int64_t k = 0; k < columns; k += 64) {
            _Alignas(64) uint8_t q[64];
            const int64_t width = columns - k < 64 ? columns - k : 64;
            if (width < 64) memset(q, row->zero_point, sizeof q);
            quantize_values(rows[i] + k, width, row, x->qmax, q);
            _mm512_store_si512(to + k, _mm512_shuffle_epi8(_mm512_load_si512(q), order));
        }
    }
}

/* Rows [first, first + GROUP_ROWS_TOGETHER) of a tile; those beyond its last are multiplied for nothing. */
static void multiply_group_rows(const struct group_strip *s, const struct group_tile *t, int first) {
    const int64_t groups = s->job->x->groups, group = s->job->x->group, depth = s->depth;
    const uint8_t *q = (const uint8_t *)t->q + first * depth;
    float row_scale[GROUP_ROWS_TOGETHER] = {0};
    int32_t zero_pair[GROUP_ROWS_TOGETHER] = {0};
    __m512 y[GROUP_ROWS_TOGETHER];
    for (int i = 0; i < GROUP_ROWS_TOGETHER && first + i < t->rows; i++) {
        row_scale[i] = t->row[first + i].scale;
        zero_pair[i] = t->row[first + i].zero_pair;
    }
    FXQ_FOR(8, int i = 0; i < GROUP_ROWS_TOGETHER; i++) y[i] = begin_tile_sum(t, first + i);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t end = (g + 1) * group < depth ? (g + 1) * group : depth;
        __m512i sums[GROUP_ROWS_TOGETHER], weights_sum = _mm512_setzero_si512();
        FXQ_FOR(8, int i = 0; i < GROUP_ROWS_TOGETHER; i++) sums[i] = _mm512_setzero_si512();
        for (int64_t k = g * group; k < end; k += 4) {
            const __m512i w = _mm512_load_si512(t->weights + k * GROUP_OUTPUTS);
            weights_sum = _mm512_dpbusd_epi32(weights_sum, _mm512_set1_epi8(1), w);
            FXQ_FOR(8, int i = 0; i < GROUP_ROWS_TOGETHER; i++) {
                int32_t four;
                memcpy(&four, q + i * depth + k, sizeof four);
                sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_set1_epi32(four), w);
            }
        }
        const __m512i pairs = make_pairs(weights_sum);
        const __m512 scale = _mm512_load_ps(t->scale + 16 * g);
        FXQ_FOR(8, int i = 0; i < GROUP_ROWS_TOGETHER; i++) {
            const __m512 whole = _mm512_cvtepi32_ps(correct(sums[i], pairs, zero_pair[i]));
            y[i] = _mm512_add_ps(_mm512_mul_ps(whole, _mm512_mul_ps(_mm512_set1_ps(row_scale[i]), scale)), y[i]);
        }
    }
    FXQ_FOR(8, int i = 0; i < GROUP_ROWS_TOGETHER; i++) {
        if (first + i < t->rows) store_tile_sum(t, first + i, y[i]);
    }
}

static void multiply_strip(const struct group_strip *strip) {
    for (int64_t i = 0; i < strip->tiles; i++) {
        const struct group_tile t = group_tile_at(strip, i);
        for (int first = 0; first < t.rows; first += GROUP_ROWS_TOGETHER) multiply_group_rows(strip, &t, first);
    }
}
