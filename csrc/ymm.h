/* The product on 256-bit registers, around two functions that the includer defines for its instruction set:
 *
 * static __m128i dot_4x1(const struct group *g, int first, const FXQ_VALUE *a);
 * static void dot_4x2(const struct group *g, int first, const FXQ_VALUE *a, const FXQ_VALUE *b, __m128i sums[2]);
 *
 * give the sums of products of outputs first .. first + 3 of a group of 8 with one or two rows of activations. 4 x 2: 8
 * accumulators, 4 weights and 2 activations fit the 16 registers, and 6 loads serve 8 products. */

/* 8 outputs' weights. */
struct group {
    const void *weights; /* int8, or int16 when they are converted once for many rows */
    int64_t stride, depth;
    bool is_wide;
};

static __m128i dot_4x1(const struct group *g, int first, const FXQ_VALUE *a);
static void dot_4x2(const struct group *g, int first, const FXQ_VALUE *a, const FXQ_VALUE *b, __m128i sums[2]);

/* Lane i is the sum of the lanes of v[i]. */
FXQ_INLINE __m128i sum_4(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

FXQ_INLINE __m256i dot_8x1(const struct group *g, const FXQ_VALUE *a) {
    return _mm256_set_m128i(dot_4x1(g, 4, a), dot_4x1(g, 0, a));
}

FXQ_INLINE void dot_8x2(const struct group *g, const FXQ_VALUE *a, const FXQ_VALUE *b, __m256i sums[2]) {
    __m128i low[2], high[2];
    dot_4x2(g, 0, a, b, low);
    dot_4x2(g, 4, a, b, high);
    sums[0] = _mm256_set_m128i(high[0], low[0]);
    sums[1] = _mm256_set_m128i(high[1], low[1]);
}

/* What the last steps of 8 outputs need. */
struct outputs_8 {
    const struct fxq_matmul *job;
    const struct fxq_target *to;
    int64_t at; /* n - n0 */
    __m256i lanes, row_sums;
    __m256 scale, bias;
};

FXQ_INLINE struct outputs_8 begin_outputs(const struct fxq_matmul *job, const struct fxq_target *to, int64_t n,
                                          int64_t n0, int64_t n1) {
    const __m256i left = _mm256_set1_epi32(n1 - n < 8 ? (int)(n1 - n) : 8);
    struct outputs_8 o = {.job = job, .to = to, .at = n - n0};
    o.row_sums = _mm256_setzero_si256();
    o.bias = _mm256_setzero_ps();
    o.lanes = _mm256_cmpgt_epi32(left, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    o.scale = _mm256_maskload_ps(job->scale + n, o.lanes);
    if (job->bias) o.bias = _mm256_maskload_ps(job->bias + n, o.lanes);
    return o;
}

FXQ_INLINE void finish_outputs(const struct outputs_8 *o, int64_t m, __m256i sums) {
    const struct fxq_row *row = &o->job->x->row[m];
    if (sizeof(FXQ_VALUE) == 1) {
        sums = _mm256_sub_epi32(sums, _mm256_mullo_epi32(_mm256_set1_epi32(row->zero_point), o->row_sums));
    }
    __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_mul_ps(_mm256_set1_ps(row->scale), o->scale));
    if (o->job->bias) y = _mm256_add_ps(y, o->bias);
    const struct fxq_target *to = o->to;
    if (to->addend) y = _mm256_add_ps(y, _mm256_maskload_ps(to->addend + m * to->addend_stride + o->at, o->lanes));
    if (o->job->relu) y = _mm256_max_ps(_mm256_setzero_ps(), y); /* the second operand where one is NaN */
    _mm256_maskstore_ps(o->to->out + m * o->to->out_stride + o->at, o->lanes, y);
}

static void matmul_group(const struct fxq_matmul *job, const struct group *g, struct outputs_8 *o, int64_t n) {
    const struct fxq_activations *x = job->x;
    const FXQ_VALUE *a = x->packed, *extra = a + x->rows * x->depth;
    __m256i sums[2];
    if (sizeof(FXQ_VALUE) == 1) {
        if (job->sums) {
            o->row_sums = _mm256_maskload_epi32(job->sums + n, o->lanes);
        } else if (x->rows > 1) {
            o->row_sums = dot_8x1(g, extra);
        } else { /* the extra row is the zero point: its product is the whole correction */
            dot_8x2(g, a, extra, sums);
            finish_outputs(o, 0, _mm256_sub_epi32(sums[0], sums[1]));
            return;
        }
    }
    int64_t m = 0;
    for (; m + 2 <= x->rows; m += 2) {
        dot_8x2(g, a + m * x->depth, a + (m + 1) * x->depth, sums);
        finish_outputs(o, m, sums[0]);
        finish_outputs(o, m + 1, sums[1]);
    }
    if (m < x->rows) finish_outputs(o, m, dot_8x1(g, a + m * x->depth));
}

static void quantize(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    set_own_rows(x, first, count, rows);
    quantize_row_major(x, first, count, rows);
}
