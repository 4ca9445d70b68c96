/* What the AVX512-VNNI and AMX kernels share. The includer has begun its target.
 *
 * Two forms of a product, chosen by the number of rows:
 *
 * Dot form, few rows: the weight's rows are read as they lie, 64 columns a register, and multiplied with q's row
 * (vpdpbusd: 4 products a lane); the 16 lanes of 16 outputs' sums are then added up, all at once. Activations lie
 * row by row, with an extra row for the correction: see row_major-inl.h.
 *
 * Block form, more rows: C^T = W X^T in tiles of 16 outputs by 16 rows of activations. Activations lie in blocks of 16
 * rows, [depth / 4][16][4] bytes, the layout of an AMX "B" tile; the weight is read as it lies, 16 rows by 64 columns an
 * "A" tile. So the weights are never repacked, and the tile is transposed in registers when it is finished.
 *
 * A third form, of the packed weights (packed-inl.h), is for so many rows that a copy of the weights is repaid.
 *
 * Columns beyond the last: q is 0 there, so that a weight's row may be read into the next one. The tensor's end is never
 * passed: see weight_rows(). */
#include <immintrin.h>

#define FXQ_VALUE uint8_t
#define FXQ_OWN_QUANTIZATION
#define FXQ_OWN_TABLES
#include "kernels/x86/unpack-inl.h"

FXQ_INLINE __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* Widen 16 ranges by x's values; whether there is a NaN among them. */
FXQ_INLINE bool measure_lanes(const float *x, int64_t count, __m512 *least, __m512 *greatest) {
    __m512 low = *least, high = *greatest, low2 = low, high2 = high;
    __mmask16 nan = 0;
    int64_t k = 0;
    for (; k + 32 <= count; k += 32) {
        const __m512 v = _mm512_loadu_ps(x + k), w = _mm512_loadu_ps(x + k + 16);
        low = _mm512_min_ps(v, low); /* the second operand where one is NaN */
        high = _mm512_max_ps(v, high);
        low2 = _mm512_min_ps(w, low2);
        high2 = _mm512_max_ps(w, high2);
        nan |= _mm512_cmp_ps_mask(v, w, _CMP_UNORD_Q);
    }
    for (; k < count; k += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(first_lanes(count - k), x + k);
        low = _mm512_min_ps(v, low);
        high = _mm512_max_ps(v, high);
        nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
    *least = _mm512_min_ps(low, low2);
    *greatest = _mm512_max_ps(high, high2);
    return nan != 0;
}

/* As in elementwise-inl.h, in fewer instructions than compilers find: a step of an LSTM waits for these. */
static void measure(const float *x, int64_t count, struct fxq_range *range) {
    __m512 low = _mm512_set1_ps(range->low), high = _mm512_set1_ps(range->high);
    range->is_nan |= measure_lanes(x, count, &low, &high);
    range->low = _mm512_reduce_min_ps(low);
    range->high = _mm512_reduce_max_ps(high);
}

FXQ_INLINE void quantize_values(const float *x, int64_t count, const struct fxq_row *row, int qmax, uint8_t *q) {
    const __m512 inverse = _mm512_set1_ps(row->inverse), round = _mm512_set1_ps(12582912.0f); /* 1.5 * 2^23 */
    const __m512 least = _mm512_set1_ps((float)-row->zero_point), most = _mm512_set1_ps((float)(qmax - row->zero_point));
    const __m512i offset = _mm512_set1_epi32(row->zero_point);
    for (int64_t k = 0; k < count; k += 16) {
        const __mmask16 lanes = first_lanes(count - k);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + k), inverse);
        v = _mm512_min_ps(_mm512_max_ps(v, least), most); /* NaN -> least */
        const __m512i whole = _mm512_add_epi32(_mm512_castps_si512(_mm512_add_ps(v, round)), offset);
        if (lanes == 0xffff) _mm_storeu_si128((__m128i *)(q + k), _mm512_cvtepi32_epi8(whole));
        else _mm512_mask_cvtepi32_storeu_epi8(q + k, lanes, whole);
    }
}

#include "kernels/x86/avx512/tables-inl.h"
#include "kernels/generic/row_major-inl.h"

/* Sixteen registers to one, whose lane n is the sum of the lanes of v[n] (or their least, or their greatest): 15
 * operations and 30 shuffles for all. */
#define FXQ_REDUCE_16(name, type, combine, unpacklo_32, unpackhi_32, unpacklo_64, unpackhi_64, shuffle)                    \
    FXQ_INLINE type name##_lanes(type a, type b) { return combine(shuffle(a, b, 0x88), shuffle(a, b, 0xdd)); }             \
    FXQ_INLINE type name(const type v[16]) {                                                                               \
        type fours[4];                                                                                                     \
        FXQ_UNROLL(4) for (int i = 0; i < 4; i++) {                                                                        \
            const type a = v[4 * i], b = v[4 * i + 1], c = v[4 * i + 2], d = v[4 * i + 3];                                 \
            const type ab = combine(unpacklo_32(a, b), unpackhi_32(a, b)), cd = combine(unpacklo_32(c, d), unpackhi_32(c, d)); \
            fours[i] = combine(unpacklo_64(ab, cd), unpackhi_64(ab, cd));                                                  \
        }                                                                                                                  \
        return name##_lanes(name##_lanes(fours[0], fours[1]), name##_lanes(fours[2], fours[3]));                           \
    }
FXQ_INLINE __m512 unpacklo_pairs(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
FXQ_INLINE __m512 unpackhi_pairs(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
FXQ_REDUCE_16(sum_16, __m512i, _mm512_add_epi32, _mm512_unpacklo_epi32, _mm512_unpackhi_epi32, _mm512_unpacklo_epi64,
              _mm512_unpackhi_epi64, _mm512_shuffle_i32x4)
FXQ_REDUCE_16(least_16, __m512, _mm512_min_ps, _mm512_unpacklo_ps, _mm512_unpackhi_ps, unpacklo_pairs, unpackhi_pairs,
              _mm512_shuffle_f32x4)
FXQ_REDUCE_16(greatest_16, __m512, _mm512_max_ps, _mm512_unpacklo_ps, _mm512_unpackhi_ps, unpacklo_pairs, unpackhi_pairs,
              _mm512_shuffle_f32x4)

/* fxq_set_row for 16 rows at once, to the bit. nan: the rows that have one. */
static void set_rows_16(struct fxq_row *row, int count, __m512 low, __m512 high, __mmask16 nan, int qmax) {
    const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f), round = _mm512_set1_ps(12582912.0f);
    const __m512 most = _mm512_set1_ps((float)qmax);
    low = _mm512_max_ps(low, _mm512_set1_ps(-3.4028234663852886e38f));
    high = _mm512_min_ps(high, _mm512_set1_ps(3.4028234663852886e38f));
    __m512 scale = _mm512_sub_ps(_mm512_mul_ps(high, half), _mm512_mul_ps(low, half));
    scale = _mm512_div_ps(scale, _mm512_mul_ps(most, half));
    scale = _mm512_mask_mov_ps(scale, _mm512_cmp_ps_mask(scale, _mm512_set1_ps(1.17549435e-38f), _CMP_LT_OQ), one);
    scale = _mm512_mask_mov_ps(scale, nan, _mm512_set1_ps(__builtin_nanf("")));
    const __m512 inverse = _mm512_div_ps(one, scale);
    const __m512 minus = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(inverse), _mm512_set1_epi32(INT32_MIN)));
    __m512 zero = _mm512_sub_ps(_mm512_add_ps(_mm512_mul_ps(low, minus), round), round);
    zero = _mm512_min_ps(_mm512_max_ps(zero, _mm512_setzero_ps()), most); /* NaN: 0 */
    const __m512i zero_point = _mm512_cvttps_epi32(zero), minus_zero = _mm512_sub_epi32(_mm512_setzero_si512(), zero_point);
    const __m512i pair = _mm512_or_si512(_mm512_slli_epi32(minus_zero, 16 + 7), _mm512_and_si512(minus_zero, _mm512_set1_epi32(0xffff)));
    _Alignas(64) float scales[16], inverses[16];
    _Alignas(64) int32_t zero_points[16], pairs[16];
    _mm512_store_ps(scales, scale);
    _mm512_store_ps(inverses, inverse);
    _mm512_store_si512(zero_points, zero_point);
    _mm512_store_si512(pairs, pair);
    for (int i = 0; i < count; i++) row[i] = (struct fxq_row){scales[i], inverses[i], zero_points[i], pairs[i]};
}

/* As set_own_rows in elementwise-inl.h: the lanes of all rows are reduced together. */
static void set_own_rows_16(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    __m512 low[16], high[16];
    __mmask16 nan = 0;
    for (int i = 0; i < 16; i++) {
        low[i] = high[i] = _mm512_setzero_ps();
        if (i < count) nan |= (__mmask16)(measure_lanes(rows[i], x->columns, &low[i], &high[i]) << i);
    }
    set_rows_16(x->row + first, count, least_16(low), greatest_16(high), nan, x->qmax);
}

enum {
    BLOCK_ROWS = 64,                   /* outputs of one step of the block form: 4 tiles */
    CHUNK_BYTES = 512 << 10,           /* of weights that stay in the L2 cache while all activations pass */
    MOST_CHUNK_ROWS = 1024,
    MOST_BLOCK_FORM_COLUMNS = 32768    /* correct() splits the row sums into int16 halves */
};

static bool is_dot_form(const struct fxq_activations *x) {
    return x->rows <= DOT_FORM_ROWS || x->columns > MOST_BLOCK_FORM_COLUMNS;
}

/* -- activations ------------------------------------------------------------------------------------------------- */

FXQ_INLINE void transpose_16x16(__m512i v[16]) {
    __m512i t[16];
    FXQ_UNROLL(8) for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    FXQ_UNROLL(4) for (int i = 0; i < 4; i++) { /* now v[4i + j] has, in each 128-bit lane l, column 4l + j of 4 rows */
        v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    FXQ_UNROLL(4) for (int j = 0; j < 4; j++) { /* transpose the 4 x 4 lanes of v[j], v[4 + j], v[8 + j], v[12 + j] */
        const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88), b = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    FXQ_UNROLL(16) for (int i = 0; i < 16; i++) v[i] = t[i];
}

/* 64 columns at a time: 16 rows of 64 bytes, then transposed as 16 x 16 groups of 4 bytes. Where the last block has
 * room, the row after the last is ones: its product is the weight's row sums, at no cost. */
static void quantize_block_form(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    __m512i *packed = (__m512i *)((uint8_t *)x->packed + first * x->depth);
    _Alignas(64) uint8_t part[16][64] = {{0}};
    for (int64_t k = 0; k < x->depth; k += 64) {
        const int64_t width = x->columns - k < 64 ? x->columns - k : 64;
        if (width < 64) memset(part, 0, sizeof part);
        for (int i = 0; i < count; i++) {
            quantize_values(rows[i] + k, width, &x->row[first + i], x->qmax, part[i]);
        }
        if (count < 16) memset(part[count], 1, (size_t)width);
        __m512i v[16];
        for (int i = 0; i < 16; i++) v[i] = _mm512_load_si512(part[i]);
        transpose_16x16(v);
        for (int i = 0; i < 16; i++) _mm512_store_si512(packed++, v[i]);
    }
}

static void quantize(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    if (x->per_row && count >= 4) set_own_rows_16(x, first, count, rows);
    else set_own_rows(x, first, count, rows); /* a few: no longer than the reduction of 16 */
    (x->is_row_major || is_dot_form(x) ? quantize_row_major : quantize_block_form)(x, first, count, rows);
}

/* -- the dot form ------------------------------------------------------------------------------------------------ */

/* sum + the products of 64 columns, 4 a lane. Not the intrinsic: gcc 12 copies and spills its accumulators. */
FXQ_INLINE __m512i add_products(__m512i sum, __m512i q, const int8_t *w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(q), "m"(*(const __m512i_u *)w));
    return sum;
}

/* 16 rows from 4 addresses and multiples of the stride, which an x86 address can hold: left to itself gcc keeps 16
 * addresses, most of them in vector registers. */
struct rows_16 {
    const int8_t *row[4]; /* 0, 4, 8, 12 */
    int64_t stride;
};

FXQ_INLINE struct rows_16 begin_rows(const int8_t *w, int64_t stride) {
    return (struct rows_16){{w, w + 4 * stride, w + 8 * stride, w + 12 * stride}, stride};
}

FXQ_INLINE const int8_t *row_of(const struct rows_16 *rows, int i) { return rows->row[i / 4] + i % 4 * rows->stride; }

FXQ_INLINE void advance_rows(struct rows_16 *rows) {
    FXQ_UNROLL(4) for (int j = 0; j < 4; j++) {
        rows->row[j] += 64;
        __asm__("" : "+r"(rows->row[j])); /* hides the sum */
    }
}

/* 16 outputs' products with one row: 16 accumulators, a register of q, the weights from memory. */
FXQ_INLINE __m512i dot_16(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *q) {
    struct rows_16 rows = begin_rows(w, stride);
    __m512i acc[16];
    FXQ_UNROLL(16) for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < depth; k += 64) {
        const __m512i a = _mm512_load_si512(q + k);
        FXQ_UNROLL(16) for (int i = 0; i < 16; i++) acc[i] = add_products(acc[i], a, row_of(&rows, i));
        advance_rows(&rows);
    }
    return sum_16(acc);
}

/* The same minus the products with a second row `z`: each weight is read once. 8 outputs at a time: 16 accumulators. */
FXQ_INLINE __m512i dot_16_minus(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *q, const uint8_t *z) {
    __m512i difference[16];
    FXQ_UNROLL(2) for (int half = 0; half < 16; half += 8) {
        struct rows_16 rows = begin_rows(w + half * stride, stride);
        /* These rows' places in the next group: the weights come from the L3 cache. Of long rows only the next lines,
         * for which the L1 cache has room: 1.1 to 1.3 times faster from 1536 columns on. */
        const int64_t ahead = stride < 1536 ? 16 * stride : 512;
        __m512i acc[8], less[8];
        FXQ_UNROLL(8) for (int i = 0; i < 8; i++) acc[i] = less[i] = _mm512_setzero_si512();
        for (int64_t k = 0; k < depth; k += 64) {
            const __m512i a = _mm512_load_si512(q + k), b = _mm512_load_si512(z + k);
            FXQ_UNROLL(8) for (int i = 0; i < 8; i++) {
                acc[i] = add_products(acc[i], a, row_of(&rows, i));
                less[i] = add_products(less[i], b, row_of(&rows, i));
                _mm_prefetch((const char *)row_of(&rows, i) + ahead, _MM_HINT_T0);
            }
            advance_rows(&rows);
        }
        FXQ_UNROLL(8) for (int i = 0; i < 8; i++) difference[half + i] = _mm512_sub_epi32(acc[i], less[i]);
    }
    return sum_16(difference);
}

static void row_sums(const int8_t *weight, int64_t outputs, int64_t columns, int64_t n0, int64_t n1, int32_t *sums,
                     void *scratch) {
    struct weight_reader reader = read_weight(weight, outputs, columns, scratch);
    const __mmask64 in_last_step = columns % 64 ? ~0ull >> (64 - columns % 64) : ~0ull;
    const __m512i ones = _mm512_set1_epi8(1), last = _mm512_maskz_set1_epi8(in_last_step, 1);
    for (int64_t n = n0; n < n1; n += 16) {
        int64_t stride;
        const int8_t *w = weight_rows(&reader, n, 16, &stride);
        struct rows_16 rows = begin_rows(w, stride);
        __m512i acc[16];
        FXQ_UNROLL(16) for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_si512();
        for (int64_t k = 0; k < reader.depth; k += 64) {
            const __m512i a = k + 64 < reader.depth ? ones : last;
            FXQ_UNROLL(16) for (int i = 0; i < 16; i++) acc[i] = add_products(acc[i], a, row_of(&rows, i));
            advance_rows(&rows);
        }
        _mm512_mask_storeu_epi32(sums + n - n0, first_lanes(n1 - n), sum_16(acc));
    }
}

/* A row sum s as two int16, s = 128 * high + low with 0 <= low < 128: then one vpdpwssd with the row's zero_pair,
 * (-zero_point, -128 * zero_point), subtracts s * zero_point exactly. |high| < 2^15 up to 32768 columns. */
FXQ_INLINE __m512i make_pairs(__m512i sums) {
    const __m512i low = _mm512_and_si512(sums, _mm512_set1_epi32(127));
    return _mm512_or_si512(_mm512_slli_epi32(_mm512_srai_epi32(sums, 7), 16), low);
}

FXQ_INLINE __m512i correct(__m512i sums, __m512i pairs, int32_t zero_pair) {
    return _mm512_dpwssd_epi32(sums, pairs, _mm512_set1_epi32(zero_pair));
}

/* What the last steps of 16 outputs need. */
struct outputs_16 {
    bool relu;
    __mmask16 lanes;
    __m512 scale, bias;
};

FXQ_INLINE struct outputs_16 begin_outputs(const struct fxq_matmul *job, int64_t n, int64_t n1) {
    const __m512 no_bias = _mm512_set1_ps(-0.0f); /* y + -0 is y, to the bit */
    struct outputs_16 o = {job->relu, first_lanes(n1 - n), _mm512_setzero_ps(), no_bias};
    o.scale = _mm512_maskz_loadu_ps(o.lanes, job->scale + n);
    if (job->bias) o.bias = _mm512_mask_loadu_ps(o.bias, o.lanes, job->bias + n);
    return o;
}

FXQ_INLINE __m512 scale_outputs(const struct outputs_16 *o, __m512 sums, float row_scale, const float *addend) {
    __m512 y = _mm512_mul_ps(sums, _mm512_mul_ps(_mm512_set1_ps(row_scale), o->scale));
    y = _mm512_add_ps(y, o->bias);
    if (addend) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(o->lanes, addend));
    return o->relu ? _mm512_max_ps(_mm512_setzero_ps(), y) : y; /* the second operand where one is NaN */
}

FXQ_INLINE __m512 dequantize_outputs(const struct outputs_16 *o, __m512i sums, float row_scale, const float *addend) {
    return scale_outputs(o, _mm512_cvtepi32_ps(sums), row_scale, addend);
}

FXQ_INLINE void finish_outputs(const struct outputs_16 *o, __m512i sums, float row_scale, float *out,
                               const float *addend) {
    _mm512_mask_storeu_ps(out, o->lanes, dequantize_outputs(o, sums, row_scale, addend));
}

static void matmul_dot_form(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                            void *scratch) {
    const struct fxq_activations *x = job->x;
    const uint8_t *q = x->packed, *extra = q + x->rows * x->depth;
    struct weight_reader reader = read_weight(job->weight, job->outputs, x->columns, scratch);
    for (int64_t n = n0; n < n1; n += 16) {
        int64_t stride;
        const int8_t *w = weight_rows(&reader, n, 16, &stride);
        const struct outputs_16 o = begin_outputs(job, n, n1);
        if (x->rows == 1 && !job->sums) {
            const __m512i sums = dot_16_minus(w, stride, x->depth, q, extra);
            finish_outputs(&o, sums, x->row[0].scale, to->out + n - n0, to->addend ? to->addend + n - n0 : NULL);
            continue;
        }
        __m512i row_sums;
        if (job->sums) row_sums = _mm512_maskz_loadu_epi32(o.lanes, job->sums + n);
        else row_sums = dot_16(w, stride, x->depth, extra);
        for (int64_t m = 0; m < x->rows; m++) {
            const __m512i zero_point = _mm512_set1_epi32(x->row[m].zero_point);
            const __m512i sums = dot_16(w, stride, x->depth, q + m * x->depth);
            const float *addend = to->addend ? to->addend + m * to->addend_stride + n - n0 : NULL;
            finish_outputs(&o, _mm512_sub_epi32(sums, _mm512_mullo_epi32(zero_point, row_sums)), x->row[m].scale,
                           to->out + m * to->out_stride + n - n0, addend);
        }
    }
}
