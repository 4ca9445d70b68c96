/* The packed gemm in tiles. Expects: packing-inl.h, tiled-inl.h, stream-inl.h, and a tile product that the includer
 * defines:
 *
 * static void multiply_packed(const uint8_t *q, int64_t depth, int blocks, const int8_t *w, int32_t
 * (*c)[PACKED_OUTPUTS], struct finished_rows *earlier);
 *
 * gives c = 16 * blocks (blocks <= 2) rows of q, `depth` bytes apart, by 64 outputs; meanwhile it calls
 * finish_rows(earlier, ...) now and then, as in tiled-inl.h.
 *
 * So many rows repay a copy of the weights that has four columns of 64 outputs in 256 bytes, [depth / 4][64][4]: then
 * lanes are outputs, a finished row leaves without being transposed, and the weights' sums come with the packing. The
 * copy is made for some outputs at a time, which stay in the L2 cache while many rows pass. Large outputs are streamed:
 * see stream-inl.h. */

enum {
    STREAMED_ROWS = 48,   /* repay the packing where outputs are streamed, */
    UNSTREAMED_ROWS = 256 /* and where they are not */
};

static bool packs_weight(int64_t rows, int64_t columns, int64_t outputs) {
    return fxq_uses(FXQ_PACKED, rows >= (is_streamed(rows, outputs) ? STREAMED_ROWS : UNSTREAMED_ROWS)) &&
           columns > 0 && columns <= MOST_GEMM_COLUMNS;
}

/* The rows of a block that wait for dequantization. */
struct finished_rows {
    const int32_t (*c)[PACKED_OUTPUTS];
    const struct fxq_row *row;
    struct outputs_16 outputs[4];
    __m512i pairs[4];
    int next, count;
    struct fxq_target to; /* of the first row */
    float (*carried)[16]; /* each row's last 16 outputs, or NULL: no streaming */
    struct streamed_block block;
};

FXQ_INLINE void finish_rows(struct finished_rows *e, int count) {
    for (; count > 0 && e->next < e->count; count--, e->next++) {
        const struct fxq_row row = e->row[e->next];
        const int32_t *c = e->c[e->next];
        const struct fxq_target to = fxq_target_at(&e->to, e->next, 0);
        __m512 y[4];
        FXQ_FOR(4, int i = 0; i < 4; i++) {
            const __m512i sums = correct(_mm512_load_si512(c + 16 * i), e->pairs[i], row.zero_pair);
            y[i] = dequantize_outputs(&e->outputs[i], sums, row.scale, to.addend ? to.addend + 16 * i : NULL);
        }
        if (e->carried) {
            stream_row(&e->block, y, to.out, e->carried[e->next]);
            continue;
        }
        FXQ_FOR(4, int i = 0; i < 4; i++) store_outputs(&e->outputs[i], y[i], to.out + 16 * i);
    }
}

static void multiply_packed(const uint8_t *q, int64_t depth, int blocks, const int8_t *w, int32_t (*c)[PACKED_OUTPUTS],
                            struct finished_rows *earlier);

/* What is the same for all blocks of a chunk of outputs [first, end) by rows [m0, m1). */
struct packed_chunk {
    const struct fxq_matmul *job;
    const struct fxq_target *to;
    int64_t n0, n1, first, end, m0, m1;
    const int8_t *packed;
    const int32_t *pairs;
    float (*carried)[16];
};

FXQ_INLINE struct finished_rows begin_finish(const struct packed_chunk *p, int64_t m, int64_t n,
                                             const int32_t (*c)[PACKED_OUTPUTS]) {
    struct finished_rows e = {.c = c,
                              .row = p->job->x->row + m,
                              .count = (int)(p->m1 - m < 32 ? p->m1 - m : 32),
                              .to = fxq_target_at(p->to, m, n - p->n0),
                              .carried = p->carried ? p->carried + (m - p->m0) : NULL,
                              .block = streamed_block_at(n, p->n0, p->n1)};
    FXQ_FOR(4, int i = 0; i < 4; i++) {
        e.outputs[i] = begin_outputs(p->job, n + 16 * i, p->n1);
        e.pairs[i] = _mm512_load_si512(p->pairs + n - p->first + 16 * i);
    }
    return e;
}

static void multiply_chunk(const struct packed_chunk *p) {
    const struct fxq_activations *x = p->job->x;
    _Alignas(64) int32_t c[2][32][PACKED_OUTPUTS]; /* this block's sums and the last one's: 16 KiB, in the L1 cache */
    struct finished_rows earlier = {.count = 0};
    int parity = 0;
    for (int64_t m = p->m0; m < p->m1; m += 32) {
        const uint8_t *q = (const uint8_t *)x->packed + m * x->depth;
        for (int64_t n = p->first; n < p->end; n += PACKED_OUTPUTS, parity ^= 1) {
            const int8_t *w = p->packed + (n - p->first) * x->depth;
            multiply_packed(q, x->depth, p->m1 - m > 16 ? 2 : 1, w, c[parity], &earlier);
            finish_rows(&earlier, 32);
            earlier = begin_finish(p, m, n, (const int32_t (*)[PACKED_OUTPUTS])c[parity]);
        }
    }
    finish_rows(&earlier, 32);
}

/* scratch: FXQ_PACKED_BYTES, or one block of 64 outputs where that is more. */
static void matmul_packed(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                          void *scratch) {
    const int64_t depth = job->x->depth, rows = job->x->rows;
    const int64_t fits = FXQ_PACKED_BYTES / depth / PACKED_OUTPUTS * PACKED_OUTPUTS;
    const int64_t chunk = fxq_clamp(fits, PACKED_OUTPUTS, MOST_CHUNK_ROWS);
    _Alignas(64) int32_t pairs[MOST_CHUNK_ROWS];
    _Alignas(64) float carried[STREAM_ROWS][16];
    const bool streams = !to->addend && is_streamed(rows, job->weight->outputs);
    for (int64_t m = 0; m < rows; m += STREAM_ROWS) {
        const int64_t m1 = rows - m < STREAM_ROWS ? rows : m + STREAM_ROWS;
        for (int64_t first = n0; first < n1; first += chunk) {
            const int64_t end = n1 - first < chunk ? n1 : first + chunk;
            for (int64_t n = first; n < end; n += PACKED_OUTPUTS) {
                pack_block(job, n, n1, (int8_t *)scratch + (n - first) * depth, pairs + n - first);
            }
            const struct packed_chunk p = {.job = job,
                                           .to = to,
                                           .n0 = n0,
                                           .n1 = n1,
                                           .first = first,
                                           .end = end,
                                           .m0 = m,
                                           .m1 = m1,
                                           .packed = scratch,
                                           .pairs = pairs,
                                           .carried = streams ? carried : NULL};
            multiply_chunk(&p);
        }
    }
    if (streams) _mm_sfence();
}
