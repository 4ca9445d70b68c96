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

static void convolve_pixel(const struct windows *v, const struct ending *e, const struct channel_block *block,
                           int64_t offset, int64_t at) {
    _Alignas(64) int32_t sums[64];
    memcpy(sums, block->outputs.start, sizeof sums);
    for (int64_t t = 0; t < v->taps; t++) {
        const CONV_VALUE *restrict x = v->at[t] + offset;
        const int8_t *restrict w = block->packed + 64 * t;
        for (int i = 0; i < 64; i++) sums[i] += (int32_t)x[i] * w[i];
    }
    end_plainly(e, &block->outputs, sums, at);
}
