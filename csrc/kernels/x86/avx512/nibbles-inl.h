/* The gemv of grouped weights: their bytes are the limit, so they are read as they lie, and unpacked in registers.
 *
 * load_pairs() gives 64 even columns and 64 odd ones, so that the activations lie in that order too: nothing is
 * interleaved. Without the shift, u = w + 8 of 4 bits. vpdpbusd takes u as the unsigned side and a = q - 128 as the
 * signed one:
 *
 *   sum((q - z) w) = sum(a u) + (128 - z) sum(u) - 8 sum(q - z)
 *
 * where the last sum is the row's alone (`less`), and a and the ones of sum(u) are 0 beyond the last column. A lane
 * has the sums of 8 columns; 4, 8 or 16 lanes are a group, added up for 16 outputs at once.
 *
 * Expects: common-inl.h and MOST_NIBBLE_ROWS. */
#include "kernels/x86/avx512/pairs-inl.h"

enum { NIBBLE_ROWS = 4 /* that a register of weights serves */ };

/* The even bytes of 128, then the odd ones. */
FXQ_INLINE void part_columns(const uint8_t *values, int8_t *out) {
    const __m512i bias = _mm512_set1_epi8(-128);
    for (int i = 0; i < 2; i++) {
        const __m512i v = _mm512_xor_si512(_mm512_loadu_si512(values + 64 * i), bias);
        _mm256_storeu_si256((__m256i *)(out + 32 * i), _mm512_cvtepi16_epi8(v));
        _mm256_storeu_si256((__m256i *)(out + 64 + 32 * i), _mm512_cvtepi16_epi8(_mm512_srli_epi16(v, 8)));
    }
}

static void quantize_nibbles(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    const int64_t group = x->group, columns = x->columns, depth = fxq_nibble_depth(columns);
    for (int r = 0; r < count; r++) {
        const struct fxq_row *row = &x->row[first + r];
        int8_t *out = (int8_t *)x->packed + (first + r) * depth;
        int32_t *less = x->less + (first + r) * x->groups;
        for (int64_t k = 0; k < columns; k += PAIR_COLUMNS, out += PAIR_COLUMNS) {
            const int64_t width = columns - k < PAIR_COLUMNS ? columns - k : PAIR_COLUMNS;
            uint8_t values[PAIR_COLUMNS];
            memset(values, 128, sizeof values);
            quantize_values(rows[r] + k, width, row, x->qmax, values);
            for (int64_t i = 0; i < width; i += group) {
                const int64_t in_group = width - i < group ? width - i : group;
                int32_t sum = 0;
                for (int64_t j = 0; j < in_group; j++) sum += values[i + j];
                *less++ = sum - (int32_t)in_group * row->zero_point;
            }
            part_columns(values, out);
        }
    }
}

/* Lane L of 128 bits of f[j] has the sums of 32 columns, of outputs 4 j .. 4 j + 3. Gives the groups' sums, lanes:
 * outputs. */
FXQ_INLINE void sum_groups(const __m512i v[16], int64_t group, __m512i sums[4]) {
    __m512i f[4];
    FXQ_FOR(4, int i = 0; i < 4; i++) {
        const __m512i a = v[4 * i], b = v[4 * i + 1], c = v[4 * i + 2], d = v[4 * i + 3];
        const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        f[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    }
    __m512i even0 = _mm512_shuffle_i32x4(f[0], f[1], 0x88), odd0 = _mm512_shuffle_i32x4(f[0], f[1], 0xdd);
    __m512i even1 = _mm512_shuffle_i32x4(f[2], f[3], 0x88), odd1 = _mm512_shuffle_i32x4(f[2], f[3], 0xdd);
    if (group == 32) {
        sums[0] = _mm512_shuffle_i32x4(even0, even1, 0x88);
        sums[1] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
        sums[2] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
        sums[3] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
        return;
    }
    even0 = _mm512_add_epi32(even0, odd0);
    even1 = _mm512_add_epi32(even1, odd1);
    sums[0] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    sums[1] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    sums[2] = sums[3] = _mm512_setzero_si512();
    if (group == 128) sums[0] = _mm512_add_epi32(sums[0], sums[1]);
}

/* The scales of groups [g, g + count) of 16 outputs, `stride` groups a row: a word holds two of them. */
FXQ_INLINE void load_scales(const uint16_t *scale, int64_t stride, int count, __mmask16 lanes, bool is_first,
                            __m512 s[4]) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i at = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)stride)), none = _mm512_setzero_si512();
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    int g = 0;
    for (; g + 2 <= count; g += 2) {
        const __m512i two = _mm512_mask_i32gather_epi32(none, lanes, at, scale + g, 2);
        s[g] = _mm512_castsi512_ps(_mm512_slli_epi32(two, 16));
        s[g + 1] = _mm512_castsi512_ps(_mm512_and_si512(two, high));
    }
    if (g == count) return;
    if (stride == 1) { /* the rows' only one: they lie next to each other */
        const __m512i one = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, scale));
        s[g] = _mm512_castsi512_ps(_mm512_slli_epi32(one, 16));
    } else { /* with the one before it, since after a row's last one may come nothing; a row's first has none before it
              */
        const bool has_before = g > 0 || !is_first;
        const __m512i two = _mm512_mask_i32gather_epi32(none, lanes, at, scale + g - has_before, 2);
        s[g] = _mm512_castsi512_ps(has_before ? _mm512_and_si512(two, high) : _mm512_slli_epi32(two, 16));
    }
}

/* What 16 outputs need of the step of 128 columns from k on. */
struct nibble_step {
    enum fxq_format format; /* a constant wherever this is inlined */
    const uint8_t *weights; /* of the first output */
    int64_t row_bytes, depth;
    const int8_t *values; /* of the first row */
    __mmask64 bytes;      /* that a row has in this step */
    __m512i even_ones, odd_ones;
};

/* t[m][i]: lanes of sum(a u) + (128 - z) sum(u) of `rows` rows (a constant wherever this is inlined) and 16 outputs. */
FXQ_INLINE void multiply_nibbles(const struct nibble_step *s, const struct fxq_row *row, int rows, int64_t outputs,
                                 __m512i t[][16]) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i even[NIBBLE_ROWS], odd[NIBBLE_ROWS], factor[NIBBLE_ROWS];
    FXQ_FOR(4, int m = 0; m < rows; m++) {
        even[m] = _mm512_loadu_si512(s->values + m * s->depth);
        odd[m] = _mm512_loadu_si512(s->values + m * s->depth + 64);
        factor[m] = _mm512_set1_epi32(128 - row[m].zero_point); /* the high half meets a 0: a lane's sum(u) is small */
    }
    FXQ_FOR(16, int i = 0; i < 16; i++) {
        _mm_prefetch((const char *)s->weights + (16 + i) * s->row_bytes, _MM_HINT_T0); /* for the next 16 outputs */
        __m512i u, u_odd;
        load_pairs(s->format, i < outputs ? s->bytes : 0, s->weights + i * s->row_bytes, &u, &u_odd);
        const __m512i sum = dot_bytes(dot_bytes(zero, u, s->even_ones), u_odd, s->odd_ones);
        FXQ_FOR(4, int m = 0; m < rows; m++) {
            const __m512i products = dot_bytes(dot_bytes(zero, u, even[m]), u_odd, odd[m]);
            t[m][i] = _mm512_dpwssd_epi32(products, sum, factor[m]);
        }
    }
}

/* `rows` rows from m on by outputs [n, n + 16), as far as there are `left`. */
FXQ_INLINE void matmul_nibbles_16(const struct fxq_matmul *job, int64_t m, int rows, int64_t n, int64_t left,
                                  int64_t n0, const struct fxq_target *to, enum fxq_format format, int64_t group) {
    const struct fxq_activations *x = job->x;
    const int64_t columns = x->columns, row_bytes = fxq_row_bytes(format, columns), groups = x->groups;
    const int each = (int)(PAIR_COLUMNS / group);
    const struct pair_code code = pair_code_of(format);
    const struct outputs_16 o = begin_outputs(job, n, n + left);
    const struct fxq_target target = fxq_target_at(to, m, n - n0);
    struct nibble_step s = {.format = format,
                            .weights = (const uint8_t *)job->weight->data + n * row_bytes,
                            .row_bytes = row_bytes,
                            .depth = fxq_nibble_depth(columns),
                            .bytes = bytes_of_columns(format, columns),
                            .even_ones = _mm512_set1_epi8(1),
                            .odd_ones = _mm512_set1_epi8(1)};
    s.values = (const int8_t *)x->packed + m * s.depth;
    __m512 y[NIBBLE_ROWS];
    FXQ_FOR(4, int i = 0; i < rows; i++) {
        y[i] = begin_sum(&o, target.addend ? target.addend + i * target.addend_stride : NULL);
    }
    for (int64_t g = 0, k = 0; k < columns; g += each, k += PAIR_COLUMNS) {
        const int64_t width = columns - k;
        if (width < PAIR_COLUMNS) {
            s.bytes = bytes_of_columns(format, width);
            s.even_ones = _mm512_maskz_set1_epi8(~0ull >> (64 - (width + 1) / 2), 1);
            s.odd_ones = _mm512_maskz_set1_epi8(~0ull >> (63 - width / 2) >> 1, 1);
        }
        __m512i t[NIBBLE_ROWS][16];
        multiply_nibbles(&s, x->row + m, rows, left, t);
        const int count = groups - g < each ? (int)(groups - g) : each;
        __m512 scale[4];
        load_scales((const uint16_t *)job->weight->scale + n * groups + g, groups, count, o.lanes, g == 0, scale);
        FXQ_FOR(4, int i = 0; i < rows; i++) {
            __m512i sums[4];
            sum_groups(t[i], group, sums);
            const __m512 row_scale = _mm512_set1_ps(x->row[m + i].scale);
            FXQ_FOR(4, int j = 0; j < each; j++) {
                if (j >= count) break;
                const __m512i less = _mm512_set1_epi32(code.offset * x->less[(m + i) * groups + g + j]);
                const __m512i sum = code.shift ? _mm512_srai_epi32(sums[j], code.shift) : sums[j];
                const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, less));
                y[i] = _mm512_add_ps(_mm512_mul_ps(whole, _mm512_mul_ps(row_scale, scale[j])), y[i]);
            }
        }
        s.weights += fxq_row_bytes(format, PAIR_COLUMNS);
        s.values += PAIR_COLUMNS;
    }
    FXQ_FOR(4, int i = 0; i < rows; i++) store_outputs(&o, end_outputs(&o, y[i]), target.out + i * target.out_stride);
}

FXQ_INLINE void matmul_nibbles_in(const struct fxq_matmul *job, int64_t m, int rows, int64_t n0, int64_t n1,
                                  const struct fxq_target *to, enum fxq_format format, int64_t group) {
    int64_t n = n0;
    for (; n + 16 <= n1; n += 16) matmul_nibbles_16(job, m, rows, n, 16, n0, to, format, group);
    if (n < n1) matmul_nibbles_16(job, m, rows, n, n1 - n, n0, to, format, group);
}

/* The compiler makes a form for each number of rows, format and size of a group. */
FXQ_INLINE void matmul_nibbles_of(const struct fxq_matmul *job, int64_t m, int rows, int64_t n0, int64_t n1,
                                  const struct fxq_target *to, enum fxq_format format) {
    switch (job->x->group) {
        case 32: matmul_nibbles_in(job, m, rows, n0, n1, to, format, 32); break;
        case 64: matmul_nibbles_in(job, m, rows, n0, n1, to, format, 64); break;
        default: matmul_nibbles_in(job, m, rows, n0, n1, to, format, 128);
    }
}

FXQ_INLINE void matmul_pairs(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                             enum fxq_format format) {
    for (int64_t m = 0; m < job->x->rows;) {
        const int64_t left = job->x->rows - m;
        const int rows = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (rows == 4) matmul_nibbles_of(job, m, 4, n0, n1, to, format);
        else if (rows == 2) matmul_nibbles_of(job, m, 2, n0, n1, to, format);
        else matmul_nibbles_of(job, m, 1, n0, n1, to, format);
        m += rows;
    }
}

static void matmul_nibbles(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to) {
    if (job->weight->format == FXQ_INT3) matmul_pairs(job, n0, n1, to, FXQ_INT3);
    else matmul_pairs(job, n0, n1, to, FXQ_INT4);
}
#define FXQ_NIBBLES \
    .most_nibble_rows = MOST_NIBBLE_ROWS, .quantize_nibbles = quantize_nibbles, .matmul_nibbles = matmul_nibbles
