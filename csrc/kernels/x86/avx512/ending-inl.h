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

/* Sixteen results in float, before bounds or a curve. */
FXQ_INLINE __m512 real_16(const struct ending *e, const struct outputs_64 *o, int n, __m512i sums, __m512i addend,
                          bool adds) {
    __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_load_ps(o->scale + n));
    y = _mm512_add_ps(y, _mm512_load_ps(o->bias + n));
    if (adds) {
        addend = _mm512_sub_epi32(addend, _mm512_set1_epi32(e->of.addend_scale.zero_point));
        y = _mm512_add_ps(y, _mm512_mul_ps(_mm512_cvtepi32_ps(addend), _mm512_set1_ps(e->of.addend_scale.scale)));
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
    return round_16(e, real_16(e, o, n, sums, addend, adds));
}

/* What end_16 gives where there is a curve, of all 64: for itself, so that endings without one stay short. */
struct integers_64 {
    __m512i of[4];
};
static __attribute__((noinline)) struct integers_64 end_curved_64(const struct ending *e, const struct outputs_64 *o,
                                                                  struct integers_64 sums, struct integers_64 addend,
                                                                  bool adds) {
    __m512 y[4];
    FXQ_FOR(4, int j = 0; j < 4; j++) y[j] = real_16(e, o, 16 * j, sums.of[j], addend.of[j], adds);
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

FXQ_INLINE void unpack_bytes(__m512i bytes, __m512i q[4]) {
    const __m512i zero = _mm512_setzero_si512(), low = _mm512_unpacklo_epi8(bytes, zero),
                  high = _mm512_unpackhi_epi8(bytes, zero);
    q[0] = _mm512_unpacklo_epi16(low, zero);
    q[1] = _mm512_unpackhi_epi16(low, zero);
    q[2] = _mm512_unpacklo_epi16(high, zero);
    q[3] = _mm512_unpackhi_epi16(high, zero);
}

/* The order of four registers' words, and back: it is its own inverse. */
FXQ_INLINE __m512i turn_words(__m512i bytes) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}

/* turns: whether a register has 16 outputs beside each other; adds, turns: constants wherever this is inlined. */
FXQ_INLINE void end_64(const struct ending *e, const struct outputs_64 *o, const __m512i sums[4], int64_t at, bool adds,
                       bool turns) {
    const __mmask64 lanes = o->count == 64 ? ~(__mmask64)0 : ((__mmask64)1 << o->count) - 1;
    __m512i q[4], addend[4] = {_mm512_setzero_si512()};
    if (adds) {
        const uint8_t *from = e->of.addend + at;
        __m512i bytes = o->count == 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(lanes, from);
        unpack_bytes(turns ? turn_words(bytes) : bytes, addend);
    }
    end_registers(e, o, sums, addend, adds, o->width, q);
    const __m512i bytes = turns ? turn_words(pack_bytes(q)) : pack_bytes(q);
    uint8_t *y = (uint8_t *)e->y + at;
    if (o->count == 64) _mm512_storeu_si512(y, bytes);
    else _mm512_mask_storeu_epi8(y, lanes, bytes);
}

FXQ_INLINE void end_bytes(const struct ending *e, const struct outputs_64 *o, const __m512i sums[4], int64_t at,
                          bool turns) {
    if (e->of.addend) end_64(e, o, sums, at, true, turns);
    else end_64(e, o, sums, at, false, turns);
}
