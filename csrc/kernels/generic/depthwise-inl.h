/* Depthwise convolutions: each channel by weights of its own, 64 channels of a pixel at a time.
 *
 * Expects: windows-inl.h, ending-inl.h; of the instruction set:
 *
 * channel_at(i)                            which of 64 channels the i-th sum is of
 * packed_taps(taps)                        bytes a channel that the next one writes
 * pack_channels(weights, taps, packed, sums)
 *                                          weights [taps][64] as the next one takes them, and the channels' sums
 * convolve_pixel(windows, ending, block, offset, at)
 *                                          64 channels of a pixel, from values `offset` from the segment's first on, to
 *                                          where their outputs begin
 * FXQ_PAIRS, convolve_pair(windows, ending, block, offsets, at)
 *                                          if there is such a function: half as many channels of two pixels, whose
 * block has everything twice */
enum { CHANNELS = 64 };

FXQ_INLINE int channel_at(int i);
FXQ_INLINE int64_t packed_taps(int64_t taps);
static void pack_channels(const int8_t *weights, int64_t taps, int8_t *packed, int32_t *sums);

/* 64 channels: their outputs, and the weights after it. */
struct channel_block {
    struct outputs_64 outputs;
    int8_t packed[];
};

static void convolve_pixel(const struct windows *v, const struct ending *e, const struct channel_block *block,
                           int64_t offset, int64_t at);
#ifdef FXQ_PAIRS
static void convolve_pair(const struct windows *v, const struct ending *e, const struct channel_block *block,
                          const int64_t offsets[2], const int64_t at[2]);
#endif

static int64_t channel_block_bytes(int64_t taps) {
    return fxq_aligned((int64_t)sizeof(struct channel_block) + packed_taps(taps) * CHANNELS);
}

/* The weights of 64 channels by tap, and the blocks of all. */
static int64_t depthwise_bytes(const struct fxq_convolution *c) {
    const int64_t taps = c->kernel[0] * c->kernel[1] * c->kernel[2], blocks = (c->outputs + CHANNELS - 1) / CHANNELS;
    return fxq_aligned(taps * CHANNELS) + blocks * channel_block_bytes(taps);
}

/* Weights [taps][channels] of channels [n0, n0 + count), the last ones 0. */
static void gather_channels(const struct fxq_convolution *c, int64_t n0, int64_t count, int8_t *to) {
    const int64_t *stride = c->weight_strides, *kernel = c->kernel, taps = kernel[0] * kernel[1] * kernel[2];
    for (int64_t t = 0; t < taps; t++, to += CHANNELS) {
        const int8_t *from = c->weight + t / (kernel[1] * kernel[2]) * stride[2] +
                             t / kernel[2] % kernel[1] * stride[3] + t % kernel[2] * stride[4] + n0 * stride[0];
        if (stride[0] == 1) memcpy(to, from, (size_t)count);
        else
            for (int64_t i = 0; i < count; i++) to[i] = from[i * stride[0]];
        memset(to + count, 0, (size_t)(CHANNELS - count));
        if (count <= CHANNELS / 2) memcpy(to + CHANNELS / 2, to, CHANNELS / 2); /* for pairs */
    }
}

/* Puts the scales and biases into the order of the sums. */
static void order_outputs(struct outputs_64 *o) {
    struct outputs_64 plain = *o;
    const int64_t half = o->count <= CHANNELS / 2 ? CHANNELS / 2 : CHANNELS; /* everything twice, for pairs */
    for (int64_t i = o->count; i < half; i++) plain.scale[i] = 0.0f, plain.bias[i] = -0.0f;
    for (int64_t i = half; i < CHANNELS; i++)
        plain.scale[i] = plain.scale[i - half], plain.bias[i] = plain.bias[i - half];
    for (int i = 0; i < CHANNELS; i++) {
        o->scale[i] = plain.scale[channel_at(i)];
        o->bias[i] = plain.bias[channel_at(i)];
    }
}

static void begin_channels(const struct fxq_convolution *c, int64_t n, int64_t n1, int64_t taps, int8_t *gathered,
                           struct channel_block *block) {
    struct outputs_64 *o = &block->outputs;
    begin_outputs_64(c, n, n1 - n < CHANNELS ? n1 - n : CHANNELS, o);
    gather_channels(c, n, o->count, gathered);
    pack_channels(gathered, taps, block->packed, o->start);
    for (int i = 0; i < CHANNELS; i++) o->start[i] *= -c->x_scale.zero_point;
    order_outputs(o);
    o->width = CHANNELS;
}

/* The pixels of a segment, `n` channels after the segment's first ones. */
static void convolve_block(const struct windows *v, const struct ending *e, const struct channel_block *block,
                           const struct segment *s, int64_t n) {
    struct cursor cursor = begin_cursor(v, s);
    const int64_t channels = v->call->outputs;
    int64_t m = 0;
#ifdef FXQ_PAIRS
    for (; block->outputs.count <= CHANNELS / 2 && !e->of.is_float && m + 2 <= s->count; m += 2) {
        int64_t offsets[2];
        for (int i = 0; i < 2; i++, advance(&cursor)) offsets[i] = cursor.offset + n;
        const int64_t at[2] = {(s->pixel + m) * channels + n, (s->pixel + m + 1) * channels + n};
        convolve_pair(v, e, block, offsets, at);
    }
#endif
    for (; m < s->count; m++, advance(&cursor)) {
        convolve_pixel(v, e, block, cursor.offset + n, (s->pixel + m) * channels + n);
    }
}

/* Pixels [p0, p1) of channels [n0, n1). */
static void convolve_channels(struct windows *v, const struct ending *e, int64_t p0, int64_t p1, int64_t n0, int64_t n1,
                              int8_t *scratch) {
    const struct fxq_convolution *c = v->call;
    const int64_t bytes = channel_block_bytes(v->taps);
    char *blocks = (char *)scratch + fxq_aligned(v->taps * CHANNELS);
    for (int64_t n = n0; n < n1; n += CHANNELS) {
        begin_channels(c, n, n1, v->taps, scratch, (struct channel_block *)(blocks + (n - n0) / CHANNELS * bytes));
    }
    for (struct segment s = first_segment(v, p0, p1); s.count; s = next_segment(v, &s, p1)) {
        find_windows(v, &s, 0);
        for (int64_t n = n0; n < n1; n += CHANNELS) {
            const struct channel_block *block = (struct channel_block *)(blocks + (n - n0) / CHANNELS * bytes);
            convolve_block(v, e, block, &s, n);
        }
    }
}
