/* The product on 256-bit registers, in two forms. Expects: row_major-inl.h, ymm_epilogue-inl.h, and these functions.
 *
 * gemv, few rows: the weights are read as they lie.
 *
 * static __m128i dot_4x1(const struct group *g, int first, const FXQ_VALUE *a);
 * static void dot_4x2(const struct group *g, int first, const FXQ_VALUE *a, const FXQ_VALUE *b, __m128i sums[2]);
 *
 * give the sums of products of outputs first .. first + 3 of a group of 8 with one or two tokens. 4 x 2: 8
 * accumulators, 4 weights and 2 activations fit the 16 registers, and 6 loads serve 8 products.
 *
 * Packed gemm, many rows: 16 outputs' weights are copied to a panel, word by word (a word: 32 bits of activations, 4
 * bytes or 2 halves). Lanes are outputs then, so that no register's lanes are added up, which for 256 columns took as
 * long as the products. 4 rows by 16 outputs: 8 accumulators, 2 weights, and a word of a row in all lanes: 6 loads for
 * 8 products.
 *
 * static __m256i load_words(const int8_t *w);                                  8 words of a weight's row
 * static __m256i add_product(__m256i sum, __m256i values, __m256i weights);    a word of each a lane */

enum {
    PANEL = 16,
    PANEL_ROWS = 4,
    LEAST_PANEL_ROWS = 8, /* fewer do not repay the copy */
    WORD_VALUES = 4 / sizeof(FXQ_VALUE)
};

/* 8 outputs' weights. */
struct group {
    const int8_t *weights;
    int64_t stride, depth;
};

static __m128i dot_4x1(const struct group *g, int first, const FXQ_VALUE *a);
static void dot_4x2(const struct group *g, int first, const FXQ_VALUE *a, const FXQ_VALUE *b, __m128i sums[2]);
FXQ_INLINE __m256i load_words(const int8_t *w);
FXQ_INLINE __m256i add_product(__m256i sum, __m256i values, __m256i weights);

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

FXQ_INLINE void transpose_8x8(__m256i v[8]) {
    __m256i t[8];
    FXQ_FOR(4, int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    FXQ_FOR(2, int i = 0; i < 8; i += 4) { /* now v[i + j] has, in each half, column j (or j + 4) of 4 rows */
        v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    FXQ_FOR(4, int j = 0; j < 4; j++) {
        t[j] = _mm256_permute2x128_si256(v[j], v[4 + j], 0x20);
        t[4 + j] = _mm256_permute2x128_si256(v[j], v[4 + j], 0x31);
    }
    FXQ_FOR(8, int i = 0; i < 8; i++) v[i] = t[i];
}

FXQ_INLINE __m256i word_in_all_lanes(const FXQ_VALUE *a) {
    int32_t word;
    memcpy(&word, a, sizeof word);
    return _mm256_set1_epi32(word);
}

/* 16 rows of weights to [depth / WORD_VALUES][16] words, and their products with `ones`: see row_major-inl.h. */
static void pack_panel(const int8_t *w, int64_t stride, int64_t depth, const FXQ_VALUE *ones, int32_t *panel,
                       __m256i sums[2]) {
    for (int half = 0; half < 2; half++) {
        const int8_t *rows = w + 8 * half * stride;
        __m256i sum = _mm256_setzero_si256();
        for (int64_t k = 0; k < depth; k += 8 * WORD_VALUES) {
            __m256i v[8];
            FXQ_FOR(8, int i = 0; i < 8; i++) v[i] = load_words(rows + i * stride + k);
            transpose_8x8(v);
            FXQ_FOR(8, int i = 0; i < 8; i++) {
                _mm256_store_si256((__m256i *)(panel + (k / WORD_VALUES + i) * PANEL + 8 * half), v[i]);
                if (sizeof(FXQ_VALUE) == 1) {
                    sum = add_product(sum, word_in_all_lanes(ones + k + i * WORD_VALUES), v[i]);
                }
            }
        }
        sums[half] = sum;
    }
}

/* `count` (at most PANEL_ROWS, a constant wherever this is inlined) tokens by a panel. */
FXQ_INLINE void multiply_panel_as(const int32_t *panel, const FXQ_VALUE *a, int64_t depth, __m256i sums[][2],
                                  int count) {
    __m256i acc[PANEL_ROWS][2];
    FXQ_FOR(4, int i = 0; i < count; i++) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < depth; k += WORD_VALUES, panel += PANEL) {
        const __m256i w0 = _mm256_load_si256((const __m256i *)panel),
                      w1 = _mm256_load_si256((const __m256i *)panel + 1);
        FXQ_FOR(4, int i = 0; i < count; i++) {
            const __m256i values = word_in_all_lanes(a + i * depth + k);
            acc[i][0] = add_product(acc[i][0], values, w0);
            acc[i][1] = add_product(acc[i][1], values, w1);
        }
    }
    FXQ_FOR(4, int i = 0; i < count; i++) sums[i][0] = acc[i][0], sums[i][1] = acc[i][1];
}

static void multiply_panel(const int32_t *panel, const FXQ_VALUE *a, int64_t depth, __m256i sums[][2], int count) {
    switch (count) {
        case 4: multiply_panel_as(panel, a, depth, sums, 4); break;
        case 3: multiply_panel_as(panel, a, depth, sums, 3); break;
        case 2: multiply_panel_as(panel, a, depth, sums, 2); break;
        default: multiply_panel_as(panel, a, depth, sums, 1);
    }
}

/* scratch: 16 rows copied from the tensor's end, then the panel: 48 of its 64 bytes a column at most. */
static void matmul_panels(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                          void *scratch) {
    const struct fxq_activations *x = job->x;
    const FXQ_VALUE *packed = x->packed, *ones = packed + x->rows * x->depth;
    struct weight_reader reader = read_weight(job->weight, scratch);
    int32_t *panel = (int32_t *)((char *)scratch + PANEL * x->depth);
    for (int64_t n = n0; n < n1; n += PANEL) {
        int64_t stride;
        const int8_t *w = weight_rows(&reader, n, PANEL, &stride);
        struct outputs_8 o[2] = {begin_outputs(job, to, n, n0, n1), begin_outputs(job, to, n + 8, n0, n1)};
        __m256i row_sums[2], sums[PANEL_ROWS][2];
        pack_panel(w, stride, x->depth, ones, panel, row_sums);
        o[0].row_sums = row_sums[0];
        o[1].row_sums = row_sums[1];
        for (int64_t m = 0; m < x->rows; m += PANEL_ROWS) {
            const int count = x->rows - m < PANEL_ROWS ? (int)(x->rows - m) : PANEL_ROWS;
            multiply_panel(panel, packed + m * x->depth, x->depth, sums, count);
            for (int i = 0; i < count; i++) {
                finish_outputs(&o[0], m + i, sums[i][0]);
                finish_outputs(&o[1], m + i, sums[i][1]);
            }
        }
    }
}

static void matmul(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch) {
    if (fxq_uses(FXQ_PACKED, job->x->rows >= LEAST_PANEL_ROWS)) {
        matmul_panels(job, n0, n1, to, scratch);
        return;
    }
    struct weight_reader reader = read_weight(job->weight, scratch);
    for (int64_t n = n0; n < n1; n += 8) {
        int64_t stride;
        const int8_t *w = weight_rows(&reader, n, 8, &stride);
        const struct group g = {w, stride, job->x->depth};
        struct outputs_8 o = begin_outputs(job, to, n, n0, n1);
        matmul_group(job, &g, &o, n);
    }
}

static void quantize(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    set_own_rows(x, first, count, rows);
    quantize_row_major(x, first, count, rows);
}
