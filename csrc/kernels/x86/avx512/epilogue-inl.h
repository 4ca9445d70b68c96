/* The last steps of 16 outputs of a row: from sums to what is stored.
 *
 * correct() takes the zero point out of integer sums; scale_outputs() makes floats of them, plus bias and addend;
 * begin_outputs() and end_outputs() are the same for sums over groups, which scale themselves. Whatever becomes of an
 * output after that (relu, another dtype) belongs in end_outputs() and store_outputs().
 *
 * Expects: first_lanes() of common-inl.h. */

/* A row sum s as two 16-bit halves, s = 128 * high + low with 0 <= low < 128: then one vpdpwssd with the row's
 * zero_pair,
 * (-zero_point, -128 * zero_point), subtracts s * zero_point exactly. |high| < 2^15 up to 32768 columns. */
FXQ_INLINE __m512i make_pairs(__m512i sums) {
    const __m512i low = _mm512_and_si512(sums, _mm512_set1_epi32(127));
    return _mm512_or_si512(_mm512_slli_epi32(_mm512_srai_epi32(sums, 7), 16), low);
}

FXQ_INLINE __m512i correct(__m512i sums, __m512i pairs, int32_t zero_pair) {
    return _mm512_dpwssd_epi32(sums, pairs, _mm512_set1_epi32(zero_pair));
}

struct outputs_16 {
    bool relu;
    __mmask16 lanes;
    __m512 scale, bias;
};

/* Outputs [n, n + 16), as far as n1. Floats and grouped weights have no scale here. */
FXQ_INLINE struct outputs_16 begin_outputs(const struct fxq_matmul *job, int64_t n, int64_t n1) {
    const __m512 no_bias = _mm512_set1_ps(-0.0f); /* y + -0 is y, to the bit */
    struct outputs_16 o = {job->relu, first_lanes(n1 - n), _mm512_setzero_ps(), no_bias};
    if (!job->weight->group && job->weight->scale)
        o.scale = _mm512_maskz_loadu_ps(o.lanes, (const float *)job->weight->scale + n);
    if (job->bias) o.bias = _mm512_mask_loadu_ps(o.bias, o.lanes, job->bias + n);
    return o;
}

FXQ_INLINE __m512 end_outputs(const struct outputs_16 *o, __m512 y) {
    return o->relu ? _mm512_max_ps(_mm512_setzero_ps(), y) : y; /* the second operand where one is NaN */
}

FXQ_INLINE void store_outputs(const struct outputs_16 *o, __m512 y, float *out) {
    _mm512_mask_storeu_ps(out, o->lanes, y);
}

FXQ_INLINE __m512 add_bias(const struct outputs_16 *o, __m512 y, const float *addend) {
    y = _mm512_add_ps(y, o->bias);
    if (addend) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(o->lanes, addend));
    return end_outputs(o, y);
}

FXQ_INLINE __m512 scale_outputs(const struct outputs_16 *o, __m512 sums, float row_scale, const float *addend) {
    return add_bias(o, _mm512_mul_ps(sums, _mm512_mul_ps(_mm512_set1_ps(row_scale), o->scale)), addend);
}

FXQ_INLINE __m512 dequantize_outputs(const struct outputs_16 *o, __m512i sums, float row_scale, const float *addend) {
    return scale_outputs(o, _mm512_cvtepi32_ps(sums), row_scale, addend);
}

/* What sums over groups begin with: the addend, or the bias. */
FXQ_INLINE __m512 begin_sum(const struct outputs_16 *o, const float *addend) {
    return addend ? _mm512_maskz_loadu_ps(o->lanes, addend) : o->bias;
}

/* Outputs [n, n + count) of row m, from sums in memory: of floats without scales. */
FXQ_INLINE void finish_sums(const struct fxq_matmul *job, const struct fxq_target *to, int64_t m, int64_t n, int64_t n0,
                            int64_t count, const float *sums) {
    const struct fxq_target row = fxq_target_at(to, m, n - n0);
    for (int64_t i = 0; i < count; i += 16) {
        const struct outputs_16 o = begin_outputs(job, n + i, n + count);
        const float *addend = row.addend ? row.addend + i : NULL;
        const __m512 v = _mm512_maskz_loadu_ps(o.lanes, sums + i);
        store_outputs(&o,
                      job->weight->scale ? scale_outputs(&o, v, job->x->row[m].scale, addend) : add_bias(&o, v, addend),
                      row.out + i);
    }
}
