/* What becomes of the sums of static products, for uint8 outputs: 64 of a pixel at a time, in registers. From C's loops
 * gcc makes 128-bit instructions, since outputs are bytes.
 *
 * Expects: common-inl.h, exponentials-inl.h, generic/ending-inl.h. */

/* A value of a curve of each, as curve_of; exp(-y) - 1 as exp_minus_1. */
FXQ_INLINE void curve_64(__m512 y[4], enum fxq_curve curve, float slope) {
    const __m512 zero = _mm512_setzero_ps();
    if (curve == FXQ_LEAKY_RELU) {
        FXQ_FOR(4, int j = 0; j < 4; j++) {
            const __mmask16 is_above = _mm512_cmp_ps_mask(y[j], zero, _CMP_GT_OQ);
            y[j] = _mm512_mask_mov_ps(_mm512_mul_ps(y[j], _mm512_set1_ps(slope)), is_above, y[j]);
        }
    } else if (curve == FXQ_SILU) {
        struct exponentials e;
        FXQ_FOR(4, int j = 0; j < 4; j++) e.x[j] = _mm512_sub_ps(_mm512_set1_ps(-0.0f), y[j]);
        exp_minus_1_of(&e, 4);
        FXQ_FOR(4, int j = 0; j < 4; j++) y[j] = _mm512_div_ps(y[j], _mm512_add_ps(e.x[j], _mm512_set1_ps(2.0f)));
    } else {
        FXQ_FOR(4, int j = 0; j < 4; j++) {
            const __m512 part = _mm512_max_ps(_mm512_add_ps(y[j], _mm512_set1_ps(3.0f)), zero);
            y[j] = _mm512_mul_ps(y[j], _mm512_min_ps(part, _mm512_set1_ps(6.0f)));
            y[j] = _mm512_mul_ps(y[j], _mm512_set1_ps((float)(1.0 / 6.0)));
        }
    }
}

/* What an ending's sums share, in registers. */
struct shared_16 {
    __m512 addend_zero, addend_scale, inverse; /* addend_zero: 2^23 more */
    __m512i zero_point;                        /* as 32 words */
};

FXQ_INLINE struct shared_16 share(const struct ending *e) {
    return (struct shared_16){_mm512_set1_ps(0x1p23f + (float)e->of.addend_scale.zero_point),
                              _mm512_set1_ps(e->of.addend_scale.scale), _mm512_set1_ps(e->inverse),
                              _mm512_set1_epi16((int16_t)e->of.scale.zero_point)};
}

/* Sixteen results in float, before bounds or a curve. addend: of unpack_bytes. */
FXQ_INLINE __m512 real_16(const struct shared_16 *all, const struct outputs_64 *o, int n, __m512i sums, __m512i addend,
                          bool adds) {
    __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_load_ps(o->scale + n));
    y = _mm512_add_ps(y, _mm512_load_ps(o->bias + n));
    if (adds) {
        const __m512 real = _mm512_sub_ps(_mm512_castsi512_ps(addend), all->addend_zero); /* exactly */
        y = _mm512_add_ps(y, _mm512_mul_ps(real, all->addend_scale));
    }
    return y;
}

/* Sixteen values of y / scale, rounded, with the zero point. */
FXQ_INLINE __m512i round_16(const struct ending *e, __m512 y) {
    __m512 t = _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(y, y, _CMP_ORD_Q), y, _mm512_set1_ps(e->inverse));
    t = _mm512_min_ps(_mm512_max_ps(t, _mm512_set1_ps(e->least)), _mm512_set1_ps(e->most));
    const __m512i q = _mm512_cvt_roundps_epi32(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_add_epi32(q, _mm512_set1_epi32(e->of.scale.zero_point));
}

FXQ_INLINE __m512i end_16(const struct ending *e, const struct outputs_64 *o, int n, __m512i sums, __m512i addend,
                          bool adds) {
    const struct shared_16 all = share(e);
    return round_16(e, real_16(&all, o, n, sums, addend, adds));
}

/* What end_16 gives where there is a curve, of all 64: for itself, so that endings without one stay short. */
struct integers_64 {
    __m512i of[4];
};
static __attribute__((noinline)) struct integers_64 end_curved_64(const struct ending *e, const struct outputs_64 *o,
                                                                  struct integers_64 sums, struct integers_64 addend,
                                                                  bool adds) {
    const struct shared_16 all = share(e);
    __m512 y[4];
    FXQ_FOR(4, int j = 0; j < 4; j++) y[j] = real_16(&all, o, 16 * j, sums.of[j], addend.of[j], adds);
    curve_64(y, e->of.curve, e->of.slope);
    FXQ_FOR(4, int j = 0; j < 4; j++) sums.of[j] = round_16(e, y[j]);
    return sums;
}

/* The integers of 64 sums, or of the first so many. */
FXQ_INLINE void end_registers(const struct ending *e, const struct outputs_64 *o, const __m512i sums[4],
                              const __m512i addend[4], bool adds, int64_t width, __m512i q[4]) {
    if (__builtin_expect(e->of.curve != FXQ_NO_CURVE, 0)) {
        const struct integers_64 all = {{sums[0], sums[1], sums[2], sums[3]}},
                                 more = {{addend[0], addend[1], addend[2], addend[3]}},
                                 ended = end_curved_64(e, o, all, more, adds);
        FXQ_FOR(4, int j = 0; j < 4; j++) q[j] = ended.of[j];
        return;
    }
    FXQ_FOR(4, int j = 0; j < 4; j++) {
        q[j] = 16 * j < width ? end_16(e, o, 16 * j, sums[j], addend[j], adds) : _mm512_setzero_si512();
    }
}

/* 4 times 16 integers as bytes: of each register the first 4, then the next 4, ... */
FXQ_INLINE __m512i pack_bytes(const __m512i q[4]) {
    return _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
}

/* And back, as floats of 2^23 + q: q is what is left of their bits once 2^23's are gone. */
FXQ_INLINE void unpack_bytes(__m512i bytes, __m512i q[4]) {
    const __m512i zero = _mm512_setzero_si512(), exponent = _mm512_set1_epi16(0x4b00),
                  low = _mm512_unpacklo_epi8(bytes, zero), high = _mm512_unpackhi_epi8(bytes, zero);
    q[0] = _mm512_unpacklo_epi16(low, exponent);
    q[1] = _mm512_unpackhi_epi16(low, exponent);
    q[2] = _mm512_unpacklo_epi16(high, exponent);
    q[3] = _mm512_unpackhi_epi16(high, exponent);
}

/* The order of four registers' words, and back: it is its own inverse. */
FXQ_INLINE __m512i turn_words(__m512i bytes) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}

FXQ_INLINE bool is_near(const struct ending *e, const struct outputs_64 *o) {
    return o->is_near && e->of.curve == FXQ_NO_CURVE;
}

/* The bytes of 64 sums, or of the first so many, that are near: rounded first, since then bytes' own limits clamp, and
 * what may be left of the bounds is one maximum and one minimum of all 64. */
FXQ_INLINE __m512i near_bytes(const struct ending *e, const struct shared_16 *all, const struct outputs_64 *o,
                              const __m512i sums[4], const __m512i addend[4], bool adds, int64_t width) {
    __m512i q[4];
    FXQ_FOR(4, int j = 0; j < 4; j++) {
        q[j] = _mm512_setzero_si512();
        if (16 * j >= width) continue;
        const __m512 t = _mm512_mul_ps(real_16(all, o, 16 * j, sums[j], addend[j], adds), all->inverse);
        q[j] = _mm512_cvt_roundps_epi32(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(q[0], q[1]), all->zero_point),
                  high = _mm512_adds_epi16(_mm512_packs_epi32(q[2], q[3]), all->zero_point);
    const __m512i bytes = _mm512_packus_epi16(low, high);
    if (!e->clamps) return bytes;
    return _mm512_min_epu8(_mm512_max_epu8(bytes, _mm512_set1_epi8((char)e->lowest)),
                           _mm512_set1_epi8((char)e->highest));
}

/* The addend of 64 outputs as floats, or that of the first so many. */
FXQ_INLINE void load_addend(const struct ending *e, const struct outputs_64 *o, int64_t at, bool turns,
                            __m512i addend[4]) {
    const uint8_t *from = e->of.addend + at;
    const __mmask64 lanes = ~(__mmask64)0 >> (64 - o->count);
    const __m512i bytes = o->count == 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(lanes, from);
    unpack_bytes(turns ? turn_words(bytes) : bytes, addend);
}

FXQ_INLINE void store_bytes(const struct ending *e, const struct outputs_64 *o, int64_t at, __m512i bytes) {
    uint8_t *y = (uint8_t *)e->y + at;
    if (o->count == 64) _mm512_storeu_si512(y, bytes);
    else _mm512_mask_storeu_epi8(y, ~(__mmask64)0 >> (64 - o->count), bytes);
}

/* turns: whether a register has 16 outputs beside each other; adds, turns: constants wherever this is inlined. */
FXQ_INLINE void end_64(const struct ending *e, const struct outputs_64 *o, const __m512i sums[4], int64_t at, bool adds,
                       bool turns) {
    __m512i q[4], addend[4] = {_mm512_setzero_si512()};
    if (adds) load_addend(e, o, at, turns, addend);
    __m512i bytes;
    if (is_near(e, o)) {
        const struct shared_16 all = share(e);
        bytes = near_bytes(e, &all, o, sums, addend, adds, o->width);
    } else {
        end_registers(e, o, sums, addend, adds, o->width, q);
        bytes = pack_bytes(q);
    }
    store_bytes(e, o, at, turns ? turn_words(bytes) : bytes);
}

FXQ_INLINE void end_bytes(const struct ending *e, const struct outputs_64 *o, const __m512i sums[4], int64_t at,
                          bool turns) {
    if (e->of.addend) end_64(e, o, sums, at, true, turns);
    else end_64(e, o, sums, at, false, turns);
}

/* `count` pixels, `row` outputs apart, of 64 whole outputs whose sums are near; count: a constant wherever this is
 * inlined. */
FXQ_INLINE void end_near(const struct ending *e, const struct outputs_64 *o, __m512i (*sums)[4], int count, int64_t at,
                         int64_t row) {
    const struct shared_16 all = share(e);
    uint8_t *y = (uint8_t *)e->y + at;
    if (e->of.addend == NULL) {
        FXQ_FOR(6, int i = 0; i < count; i++) {
            const __m512i bytes = near_bytes(e, &all, o, sums[i], sums[i], false, 64);
            _mm512_storeu_si512(y + i * row, turn_words(bytes));
        }
        return;
    }
    const uint8_t *from = e->of.addend + at;
    FXQ_FOR(6, int i = 0; i < count; i++) {
        __m512i addend[4];
        unpack_bytes(turn_words(_mm512_loadu_si512(from + i * row)), addend);
        _mm512_storeu_si512(y + i * row, turn_words(near_bytes(e, &all, o, sums[i], addend, true, 64)));
    }
}

/* The same where they stay float. */
static void end_reals(const struct ending *e, const struct outputs_64 *o, const int32_t *sums, int64_t at) {
    __m512i addend[4] = {_mm512_setzero_si512()};
    __m512 y[4];
    const struct shared_16 all = share(e);
    if (e->of.addend) load_addend(e, o, at, true, addend);
    FXQ_FOR(4, int j = 0; j < 4; j++) {
        y[j] = real_16(&all, o, 16 * j, _mm512_load_si512(sums + 16 * j), addend[j], e->of.addend != NULL);
    }
    if (e->of.curve != FXQ_NO_CURVE) curve_64(y, e->of.curve, e->of.slope);
    FXQ_FOR(4, int j = 0; j < 4; j++) {
        const __m512 low = _mm512_set1_ps(e->of.low), high = _mm512_set1_ps(e->of.high);
        y[j] = _mm512_min_ps(high, _mm512_max_ps(low, y[j])); /* NaN, which comes second, stays */
        _mm512_mask_storeu_ps((float *)e->y + at + 16 * j, first_lanes(o->count - 16 * j), y[j]);
    }
}
