/* The last steps of 8 outputs of a row: from sums to what is stored.
 *
 * finish_outputs() takes the zero point out of integer sums and makes floats of them; end_outputs() is the rest, and
 * the place for whatever else may become of an output.
 *
 * Expects: FXQ_VALUE, and a target with AVX2 begun. */

struct outputs_8 {
    const struct fxq_matmul *job;
    const struct fxq_target *to;
    int64_t at;    /* n - n0 */
    bool is_whole; /* all 8 are outputs: masks are slow, a masked store takes 20 cycles on AMD's */
    __m256i lanes, row_sums;
    __m256 scale, bias;
};

FXQ_INLINE struct outputs_8 begin_outputs(const struct fxq_matmul *job, const struct fxq_target *to, int64_t n,
                                          int64_t n0, int64_t n1) {
    const __m256i left = _mm256_set1_epi32(n1 - n < 8 ? (int)(n1 - n) : 8);
    struct outputs_8 o = {.job = job, .to = to, .at = n - n0, .is_whole = n1 - n >= 8};
    o.row_sums = _mm256_setzero_si256();
    o.scale = o.bias = _mm256_setzero_ps();
    o.lanes = _mm256_cmpgt_epi32(left, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    if (job->weight->scale) o.scale = _mm256_maskload_ps((const float *)job->weight->scale + n, o.lanes);
    if (job->bias) o.bias = _mm256_maskload_ps(job->bias + n, o.lanes);
    return o;
}

/* y, plus bias and addend, to where outputs of row m belong. */
FXQ_INLINE void end_outputs(const struct outputs_8 *o, int64_t m, __m256 y) {
    const struct fxq_target to = fxq_target_at(o->to, m, o->at);
    if (o->job->bias) y = _mm256_add_ps(y, o->bias);
    if (to.addend)
        y = _mm256_add_ps(y, o->is_whole ? _mm256_loadu_ps(to.addend) : _mm256_maskload_ps(to.addend, o->lanes));
    if (o->job->relu) y = _mm256_max_ps(_mm256_setzero_ps(), y); /* the second operand where one is NaN */
    if (o->is_whole) _mm256_storeu_ps(to.out, y);
    else _mm256_maskstore_ps(to.out, o->lanes, y);
}

FXQ_INLINE __m256 scale_sums(const struct outputs_8 *o, int64_t m, __m256 sums) {
    return _mm256_mul_ps(sums, _mm256_mul_ps(_mm256_set1_ps(o->job->x->row[m].scale), o->scale));
}

FXQ_INLINE void finish_outputs(const struct outputs_8 *o, int64_t m, __m256i sums) {
    if (sizeof(FXQ_VALUE) == 1) {
        sums = _mm256_sub_epi32(sums, _mm256_mullo_epi32(_mm256_set1_epi32(o->job->x->row[m].zero_point), o->row_sums));
    }
    end_outputs(o, m, scale_sums(o, m, _mm256_cvtepi32_ps(sums)));
}

/* Outputs [n, n + count) of row m, from sums in memory: of floats without scales. */
FXQ_INLINE void finish_sums(const struct fxq_matmul *job, const struct fxq_target *to, int64_t m, int64_t n, int64_t n0,
                            int64_t count, const float *sums) {
    for (int64_t i = 0; i < count; i += 8) {
        const struct outputs_8 o = begin_outputs(job, to, n + i, n0, n + count);
        const __m256 v = _mm256_maskload_ps(sums + i, o.lanes);
        end_outputs(&o, m, job->weight->scale ? scale_sums(&o, m, v) : v);
    }
}
