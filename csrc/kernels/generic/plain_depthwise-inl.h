/* Depthwise sums in plain C: 64 channels beside each other, which the compiler vectorizes.
 *
 * Expects: windows-inl.h. Included before depthwise-inl.h. */
FXQ_INLINE int channel_at(int i) { return i; }

FXQ_INLINE int64_t packed_taps(int64_t taps) { return taps; }

FXQ_INLINE void order_bytes(const uint8_t *bytes, uint8_t *out) { memcpy(out, bytes, 64); }

static void pack_channels(const int8_t *weights, int64_t taps, int8_t *packed, int32_t *sums) {
    memcpy(packed, weights, (size_t)taps * 64);
    memset(sums, 0, 64 * sizeof *sums);
    for (int64_t t = 0; t < taps; t++) {
        for (int i = 0; i < 64; i++) sums[i] += weights[64 * t + i];
    }
}

static void add_channels(const CONV_VALUE *const *at, int64_t offset, int64_t taps, const int8_t *packed,
                         int32_t *sums) {
    memset(sums, 0, 64 * sizeof *sums);
    for (int64_t t = 0; t < taps; t++) {
        const CONV_VALUE *restrict x = at[t] + offset;
        const int8_t *restrict w = packed + 64 * t;
        for (int i = 0; i < 64; i++) sums[i] += (int32_t)x[i] * w[i];
    }
}
