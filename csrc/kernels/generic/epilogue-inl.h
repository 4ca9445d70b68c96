/* The last steps of an output: from its sum to what is stored. In plain C, for kernels whose sums are in memory;
 * registers of x86 have epilogues of their own.
 *
 * y = ((sum * (row_scale * scale)) + bias) + addend, then relu, each step rounded by itself: fxquant/ops/.
 *
 * Expects: nothing. */

/* Outputs [n, n + count) of row m, from sums as floats; those of floats have no scale. The addend may be the output
 * itself. */
FXQ_INLINE void finish_sums(const struct fxq_matmul *job, const struct fxq_target *to, int64_t m, int64_t n, int64_t n0,
                            int64_t count, const float *sums) {
    const struct fxq_target row = fxq_target_at(to, m, n - n0);
    const float *scale = job->weight->scale, row_scale = scale ? job->x->row[m].scale : 1.0f;
    for (int64_t i = 0; i < count; i++) {
        float y = sums[i];
        if (scale) y *= row_scale * scale[n + i];
        if (job->bias) y += job->bias[n + i];
        if (row.addend) y += row.addend[i];
        if (job->relu) y = y < 0.0f ? 0.0f : y;
        row.out[i] = y;
    }
}
