/* The product on 256-bit registers, in two forms. Expects: row_major-inl.h, ymm_epilogue-inl.h, and of the instruction
 * set:
 *
 * PANEL_TOKENS                                        tokens that a panel is multiplied with at a time
 * load_weights(w)                                   a register of a weight's row: as many columns as of activations
 * add_product(&sum, values, weights)                sum += a word of each a lane (a word: 4 bytes or 2 halves)
 * store_words(panel, half, words)                   8 outputs' 4 columns each, a lane an output, to where they belong
 * load_words(panel, half)                           8 outputs' words of a panel
 *
 * gemv, few tokens: the weights are read as they lie. 8 outputs by a token, or 4 by 2: 8 sums, and a register of the
 * activations serves 4 or 8 products.
 *
 * Packed gemm, many tokens: 16 outputs' weights are copied to a panel of bytes, [depth / WORD_VALUES][16][WORD_VALUES].
 * Lanes are outputs then, so that no register's lanes are added up, which for 256 columns took as long as the products.
 * Some panels at a time, so that they stay in the L2 cache while the tokens pass, and outputs leave in long runs. */

enum {
    PANEL = 16,
    LEAST_PANEL_TOKENS = 16, /* fewer do not repay the copy */
    PANELS_BYTES = 64 << 10,
    MOST_PANELS = 64,
    WORD_VALUES = 4 / sizeof(FXQ_VALUE),
    REGISTER_VALUES = 32 / sizeof(FXQ_VALUE)
};

FXQ_INLINE __m256i load_weights(const int8_t *w);
FXQ_INLINE void add_product(__m256i *sum, __m256i values, __m256i weights);
FXQ_INLINE void store_words(int8_t *panel, int half, __m256i words);
FXQ_INLINE __m256i load_words(const int8_t *panel, int half);

FXQ_INLINE __m256i load_values(const FXQ_VALUE *a) { return _mm256_loadu_si256((const __m256i *)a); }

/* Lane i is the sum of the lanes of v[i]. */
FXQ_INLINE __m128i sum_4(const __m256i v[4]) {
    const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

FXQ_INLINE __m256i sum_8(const __m256i v[8]) { return _mm256_set_m128i(sum_4(v + 4), sum_4(v)); }

/* 8 outputs' weights, `stride` bytes apart. Two addresses and multiples of the stride: left to itself gcc keeps 8. */
struct group {
    const int8_t *weights;
    int64_t stride, depth;
};

static __m256i dot_8x1(const struct group *g, const FXQ_VALUE *a) {
    const int8_t *w[2] = {g->weights, g->weights + 4 * g->stride};
    __m256i sums[8];
    FXQ_FOR(8, int i = 0; i < 8; i++) sums[i] = _mm256_setzero_si256();
    for (int64_t k = 0; k < g->depth; k += REGISTER_VALUES) {
        const __m256i values = load_values(a + k);
        FXQ_FOR(4, int i = 0; i < REGISTER_VALUES / 8; i++) {
            _mm_prefetch((const char *)g->weights + 8 * (g->stride + k) + 64 * i, _MM_HINT_T0);
        }
        FXQ_FOR(8, int i = 0; i < 8; i++) {
            add_product(&sums[i], values, load_weights(w[i / 4] + i % 4 * g->stride));
        }
        FXQ_FOR(2, int i = 0; i < 2; i++) {
            w[i] += REGISTER_VALUES;
            __asm__("" : "+r"(w[i])); /* hides the sum */
        }
    }
    return sum_8(sums);
}

/* sums[m]: of token m (a and b) with 8 outputs. */
static void dot_8x2(const struct group *g, const FXQ_VALUE *a, const FXQ_VALUE *b, __m256i sums[2]) {
    __m256i of_a[8], of_b[8];
    FXQ_FOR(2, int half = 0; half < 8; half += 4) {
        const int8_t *w = g->weights + half * g->stride;
        __m256i of[2][4];
        FXQ_FOR(4, int i = 0; i < 4; i++) of[0][i] = of[1][i] = _mm256_setzero_si256();
        for (int64_t k = 0; k < g->depth; k += REGISTER_VALUES, w += REGISTER_VALUES) {
            const __m256i values = load_values(a + k), others = load_values(b + k);
            FXQ_FOR(4, int i = 0; i < 4; i++) {
                const __m256i weights = load_weights(w + i * g->stride);
                add_product(&of[0][i], values, weights);
                add_product(&of[1][i], others, weights);
            }
        }
        FXQ_FOR(4, int i = 0; i < 4; i++) of_a[half + i] = of[0][i], of_b[half + i] = of[1][i];
    }
    sums[0] = sum_8(of_a);
    sums[1] = sum_8(of_b);
}

static void multiply_group(const struct fxq_matmul *job, const struct group *g, struct outputs_8 *o, int64_t n) {
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

static void matmul_gemv(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                        void *scratch) {
    struct weight_reader reader = read_weight(job->weight, scratch);
    for (int64_t n = n0; n < n1; n += 8) {
        int64_t stride;
        const int8_t *w = weight_rows(&reader, n, 8, &stride);
        const struct group g = {w, stride, job->x->depth};
        struct outputs_8 o = begin_outputs(job, to, n, n0, n1);
        multiply_group(job, &g, &o, n);
    }
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

/* 16 rows of weights to a panel; and of bytes their products with `ones`, see row_major-inl.h. */
static void pack_panel(const int8_t *w, int64_t stride, int64_t depth, const FXQ_VALUE *ones, int8_t *panel,
                       int32_t *sums) {
    for (int half = 0; half < 2; half++) {
        const int8_t *rows = w + 8 * half * stride;
        __m256i sum = _mm256_setzero_si256();
        for (int64_t k = 0; k < depth; k += 32) {
            __m256i v[8];
            FXQ_FOR(8, int i = 0; i < 8; i++) v[i] = _mm256_loadu_si256((const __m256i *)(rows + i * stride + k));
            transpose_8x8(v);
            FXQ_FOR(8, int i = 0; i < 8; i++) {
                store_words(panel + (k + 4 * i) * PANEL, half, v[i]);
                if (sizeof(FXQ_VALUE) == 1) add_product(&sum, word_in_all_lanes(ones + k + 4 * i), v[i]);
            }
        }
        if (sizeof(FXQ_VALUE) == 1) _mm256_storeu_si256((__m256i *)(sums + 8 * half), sum);
    }
}

/* `count` (at most PANEL_TOKENS, a constant wherever this is inlined) tokens, `depth` apart, by a panel. */
FXQ_INLINE void multiply_panel_as(const int8_t *panel, const FXQ_VALUE *a, int64_t columns, int64_t depth,
                                  __m256i sums[][2], int count) {
    __m256i acc[PANEL_TOKENS][2];
    FXQ_FOR(8, int i = 0; i < count; i++) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < columns; k += WORD_VALUES, panel += WORD_VALUES * PANEL) {
        const __m256i w0 = load_words(panel, 0), w1 = load_words(panel, 1);
        FXQ_FOR(8, int i = 0; i < count; i++) {
            const __m256i values = word_in_all_lanes(a + i * depth + k);
            add_product(&acc[i][0], values, w0);
            add_product(&acc[i][1], values, w1);
        }
    }
    FXQ_FOR(8, int i = 0; i < count; i++) sums[i][0] = acc[i][0], sums[i][1] = acc[i][1];
}

/* A single token: words 4 apart have a sum of their own, since a sum takes some cycles and two begin in each. */
FXQ_INLINE void multiply_panel_once(const int8_t *panel, const FXQ_VALUE *a, int64_t columns, __m256i sums[2]) {
    __m256i acc[4][2];
    FXQ_FOR(4, int i = 0; i < 4; i++) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < columns; k += 4 * WORD_VALUES) {
        FXQ_FOR(4, int i = 0; i < 4; i++, panel += WORD_VALUES * PANEL) {
            const __m256i values = word_in_all_lanes(a + k + i * WORD_VALUES);
            add_product(&acc[i][0], values, load_words(panel, 0));
            add_product(&acc[i][1], values, load_words(panel, 1));
        }
    }
    FXQ_FOR(2, int half = 0; half < 2; half++) {
        sums[half] = _mm256_add_epi32(_mm256_add_epi32(acc[0][half], acc[1][half]),
                                      _mm256_add_epi32(acc[2][half], acc[3][half]));
    }
}

static void multiply_panel(const int8_t *panel, const FXQ_VALUE *a, int64_t columns, int64_t depth, __m256i sums[][2],
                           int count) {
    switch (count) {
#if PANEL_TOKENS == 6
        case 6: multiply_panel_as(panel, a, columns, depth, sums, 6); break;
        case 5: multiply_panel_as(panel, a, columns, depth, sums, 5); break;
#endif
        case 4: multiply_panel_as(panel, a, columns, depth, sums, 4); break;
        case 3: multiply_panel_as(panel, a, columns, depth, sums, 3); break;
        case 2: multiply_panel_as(panel, a, columns, depth, sums, 2); break;
        default: multiply_panel_once(panel, a, columns, sums[0]);
    }
}

/* Panels of outputs [first, end) by all tokens. */
struct panels {
    int64_t n0, n1, first, end;
    const int8_t *packed;
    const int32_t *sums;
};

static void multiply_panels(const struct fxq_matmul *job, const struct panels *p, const struct fxq_target *to) {
    const struct fxq_activations *x = job->x;
    const int64_t tiles = (x->rows + PANEL_TOKENS - 1) / PANEL_TOKENS;
    for (int64_t tile = 0; tile < tiles; tile++) { /* of tokens, evenly: 25 are 5 times 5, not 4 times 6 and 1 */
        const int64_t m = fxq_share(x->rows, 1, tile, tiles);
        const int count = (int)(fxq_share(x->rows, 1, tile + 1, tiles) - m);
        const FXQ_VALUE *a = (const FXQ_VALUE *)x->packed + m * x->depth;
        for (int64_t n = p->first; n < p->end; n += PANEL) {
            __m256i sums[PANEL_TOKENS][2];
            multiply_panel(p->packed + (n - p->first) * x->depth, a, x->depth, x->depth, sums, count);
            for (int half = 0; half < 2; half++) {
                struct outputs_8 o = begin_outputs(job, to, n + 8 * half, p->n0, p->n1);
                if (sizeof(FXQ_VALUE) == 1) {
                    o.row_sums = _mm256_loadu_si256((const __m256i *)(p->sums + n - p->first + 8 * half));
                }
                for (int i = 0; i < count; i++) finish_outputs(&o, m + i, sums[i][half]);
            }
        }
    }
}

/* scratch: 16 rows copied from the weight's end, then the panels: at least 48 bytes a column. */
static void matmul_panels(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                          void *scratch) {
    const struct fxq_activations *x = job->x;
    const FXQ_VALUE *ones = (const FXQ_VALUE *)x->packed + x->rows * x->depth;
    struct weight_reader reader = read_weight(job->weight, scratch);
    int8_t *packed = (int8_t *)scratch + PANEL * x->depth;
    int32_t sums[MOST_PANELS * PANEL];
    const int64_t panel = PANEL * x->depth,
                  chunk = PANEL * fxq_clamp(PANELS_BYTES / (panel ? panel : 1), 1, MOST_PANELS);
    for (int64_t first = n0; first < n1; first += chunk) {
        const int64_t end = n1 - first < chunk ? n1 : first + chunk;
        for (int64_t n = first; n < end; n += PANEL) {
            int64_t stride;
            const int8_t *w = weight_rows(&reader, n, PANEL, &stride);
            pack_panel(w, stride, x->depth, ones, packed + (n - first) * x->depth, sums + n - first);
        }
        const struct panels p = {n0, n1, first, end, packed, sums};
        multiply_panels(job, &p, to);
    }
}

static void matmul(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch) {
    const bool packs = fxq_uses(FXQ_PACKED, job->x->rows >= LEAST_PANEL_TOKENS);
    (packs ? matmul_panels : matmul_gemv)(job, n0, n1, to, scratch);
}

static void quantize(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    set_own_rows(x, first, count, rows);
    quantize_row_major(x, first, count, rows);
}
