/* Depthwise sums in plain C: 64 channels beside each other, which the compiler vectorizes.
 *
 * Expects: depthwise-inl.h. */
FXQ_INLINE int channel_at(int i) { return i; }

FXQ_INLINE int64_t packed_taps(int64_t taps) { return taps; }

static void pack_channels(const int8_t *weights, int64_t taps, int8_t *packed, int32_t *sums) {
    memcpy(packed, weights, (size_t)taps * 64);
    memset(sums, 0, 64 * sizeof *sums);
    for (int64_t t = 0; t < taps; t++) {
        for (int i = 0; i < 64; i++) sums[i] += weights[64 * t + i];
    }
}

/* Sixteen channels at a time, whose sums stay in registers. A product of uint8 and int8 fits into 16 bits, where there
 * are twice as many a register. */
static void convolve_pixel(const struct windows *v, const struct ending *e, const struct channel_block *block,
                           int64_t offset, int64_t at) {
    enum { TOGETHER = 16 };
    _Alignas(64) int32_t sums[64];
    const struct outputs_64 *o = &block->outputs;
    for (int64_t n = 0; n < o->count; n += TOGETHER) {
        int32_t own[TOGETHER];
        memcpy(own, o->start + n, sizeof own);
        for (int64_t t = 0; t < v->taps; t++) {
            const CONV_VALUE *restrict x = v->at[t] + offset + n;
            const int8_t *restrict w = block->packed + 64 * t + n;
            int16_t products[TOGETHER];
            for (int i = 0; i < TOGETHER; i++) products[i] = (int16_t)((int16_t)x[i] * (int16_t)w[i]);
            for (int i = 0; i < TOGETHER; i++) own[i] += products[i];
        }
        memcpy(sums + n, own, sizeof own);
    }
    end_plainly(e, o, sums, at);
}
