/* Convolutions as products without an unfolded copy, for every instruction set; the products themselves are its own.
 *
 * Outputs are computed 64 at a time: their weights are packed, then all pixels pass, some beside each other a tile. A
 * pixel's window is a number of runs, each of values that lie together: see windows-inl.h. Sums become what is stored
 * here, in plain C that the compiler vectorizes.
 *
 * Expects: windows-inl.h, ending-inl.h; of the instruction set:
 *
 * TILE_PIXELS                    pixels that are multiplied at a time
 * REGISTERS_TOGETHER             whether the weights of a block's 16s of outputs alternate, or follow each other
 * pack_runs(rows, stride, count, columns, packed, step, sums)
 *                                `count` of 16 rows of weights, 4 columns of each to every `step` bytes; and their sums
 * multiply_pixels(tile, count, registers, at)
 *                                `count` pixels by 16 * registers outputs, and what becomes of their sums (end_pixels);
 *                                at: where the first one's outputs begin
 * end_pixel(ending, outputs, sums, at)
 *                                what becomes of a pixel's sums */

#define FXQ_STATIC .convolution_bytes = convolution_bytes, .convolve = convolve, FXQ_VALUES

enum { BLOCK_OUTPUTS = 64, LEAST_EVEN = 40 };

/* Windows of pixels beside each other, and the packed weights of a block. */
struct tile {
    const struct windows *windows;
    int64_t step, offsets[TILE_PIXELS]; /* of each one's windows; step: if all of them are so far apart, else 0 */
    const int8_t *weights;
    int64_t register_bytes; /* of 16 outputs' weights; 0: they alternate */
    const struct outputs_64 *outputs;
    const struct ending *ending;
    int64_t row; /* from one pixel's outputs to the next one's */
    /* Where to fetch weights that are needed soon, and how much further with each word of columns; or any place, and 0.
     */
    const int8_t *soon;
    int64_t soon_step;
};

FXQ_INLINE void pack_runs(const int8_t *rows, int64_t stride, int64_t count, int64_t columns, int8_t *packed,
                          int64_t step, int32_t *sums);
static void multiply_pixels(const struct tile *tile, int count, int registers, int64_t at);
FXQ_INLINE void end_pixel(const struct ending *e, const struct outputs_64 *o, const int32_t *sums, int64_t at);

static __attribute__((noinline)) void end_pixels(const struct tile *tile, int count, int32_t (*sums)[BLOCK_OUTPUTS],
                                                 int64_t at) {
    for (int i = 0; i < count; i++) end_pixel(tile->ending, tile->outputs, sums[i], at + i * tile->row);
}

/* One thread's part of a convolution: of one group of channels after another. */
struct part {
    const struct fxq_convolution *call;
    struct windows windows;
    struct ending ending;
    int8_t *rows, *packed; /* 64 outputs' weights: as they lie, where they must be gathered, and packed */
    int64_t depth;         /* of a window, each run in whole words of 4 */
    const int8_t *soon;    /* what is left to fetch of the next block's weights, */
    int64_t soon_bytes;    /* so much: they may have to come from memory */
};

/* The weights of `count` outputs as rows of runs: where they lie so, or copied. */
static const int8_t *gather_weights(const struct part *p, int64_t n, int64_t count) {
    const struct fxq_convolution *c = p->call;
    const int64_t *stride = c->weight_strides, *kernel = c->kernel, inputs = c->inputs / c->groups;
    const int64_t row = inputs * kernel[0] * kernel[1] * kernel[2];
    if (has_dense_windows(c)) return c->weight + n * row;
    int8_t *to = p->rows;
    const int8_t *weight = c->weight + n / (c->outputs / c->groups) * c->weight_skip;
    for (int64_t o = n; o < n + count; o++) {
        for (int64_t d = 0; d < kernel[0]; d++) {
            for (int64_t h = 0; h < kernel[1]; h++) {
                for (int64_t w = 0; w < kernel[2]; w++) {
                    const int8_t *from = weight + o * stride[0] + d * stride[2] + h * stride[3] + w * stride[4];
                    for (int64_t i = 0; i < inputs; i++) *to++ = from[i * stride[1]];
                }
            }
        }
    }
    return p->rows;
}

static void pack_outputs(const struct part *p, int64_t n, int64_t count, struct outputs_64 *outputs) {
    const struct windows *v = &p->windows;
    const int8_t *rows = gather_weights(p, n, count);
    const int64_t row = v->taps * v->run, run = v->run % 4 ? v->run : row;
    const int64_t registers = (count + 15) / 16, step = REGISTERS_TOGETHER ? 64 * registers : 64;
    for (int64_t r = 0; r < registers; r++) {
        int8_t *packed = p->packed + (REGISTERS_TOGETHER ? 64 * r : 16 * p->depth * r);
        int32_t *start = outputs->start + 16 * r;
        memset(start, 0, 16 * sizeof *start);
        for (int64_t k = 0; k < row; k += run, packed += (run + 3) / 4 * step) {
            pack_runs(rows + 16 * r * row + k, row, count - 16 * r, run, packed, step, start);
        }
        for (int i = 0; i < 16; i++) start[i] *= -p->call->x_scale.zero_point;
    }
}

static void begin_fetching(struct part *p, int64_t n, int64_t n1) {
    const int64_t row = p->windows.taps * p->windows.run, count = n1 - n < BLOCK_OUTPUTS ? n1 - n : BLOCK_OUTPUTS;
    const bool has_more = count > 0 && has_dense_windows(p->call);
    p->soon = p->call->weight + n * row;
    p->soon_bytes = has_more ? count * row : 0;
}

/* A line of the next block's weights with each word of this one's: they have come before the first pixels are over. */
static void fetch_soon(struct part *p, struct tile *tile) {
    const int64_t bytes = p->depth / 4 * 64;
    tile->soon = p->soon_bytes > 0 ? p->soon : p->packed;
    tile->soon_step = p->soon_bytes > 0 ? 64 : 0;
    p->soon += bytes;
    p->soon_bytes -= bytes;
}

/* `count` pixels of a segment by a block of outputs, from the one at the cursor on; pixel: of the output. even: whether
 * they are of one row. */
static void multiply_run(struct part *p, struct cursor *cursor, int64_t pixel, int64_t count, bool even,
                         const struct outputs_64 *outputs) {
    const int registers = (int)(outputs->width / 16);
    const int64_t tiles = (count + TILE_PIXELS - 1) / TILE_PIXELS;
    struct tile tile = {.windows = &p->windows,
                        .step = even ? cursor->step : 0,
                        .weights = p->packed,
                        .register_bytes = REGISTERS_TOGETHER ? 0 : 16 * p->depth,
                        .outputs = outputs,
                        .ending = &p->ending,
                        .row = p->call->outputs};
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t first = count * i / tiles, end = count * (i + 1) / tiles;
        if (even) tile.offsets[0] = cursor->offset + first * cursor->step;
        for (int64_t m = first; m < end && !even; m++, advance(cursor)) tile.offsets[m - first] = cursor->offset;
        fetch_soon(p, &tile);
        multiply_pixels(&tile, (int)(end - first), registers, (pixel + first) * tile.row + outputs->first);
    }
    if (even) cursor->offset += (count - 1) * cursor->step + cursor->turn;
}

/* Rows that are long enough are cut into tiles by themselves: then windows are evenly apart. Tiles of others may begin
 * in one row and end in the next. */
static void multiply_segment(struct part *p, const struct segment *s, const struct outputs_64 *outputs) {
    struct cursor cursor = begin_cursor(&p->windows, s);
    if (s->columns < LEAST_EVEN && s->columns < s->count) {
        multiply_run(p, &cursor, s->pixel, s->count, false, outputs);
        return;
    }
    for (int64_t m = 0; m < s->count; m += s->columns) {
        multiply_run(p, &cursor, s->pixel + m, s->columns, true, outputs);
    }
}

/* Pixels [p0, p1) by outputs [n0, n1), which are of one group. */
static void multiply_outputs(struct part *p, int64_t p0, int64_t p1, int64_t n0, int64_t n1) {
    struct outputs_64 outputs;
    for (int64_t n = n0; n < n1; n += BLOCK_OUTPUTS) {
        const int64_t count = n1 - n < BLOCK_OUTPUTS ? n1 - n : BLOCK_OUTPUTS;
        begin_outputs_64(p->call, n, count, &outputs);
        pack_outputs(p, n, count, &outputs);
        begin_fetching(p, n + BLOCK_OUTPUTS, n1);
        for (struct segment s = first_segment(&p->windows, p0, p1); s.count; s = next_segment(&p->windows, &s, p1)) {
            find_windows(&p->windows, &s, n / (p->call->outputs / p->call->groups));
            multiply_segment(p, &s, &outputs);
        }
    }
}

static int64_t convolution_bytes(const struct fxq_convolution *c) {
    const struct windows windows = plan_windows(c, NULL);
    const int64_t row = windows.taps * windows.run, depth = windows.taps * ((windows.run + 3) / 4 * 4);
    return windows.bytes + fxq_aligned(BLOCK_OUTPUTS * row) + fxq_aligned(BLOCK_OUTPUTS * depth) +
           (is_depthwise(c) ? depthwise_bytes(c) : 0);
}

/* Pixels [p0, p1) by outputs [n0, n1). */
static void convolve(const struct fxq_convolution *c, int64_t p0, int64_t p1, int64_t n0, int64_t n1, void *scratch) {
    struct part p = {.call = c, .windows = plan_windows(c, scratch), .ending = begin_ending(c)};
    p.rows = (int8_t *)scratch + p.windows.bytes;
    p.packed = p.rows + fxq_aligned(BLOCK_OUTPUTS * p.windows.taps * p.windows.run);
    p.depth = p.windows.taps * ((p.windows.run + 3) / 4 * 4);
    if (is_depthwise(c)) {
        convolve_channels(&p.windows, &p.ending, p0, p1, n0, n1, p.rows);
        return;
    }
    const int64_t size = c->outputs / c->groups;
    for (int64_t n = n0, end; n < n1; n = end) {
        end = (n / size + 1) * size < n1 ? (n / size + 1) * size : n1;
        multiply_outputs(&p, p0, p1, n, end);
    }
}
