/* int16 weights in AVX512-VNNI.
 *
 * Expects: common-inl.h.
 *
 * gemv, few rows: low_high-inl.h, with the registers described here. Lanes are columns, and are added up at the end.
 *
 * Packed gemm, more rows: 32 outputs' weights are copied, 256 columns at a time, to a panel of words: two columns.
 * Lanes are outputs then, so that nothing is added up across lanes, and a word of a row goes to all lanes. 4 rows by 32
 * outputs, low and high: 16 accumulators, and 10 loads serve 16 products. */
#define FXQ_LANES __m512i
#define FXQ_TILE 8
#define FXQ_LEAST_PANEL_ROWS 8

FXQ_INLINE __m512i load_16(const int16_t *p) { return _mm512_loadu_si512(p); }

FXQ_INLINE __m512i load_first_16(const int16_t *p, int64_t count) {
    return _mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), p);
}

FXQ_INLINE __m512i add_pairs(__m512i sum, __m512i a, __m512i w) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w)); /* see add_products */
    return sum;
}

/* The even lanes' int64, or the odd ones', of low + 256 high. */
FXQ_INLINE __m512i widen_even(__m512i low, __m512i high) {
    const __m512i product = _mm512_mul_epi32(high, _mm512_set1_epi64(256));
    return _mm512_add_epi64(_mm512_mul_epi32(low, _mm512_set1_epi64(1)), product);
}

FXQ_INLINE __m512i widen_odd(__m512i low, __m512i high) {
    const __m512i product = _mm512_mul_epi32(_mm512_srli_epi64(high, 32), _mm512_set1_epi64(256));
    return _mm512_add_epi64(_mm512_srai_epi64(low, 32), product);
}

FXQ_INLINE __m512i add_wide(__m512i total, __m512i low, __m512i high) {
    return _mm512_add_epi64(total, _mm512_add_epi64(widen_even(low, high), widen_odd(low, high)));
}

FXQ_INLINE void sum_lanes(const __m512i v[8], int64_t *sums) {
    __m512i pair[4], half[2];
    FXQ_FOR(4, int i = 0; i < 4; i++) { /* 128 bits: of v[2 i] and v[2 i + 1] */
        pair[i] = _mm512_add_epi64(_mm512_unpacklo_epi64(v[2 * i], v[2 * i + 1]),
                                   _mm512_unpackhi_epi64(v[2 * i], v[2 * i + 1]));
    }
    FXQ_FOR(2, int i = 0; i < 2; i++) {
        half[i] = _mm512_add_epi64(_mm512_shuffle_i64x2(pair[2 * i], pair[2 * i + 1], 0x88),
                                   _mm512_shuffle_i64x2(pair[2 * i], pair[2 * i + 1], 0xdd));
    }
    _mm512_storeu_si512(sums, _mm512_add_epi64(_mm512_shuffle_i64x2(half[0], half[1], 0x88),
                                               _mm512_shuffle_i64x2(half[0], half[1], 0xdd)));
}

#include "kernels/generic/low_high-inl.h"

enum { WORDS = EXACT_PRODUCTS / 2, GROUP_ROWS = 4, MOST_PANEL_ROWS = 64 };

/* 32 outputs by a piece of the columns. */
struct int16_panel {
    __m512i words[WORDS][2];
    __m512i sums[MOST_PANEL_ROWS][4]; /* int64, of the pieces so far: even and odd outputs of each 16 */
    struct outputs_16 outputs[2];
};

FXQ_INLINE __m512i word_to_all(const int16_t *p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
}

FXQ_INLINE __m512 in_order_16(__m512i even, __m512i odd) {
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512 a = _mm512_castps256_ps512(_mm512_cvtepi64_ps(even)),
                 b = _mm512_castps256_ps512(_mm512_cvtepi64_ps(odd));
    return _mm512_permutex2var_ps(a, order, b);
}

/* `rows` rows (a constant wherever this is inlined) by the panel, from the piece's first column on. */
FXQ_INLINE void multiply_words(const struct int16_panel *p, const int16_t *a, int64_t depth, int64_t words,
                               bool is_first, __m512i (*sums)[4], int rows) {
    __m512i low[GROUP_ROWS][2], high[GROUP_ROWS][2];
    FXQ_FOR(4, int m = 0; m < rows; m++) low[m][0] = low[m][1] = high[m][0] = high[m][1] = _mm512_setzero_si512();
    for (int64_t i = 0; i < words; i++) {
        const __m512i w0 = p->words[i][0], w1 = p->words[i][1];
        FXQ_FOR(4, int m = 0; m < rows; m++) {
            const __m512i a_low = word_to_all(a + 2 * m * depth + 2 * i),
                          a_high = word_to_all(a + (2 * m + 1) * depth + 2 * i);
            low[m][0] = add_pairs(low[m][0], a_low, w0);
            low[m][1] = add_pairs(low[m][1], a_low, w1);
            high[m][0] = add_pairs(high[m][0], a_high, w0);
            high[m][1] = add_pairs(high[m][1], a_high, w1);
        }
    }
    FXQ_FOR(4, int m = 0; m < rows; m++) {
        FXQ_FOR(2, int half = 0; half < 2; half++) {
            const __m512i even = widen_even(low[m][half], high[m][half]), odd = widen_odd(low[m][half], high[m][half]);
            sums[m][2 * half] = is_first ? even : _mm512_add_epi64(sums[m][2 * half], even);
            sums[m][2 * half + 1] = is_first ? odd : _mm512_add_epi64(sums[m][2 * half + 1], odd);
        }
    }
}

static void multiply_piece(struct int16_panel *p, const int16_t *a, int64_t depth, int64_t words, bool is_first,
                           int rows) {
    int m = 0;
    for (; m + 4 <= rows; m += 4) multiply_words(p, a + 2 * m * depth, depth, words, is_first, p->sums + m, 4);
    if (m + 2 <= rows) {
        multiply_words(p, a + 2 * m * depth, depth, words, is_first, p->sums + m, 2);
        m += 2;
    }
    if (m < rows) multiply_words(p, a + 2 * m * depth, depth, words, is_first, p->sums + m, 1);
}

/* Columns [k, k + columns) of outputs [n, n + 32), where n1 is the end: beyond it the last output is taken again. */
static void pack_piece(const struct fxq_matmul *job, struct int16_panel *p, int64_t n, int64_t n1, int64_t k,
                       int64_t columns) {
    const int64_t stride = job->x->columns;
    for (int half = 0; half < 2; half++, n += 16) {
        for (int64_t at = 0; at < columns; at += LANES_16) {
            const int16_t *w = (const int16_t *)job->weight->data + k + at;
            __m512i v[16];
            FXQ_FOR(16, int i = 0; i < 16; i++) {
                const int16_t *row = w + (n + i < n1 ? n + i : n1 - 1) * stride;
                v[i] = columns - at >= LANES_16 ? load_16(row) : load_first_16(row, columns - at);
            }
            transpose_16x16(v);
            FXQ_FOR(16, int i = 0; i < 16; i++) p->words[at / 2 + i][half] = v[i];
        }
    }
}

static void finish_panel(const struct fxq_matmul *job, const struct fxq_target *to, const struct int16_panel *p,
                         int64_t m0, int rows, int64_t at) {
    for (int64_t i = 0; i < rows; i++) {
        const float row_scale = job->x->row[m0 + i].scale;
        const struct fxq_target row = fxq_target_at(to, m0 + i, at);
        FXQ_FOR(2, int half = 0; half < 2; half++) {
            const struct outputs_16 *o = &p->outputs[half];
            const __m512 sums = in_order_16(p->sums[i][2 * half], p->sums[i][2 * half + 1]);
            store_outputs(o, scale_outputs(o, sums, row_scale, row.addend ? row.addend + 16 * half : NULL),
                          row.out + 16 * half);
        }
    }
}

static void matmul_int16_panels(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to) {
    const struct fxq_activations *x = job->x;
    struct int16_panel p;
    for (int64_t n = n0; n < n1; n += 32) {
        p.outputs[0] = begin_outputs(job, n, n1);
        p.outputs[1] = begin_outputs(job, n + 16, n1);
        for (int64_t m = 0; m < x->rows; m += MOST_PANEL_ROWS) {
            const int rows = x->rows - m < MOST_PANEL_ROWS ? (int)(x->rows - m) : MOST_PANEL_ROWS;
            const int16_t *a = (const int16_t *)x->packed + 2 * m * x->depth;
            for (int64_t k = 0; k < x->columns || k == 0; k += EXACT_PRODUCTS) {
                const int64_t columns = x->columns - k < EXACT_PRODUCTS ? x->columns - k : EXACT_PRODUCTS;
                pack_piece(job, &p, n, n1, k, columns);
                multiply_piece(&p, a + k, x->depth, (columns + 1) / 2, k == 0, rows);
            }
            finish_panel(job, to, &p, m, rows, n - n0);
        }
    }
}
