/* The packed gemm in vpdpbusd: tiles of up to 6 tokens by 64 outputs, whose sums stay in registers until they leave as
 * floats. A thread packs the weights of 64 outputs, then all tokens pass. Meanwhile the next 64 outputs' weights and
 * the places of their results are fetched: they may have to come from memory.
 *
 * Expects: packing-inl.h, stream-inl.h. */

enum {
    TILE_TOKENS = 6, /* by 64 outputs: 24 accumulators, 4 registers of weights, one of activations */
    MANY_TILES = 16
};

/* 64 outputs. */
struct packed_block {
    const struct fxq_matmul *job;
    const int8_t *weights; /* packed */
    const int8_t *next;    /* the weights of the block after this one, as they lie, */
    int64_t step, lines;   /* of which so many lines are to be fetched after so many columns of a tile */
    struct outputs_16 outputs[4];
    __m512i pairs[4];
    bool streams;
    struct streamed_block streamed;
};

FXQ_INLINE void finish_token(const struct packed_block *b, const struct fxq_row *row, const __m512i sums[4],
                             const struct fxq_target *to, float *carried) {
    __m512 y[4];
    FXQ_FOR(4, int j = 0; j < 4; j++) {
        const __m512i whole = correct(sums[j], b->pairs[j], row->zero_pair);
        y[j] = dequantize_outputs(&b->outputs[j], whole, row->scale, to->addend ? to->addend + 16 * j : NULL);
    }
    if (b->streams) {
        stream_row(&b->streamed, y, to->out, carried);
        return;
    }
    FXQ_FOR(4, int j = 0; j < 4; j++) {
        store_outputs(&b->outputs[j], y[j], to->out + 16 * j);
        __builtin_prefetch(to->out + PACKED_OUTPUTS + 16 * j, 1);
    }
}

/* `count` tokens (a constant) from m on; `first` of them come before. to: of the first token of all. */
FXQ_INLINE void multiply_tile_of(const struct packed_block *b, int64_t m, int count, const struct fxq_target *to,
                                 float (*carried)[16], const int8_t **next) {
    const struct fxq_activations *x = b->job->x;
    const int64_t depth = x->depth, columns = (x->columns + 3) / 4 * 4;
    const uint8_t *q = (const uint8_t *)x->packed + m * depth;
    __m512i sums[TILE_TOKENS][4];
    FXQ_FOR(24, int i = 0; i < 4 * count; i++) sums[i / 4][i % 4] = _mm512_setzero_si512();
    for (int64_t k = 0; k < columns; k += b->step) {
        const int64_t left = columns - k < b->step ? columns - k : b->step;
        for (int64_t i = 0; i < b->lines; i++, *next += 64) _mm_prefetch((const char *)*next, _MM_HINT_T0);
        add_packed(q + k, depth, count, b->weights + k * PACKED_OUTPUTS, left, sums);
    }
    FXQ_FOR(6, int i = 0; i < count; i++) {
        const struct fxq_target at = fxq_target_at(to, m + i, 0);
        finish_token(b, &x->row[m + i], sums[i], &at, carried[i]);
    }
}

static void multiply_block(const struct packed_block *b, int64_t m0, int64_t m1, const struct fxq_target *to,
                           float (*carried)[16]) {
    const int64_t tiles = (m1 - m0 + TILE_TOKENS - 1) / TILE_TOKENS;
    const int8_t *next = b->next;
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t m = m0 + (m1 - m0) * i / tiles, end = m0 + (m1 - m0) * (i + 1) / tiles;
        float (*c)[16] = carried + (m - m0);
        switch (end - m) {
            case 6: multiply_tile_of(b, m, 6, to, c, &next); break;
            case 5: multiply_tile_of(b, m, 5, to, c, &next); break;
            case 4: multiply_tile_of(b, m, 4, to, c, &next); break;
            case 3: multiply_tile_of(b, m, 3, to, c, &next); break;
            case 2: multiply_tile_of(b, m, 2, to, c, &next); break;
            default: multiply_tile_of(b, m, 1, to, c, &next);
        }
    }
}

/* What is fetched while `tiles` tiles are multiplied. Few tiles: in small parts, since many lines at once would have to
 * wait for each other; many: now and then. */
static void plan_fetches(struct packed_block *b, int64_t n, int64_t n1, int64_t tiles) {
    const int64_t columns = b->job->x->columns, lines = n + 2 * PACKED_OUTPUTS <= n1 ? columns : 0;
    b->next = (const int8_t *)b->job->weight->data + (n + PACKED_OUTPUTS) * columns;
    b->step = tiles < MANY_TILES ? 64 : columns + 3;
    const int64_t steps = tiles * ((columns + b->step - 1) / b->step);
    b->lines = lines ? (lines + steps - 1) / steps : 0;
}

/* scratch: 64 outputs' weights. */
static void matmul_packed(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                          void *scratch) {
    const int64_t rows = job->x->rows;
    _Alignas(64) int32_t pairs[PACKED_OUTPUTS];
    _Alignas(64) float carried[STREAM_ROWS][16];
    struct packed_block b = {
        .job = job, .weights = scratch, .streams = !to->addend && is_streamed(rows, job->weight->outputs)};
    for (int64_t m = 0; m < rows; m += STREAM_ROWS) {
        const int64_t end = rows - m < STREAM_ROWS ? rows : m + STREAM_ROWS;
        for (int64_t n = n0; n < n1; n += PACKED_OUTPUTS) {
            const struct fxq_target at = fxq_target_at(to, 0, n - n0);
            pack_block(job, n, n1, scratch, pairs);
            plan_fetches(&b, n, n1, (end - m + TILE_TOKENS - 1) / TILE_TOKENS);
            b.streamed = streamed_block_at(n, n0, n1);
            FXQ_FOR(4, int j = 0; j < 4; j++) {
                b.outputs[j] = begin_outputs(job, n + 16 * j, n1);
                b.pairs[j] = _mm512_load_si512(pairs + 16 * j);
            }
            multiply_block(&b, m, end, &at, carried);
        }
    }
    if (b.streams) _mm_sfence();
}
