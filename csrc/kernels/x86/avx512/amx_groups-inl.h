/* Tiles of bfloat16 for 4-bit weights in groups (TDPBF16PS: 16 x 16 products of 32 columns, the least group). q -
 * zero_point and the weights are whole numbers of at most 8 bits, exact in bfloat16, and so are their sums in float32,
 * far below 2^24: a group's sums come out as floats, without a correction.
 *
 * Of each 8 columns, 0 to 7, both sides have 0 4 1 5 2 6 3 7, in pairs: a shift away from the nibbles of two 16-bit
 * words.
 *
 * Expects: groups-inl.h, and a target with AMX for bfloat16 begun. */

/* A word's lowest nibble, whatever is above, to bfloat16: -8 … 7. */
FXQ_INLINE __m512i bfloat16_of_nibbles(__m512i words) {
    const __m512i values = _mm512_broadcast_i64x4(
        _mm256_setr_epi16((short)0xc100, (short)0xc0e0, (short)0xc0c0, (short)0xc0a0, (short)0xc080, (short)0xc040,
                          (short)0xc000, (short)0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
    return _mm512_permutexvar_epi16(words, values);
}

FXQ_INLINE void unpack_words(__m512i words, void *to) {
    __m512i *pairs = to;
    _mm512_store_si512(pairs, bfloat16_of_nibbles(words));
    _mm512_store_si512(pairs + 1, bfloat16_of_nibbles(_mm512_srli_epi16(words, 4)));
    _mm512_store_si512(pairs + 2, bfloat16_of_nibbles(_mm512_srli_epi16(words, 8)));
    _mm512_store_si512(pairs + 3, bfloat16_of_nibbles(_mm512_srli_epi16(words, 12)));
}

/* 32 bytes to bfloat16, less the zero point. */
FXQ_INLINE __m512i bfloat16_of_bytes(__m256i bytes, __m512i zero_point) {
    const __m512i whole = _mm512_sub_epi16(_mm512_cvtepu8_epi16(bytes), zero_point);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(whole)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(whole, 1)));
    const __m256i low_half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(low), 16));
    const __m256i high_half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(high), 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low_half), high_half, 1);
}

/* Blocks of 16 rows: [depth / 32][16][32] bfloat16. Rows beyond the last hold anything: they are multiplied for
 * nothing. */
static void quantize_groups(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    const int64_t columns = x->columns, depth = fxq_depth(columns);
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
    for (int i = 0; i < count; i++) {
        const struct fxq_row *row = &x->row[first + i];
        const __m512i zero_point = _mm512_set1_epi16((short)row->zero_point);
        char *to = (char *)x->packed + first * depth * GROUP_VALUE_BYTES + 64 * i;
        for (int64_t k = 0; k < columns; k += 64, to += 2 * 1024) {
            _Alignas(64) uint8_t q[64];
            const int64_t width = columns - k < 64 ? columns - k : 64;
            if (width < 64) memset(q, row->zero_point, sizeof q);
            quantize_values(rows[i] + k, width, row, x->qmax, q);
            const __m512i v = _mm512_shuffle_epi8(_mm512_load_si512(q), order);
            _mm512_store_si512(to, bfloat16_of_bytes(_mm512_castsi512_si256(v), zero_point));
            _mm512_store_si512(to + 1024, bfloat16_of_bytes(_mm512_extracti64x4_epi64(v, 1), zero_point));
        }
    }
}

/* The groups of a strip's tiles, one after another: accumulators 0–3 in turn, activations 4 and 6, weights 5 and 7. */
struct group_stream {
    const struct group_strip *strip;
    int64_t steps, all; /* tiles of 32 columns, of a group and of all columns */
    int64_t tile, k;    /* what comes next */
    const char *q, *w;
    unsigned next;
};

FXQ_INLINE void enter_tile(struct group_stream *s) {
    const struct group_tile t = group_tile_at(s->strip, s->tile);
    s->q = t.q;
    s->w = t.weights;
    s->k = 0;
}

/* Store what an accumulator has, the group of four steps ago, and begin the next group in it: so that no store waits.
 */
#define ACCUMULATOR(c, a, b)                        \
    case c:                                         \
        _tile_stored(c, sums, 64);                  \
        _tile_zero(c);                              \
        for (; s->k < last; s->k++) {               \
            _tile_loadd(a, s->q + 1024 * s->k, 64); \
            _tile_loadd(b, s->w + 1024 * s->k, 64); \
            _tile_dpbf16ps(c, a, b);                \
        }                                           \
        break;
FXQ_INLINE void advance_groups(struct group_stream *s, float *sums) {
    const int64_t last = s->tile == s->strip->tiles ? 0 : s->k + s->steps < s->all ? s->k + s->steps : s->all;
    switch (s->next++ % 4) {
        ACCUMULATOR(0, 4, 5)
        ACCUMULATOR(1, 6, 7)
        ACCUMULATOR(2, 4, 5)
        ACCUMULATOR(3, 6, 7)
    }
    if (s->k == s->all && s->tile < s->strip->tiles && ++s->tile < s->strip->tiles) enter_tile(s);
}

FXQ_INLINE void add_group(const float *sums, const float *row_scale, const float *scale, int rows, __m512 *y) {
    const __m512 group_scale = _mm512_load_ps(scale);
    FXQ_FOR(16, int i = 0; i < rows; i++) {
        const __m512 both = _mm512_mul_ps(_mm512_set1_ps(row_scale[i]), group_scale);
        y[i] = _mm512_add_ps(_mm512_mul_ps(_mm512_load_ps(sums + 16 * i), both), y[i]);
    }
}

FXQ_INLINE void finish_group_tile(struct group_stream *s, const struct group_tile *t, float *sums, int rows) {
    const int64_t groups = s->strip->job->x->groups;
    _Alignas(64) float row_scale[16] = {0};
    __m512 y[16];
    for (int i = 0; i < t->rows; i++) row_scale[i] = t->row[i].scale;
    FXQ_FOR(16, int i = 0; i < rows; i++) y[i] = begin_tile_sum(t, i);
    for (int64_t g = 0; g < groups; g++) {
        advance_groups(s, sums);
        add_group(sums, row_scale, t->scale + 16 * g, rows, y);
    }
    FXQ_FOR(16, int i = 0; i < rows; i++) {
        if (i < t->rows) store_tile_sum(t, i, y[i]);
    }
}

static void multiply_strip(const struct group_strip *strip) {
    struct group_stream s = {
        .strip = strip, .steps = strip->job->x->group / 32, .all = (strip->job->x->columns + 31) / 32};
    _Alignas(64) float sums[256];
    enter_tile(&s);
    for (int i = 0; i < 4; i++) advance_groups(&s, sums);
    for (int64_t i = 0; i < strip->tiles; i++) {
        const struct group_tile t = group_tile_at(strip, i);
        if (t.rows > 12) finish_group_tile(&s, &t, sums, 16);
        else if (t.rows > 8) finish_group_tile(&s, &t, sums, 12);
        else if (t.rows > 4) finish_group_tile(&s, &t, sums, 8);
        else finish_group_tile(&s, &t, sums, 4);
    }
}
