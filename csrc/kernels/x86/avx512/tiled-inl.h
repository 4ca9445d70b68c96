/* The tiled gemm (see common-inl.h). Expects: common-inl.h, and a tile product that the includer defines:
 *
 * static void multiply(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *b, int blocks, int tiles,
 *                      int32_t (*c)[256], struct epilogue *earlier, const int8_t *next);
 *
 * gives c[2 * i + j] = tile of outputs 16 i .. 16 i + 15 (i < tiles <= 4) by activation block j (j < blocks <= 2), each
 * [16 outputs][16 rows]; meanwhile it calls finish_tiles(earlier, ...) now and then, so that the stores and shuffles of
 * the last block fill the time in which this block waits for its tiles. next: the weights to come, or NULL when they
 * are in the L2 cache already. */

enum {
    BLOCK_ROWS = 64,         /* outputs of one step: 4 tiles */
    CHUNK_BYTES = 512 << 10, /* of weights that stay in the L2 cache while all activations pass */
    MOST_CHUNK_ROWS = 1024
};

/* The finished tiles of a block that wait for dequantization. */
struct epilogue {
    const struct fxq_matmul *job;
    const int32_t (*c)[256];
    int next, count, blocks; /* tiles in the order of c, but the second activation block first */
    int64_t n, n1, m;        /* first output, end of the outputs, first token */
    int32_t *pairs;          /* corrections of these outputs: see correct() */
    int ones;                /* in which row of the last activation block the ones are, or -1 */
    struct fxq_target to;    /* of (m, n) */
};

static void finish_tile(struct epilogue *e, int group, int block) {
    const int64_t n = e->n + 16 * group, rows = e->job->x->rows - e->m - 16 * block;
    const int32_t *c = e->c[2 * group + block];
    __m512i v[16];
    FXQ_FOR(16, int i = 0; i < 16; i++) v[i] = _mm512_load_si512(c + 16 * i);
    transpose_16x16(v);
    if (e->ones >= 0 && block == e->blocks - 1) {
        const __m512i column =
            _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
        const __m512i sums = _mm512_i32gather_epi32(column, c + e->ones, 4);
        _mm512_storeu_si512(e->pairs + 16 * group, make_pairs(sums));
    }
    const __m512i pairs = _mm512_loadu_si512(e->pairs + 16 * group);
    const struct outputs_16 o = begin_outputs(e->job, n, e->n1);
    const struct fxq_row *row = e->job->x->row + e->m + 16 * block;
    const struct fxq_target to = fxq_target_at(&e->to, 16 * block, 16 * group);
    FXQ_FOR(16, int i = 0; i < 16; i++) {
        if (i >= rows) break;
        __builtin_prefetch(to.out + i * to.out_stride + BLOCK_ROWS, 1); /* the line of the next block */
        const __m512i sums = correct(v[i], pairs, row[i].zero_pair);
        const __m512 y =
            dequantize_outputs(&o, sums, row[i].scale, to.addend ? to.addend + i * to.addend_stride : NULL);
        store_outputs(&o, y, to.out + i * to.out_stride);
    }
}

FXQ_INLINE void finish_tiles(struct epilogue *e, int count) {
    for (; count > 0 && e->next < e->count; count--, e->next++) {
        const int group = e->next / e->blocks;
        finish_tile(e, group, e->blocks - 1 - e->next % e->blocks);
    }
}

static void multiply(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *b, int blocks, int tiles,
                     int32_t (*c)[256], struct epilogue *earlier, const int8_t *next);

/* Outputs [n0, n1), few enough that their weights stay in the L2 cache, by tokens [m, m + 16 * blocks). */
static void matmul_strip(const struct fxq_matmul *job, struct weight_reader *reader, int64_t n0, int64_t n1, int64_t m,
                         int blocks, int32_t *pairs, int ones, const struct fxq_target *to) {
    const struct fxq_activations *x = job->x;
    _Alignas(64) int32_t c[2][8][256]; /* this block's tiles and the last one's: 16 KiB, in the L1 cache */
    struct epilogue earlier = {.count = 0};
    const bool is_new = m == 0 && !job->sums; /* sums are given for weights that are used again and again */
    int parity = 0;
    for (int64_t n = n0; n < n1; n += BLOCK_ROWS, parity ^= 1) {
        const int64_t left = n1 - n < BLOCK_ROWS ? n1 - n : BLOCK_ROWS;
        const int tiles = (int)(left + 15) / 16;
        int64_t stride;
        const int8_t *w = weight_rows(reader, n, 16 * (tiles + (tiles & 1)), &stride);
        multiply(w, stride, x->depth, (const uint8_t *)x->packed + m * x->depth, blocks, tiles, c[parity], &earlier,
                 is_new ? w + BLOCK_ROWS * stride : NULL);
        finish_tiles(&earlier, 8);
        earlier = (struct epilogue){.job = job,
                                    .c = (const int32_t (*)[256])c[parity],
                                    .count = tiles * blocks,
                                    .blocks = blocks,
                                    .n = n,
                                    .n1 = n1,
                                    .m = m,
                                    .pairs = pairs + (n - n0),
                                    .ones = ones,
                                    .to = fxq_target_at(to, m, n - n0)};
    }
    finish_tiles(&earlier, 8);
}

/* scratch: BLOCK_ROWS * depth bytes for the weight's end. */
static void matmul_tiled(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                         void *scratch) {
    const struct fxq_activations *x = job->x;
    struct weight_reader reader = read_weight(job->weight, scratch);
    _Alignas(64) int32_t pairs[MOST_CHUNK_ROWS + 16];
    const int64_t fits = CHUNK_BYTES / (x->depth ? x->depth : 1) / BLOCK_ROWS * BLOCK_ROWS;
    const int64_t chunk = fxq_clamp(fits, BLOCK_ROWS, MOST_CHUNK_ROWS);
    const int64_t blocks = (x->rows + 15) / 16;
    /* The ones' product comes with the last tokens; more than two blocks would need it before. */
    const int ones = blocks <= 2 && x->rows % 16 && !job->sums ? (int)(x->rows % 16) : -1;
    for (int64_t n = n0; n < n1; n += chunk) {
        const int64_t end = n1 - n < chunk ? n1 : n + chunk;
        if (ones < 0) {
            if (job->sums) memcpy(pairs, job->sums + n, (size_t)(end - n) * sizeof *pairs);
            else row_sums(job->weight, n, end, pairs, scratch);
            reader.copied = -1;
            for (int64_t i = 0; i < end - n; i += 16) {
                _mm512_store_si512(pairs + i, make_pairs(_mm512_load_si512(pairs + i)));
            }
        }
        for (int64_t block = 0; block < blocks; block += 2) {
            const int64_t m = 16 * block;
            const int count = blocks - block < 2 ? 1 : 2;
            const struct fxq_target target = fxq_target_at(to, 0, n - n0);
            matmul_strip(job, &reader, n, end, m, count, pairs, ones, &target);
        }
    }
}

/* 64 columns at a time: 16 rows of 64 bytes, then transposed as 16 x 16 groups of 4 bytes. Where the last block has
 * room, the row after the last is ones: its product is the weight's row sums, at no cost. */
static void quantize_tiles(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    __m512i *packed = (__m512i *)((uint8_t *)x->packed + first * x->depth);
    _Alignas(64) uint8_t part[16][64] = {{0}};
    for (int64_t k = 0; k < x->depth; k += 64) {
        const int64_t width = x->columns - k < 64 ? x->columns - k : 64;
        if (width < 64) memset(part, 0, sizeof part);
        for (int i = 0; i < count; i++) {
            quantize_values(rows[i] + k, width, &x->row[first + i], x->qmax, part[i]);
        }
        if (count < 16) memset(part[count], 1, (size_t)width);
        __m512i v[16];
        for (int i = 0; i < 16; i++) v[i] = _mm512_load_si512(part[i]);
        transpose_16x16(v);
        for (int i = 0; i < 16; i++) _mm512_store_si512(packed++, v[i]);
    }
}

static void quantize(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    set_scales(x, first, count, rows);
    (x->is_row_major || uses_gemv(x) ? quantize_row_major : quantize_tiles)(x, first, count, rows);
}
