/* The packed gemm of grouped weights: a tile of 16 rows by 16 outputs keeps its float sums in registers while all
 * groups of columns pass, so that each output is written once. Expects: nibbles-inl.h, stream-inl.h, and what the
 * includer defines for its instruction set:
 *
 * #define GROUP_VALUE_BYTES of an unpacked weight
 * static void unpack_words(__m512i words, void *to);                8 columns of 16 outputs, a nibble each
 * static void quantize_groups(const struct fxq_activations *x, int64_t first, int count, const float *const *rows);
 * static void multiply_groups(const struct group_tile *t);          all groups of a tile
 *
 * The weights of 16 outputs are unpacked at a time, for 32 rows; for more rows as many as the L2 cache holds are kept.
 */

enum { GROUP_OUTPUTS = 16, GROUPED_ROWS = 32 /* activations that stay in the L1 cache while the weights pass */ };

/* Some outputs, [n0, n1), by at most GROUPED_ROWS rows, [m0, m1), in tiles of 16 by 16. blocks: for 16 outputs their
 * unpacked weights, [depth / 8][what unpack_words makes], then their scales, (groups, 16). */
struct group_strip {
    const struct fxq_matmul *job;
    const struct fxq_target *to; /* of row m0, output n0 */
    int64_t n0, n1, m0, m1, tiles;
    const char *blocks;
    int64_t block_bytes, depth;
};

struct group_tile {
    int rows; /* 1 to 16 */
    const struct fxq_row *row;
    const char *q, *weights;
    const float *scale;
    struct fxq_target to; /* of its first row and output */
    struct outputs_16 outputs;
};

FXQ_INLINE void unpack_words(__m512i words, void *to);
static void multiply_strip(const struct group_strip *strip);

FXQ_INLINE __m512 begin_tile_sum(const struct group_tile *t, int i) {
    return begin_sum(&t->outputs, t->to.addend && i < t->rows ? t->to.addend + i * t->to.addend_stride : NULL);
}

FXQ_INLINE void store_tile_sum(const struct group_tile *t, int i, __m512 y) {
    store_outputs(&t->outputs, end_outputs(&t->outputs, y), t->to.out + i * t->to.out_stride);
}

FXQ_INLINE struct group_tile group_tile_at(const struct group_strip *s, int64_t index) {
    const int64_t by = (s->m1 - s->m0 + 15) / 16, m = s->m0 + index % by * 16, at = index / by * GROUP_OUTPUTS,
                  n = s->n0 + at;
    const struct fxq_matmul *job = s->job;
    struct group_tile t = {.rows = (int)(s->m1 - m < 16 ? s->m1 - m : 16),
                           .row = job->x->row + m,
                           .q = (const char *)job->x->packed + m * s->depth * GROUP_VALUE_BYTES,
                           .weights = s->blocks + index / by * s->block_bytes,
                           .to = fxq_target_at(s->to, m - s->m0, at),
                           .outputs = begin_outputs(job, n, s->n1)};
    t.scale = (const float *)(t.weights + GROUP_OUTPUTS * s->depth * GROUP_VALUE_BYTES);
    return t;
}

/* Outputs [n, n + 16), as far as there are `left`. */
FXQ_INLINE void *unpack_group_values(const struct fxq_weight *weight, int64_t n, int64_t left, void *block,
                                     enum fxq_format format) {
    const int64_t row_bytes = fxq_row_bytes(format, weight->columns);
    const uint8_t *from = (const uint8_t *)weight->data + n * row_bytes;
    char *to = block;
    for (int64_t k = 0; k < weight->columns; k += PAIR_COLUMNS, from += fxq_row_bytes(format, PAIR_COLUMNS)) {
        const __mmask64 bytes = bytes_of_columns(format, weight->columns - k);
        __m512i v[16];
        FXQ_FOR(16, int i = 0; i < 16; i++) {
            _mm_prefetch((const char *)from + (16 + i) * row_bytes, _MM_HINT_T0);
            v[i] = load_nibbles(format, i < left ? bytes : 0, from + i * row_bytes);
        }
        transpose_16x16(v);
        for (int i = 0; i < 16; i += 8) { /* depth is a multiple of 64: of half a step */
            if (i == 8 && weight->columns - k <= PAIR_COLUMNS / 2) break;
            FXQ_FOR(8, int j = 0; j < 8; j++, to += 8 * GROUP_OUTPUTS * GROUP_VALUE_BYTES) unpack_words(v[i + j], to);
        }
    }
    return to;
}

static void unpack_group_block(const struct fxq_weight *weight, int64_t n, int64_t left, void *block) {
    const int64_t groups = weight->groups;
    const __mmask16 lanes = first_lanes(left);
    float *scale = weight->format == FXQ_INT3 ? unpack_group_values(weight, n, left, block, FXQ_INT3)
                                              : unpack_group_values(weight, n, left, block, FXQ_INT4);
    for (int64_t g = 0; g < groups; g += 4) {
        const int count = groups - g < 4 ? (int)(groups - g) : 4;
        __m512 s[4];
        load_scales((const uint16_t *)weight->scale + n * groups + g, groups, count, lanes, g == 0, s);
        for (int i = 0; i < count; i++) _mm512_store_ps(scale + 16 * (g + i), s[i]);
    }
}

/* The strip's outputs pass through `stage` to where they belong. */
static void stream_strip(struct group_strip *strip, const struct streamed_block *block, float (*carried)[16]) {
    _Alignas(64) float stage[GROUPED_ROWS * STREAM_OUTPUTS];
    const struct fxq_target *to = strip->to, staged = {stage, STREAM_OUTPUTS, NULL, 0};
    strip->to = &staged;
    multiply_strip(strip);
    for (int64_t m = 0; m < strip->m1 - strip->m0; m++) {
        __m512 y[4];
        FXQ_FOR(4, int i = 0; i < 4; i++) y[i] = _mm512_load_ps(stage + m * STREAM_OUTPUTS + 16 * i);
        stream_row(block, y, to->out + m * to->out_stride, carried[m]);
    }
}

/* scratch: FXQ_PACKED_BYTES of unpacked weights, or 64 outputs where those are more. */
static void matmul_groups(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                          void *scratch) {
    const int64_t rows = job->x->rows, depth = job->x->depth;
    const int64_t block_bytes = GROUP_OUTPUTS * (depth * GROUP_VALUE_BYTES + job->x->groups * (int64_t)sizeof(float));
    const bool streams = !to->addend && is_streamed(rows, job->weight->outputs);
    int64_t chunk = GROUP_OUTPUTS; /* in the L1 cache, if no other rows need it again */
    if (rows > GROUPED_ROWS || streams) chunk = FXQ_PACKED_BYTES / (4 * block_bytes) * STREAM_OUTPUTS;
    if (chunk == 0) chunk = STREAM_OUTPUTS;
    _Alignas(64) float carried[STREAM_ROWS][16];
    for (int64_t m = 0; m < rows; m += STREAM_ROWS) {
        const int64_t m_end = rows - m < STREAM_ROWS ? rows : m + STREAM_ROWS;
        for (int64_t first = n0; first < n1; first += chunk) {
            const int64_t end = n1 - first < chunk ? n1 : first + chunk;
            for (int64_t n = first, at = 0; n < end; n += GROUP_OUTPUTS, at += block_bytes) {
                unpack_group_block(job->weight, n, n1 - n, (char *)scratch + at);
            }
            const int64_t width = streams ? STREAM_OUTPUTS : chunk;
            for (int64_t m0 = m; m0 < m_end; m0 += GROUPED_ROWS) {
                for (int64_t n = first; n < end; n += width) {
                    const struct fxq_target part = fxq_target_at(to, m0, n - n0);
                    struct group_strip strip = {.job = job,
                                                .to = &part,
                                                .n0 = n,
                                                .n1 = end - n < width ? end : n + width,
                                                .m0 = m0,
                                                .m1 = m_end - m0 < GROUPED_ROWS ? m_end : m0 + GROUPED_ROWS,
                                                .depth = depth,
                                                .blocks =
                                                    (const char *)scratch + (n - first) / GROUP_OUTPUTS * block_bytes,
                                                .block_bytes = block_bytes};
                    strip.tiles = (strip.n1 - n + GROUP_OUTPUTS - 1) / GROUP_OUTPUTS * ((strip.m1 - m0 + 15) / 16);
                    const struct streamed_block block = streamed_block_at(n, n0, n1);
                    if (streams) stream_strip(&strip, &block, carried + m0 - m);
                    else multiply_strip(&strip);
                }
            }
        }
    }
    if (streams) _mm_sfence();
}
#define FXQ_GROUPS .quantize_groups = quantize_groups, .matmul_groups = matmul_groups
