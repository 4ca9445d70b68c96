/* The steps of an LSTM, for the includers of avx512.h. A sequence uses weight_hh again at each step, so it is packed once:
 * for 16 hidden units at a time [depth / 4][4 gates][16 units][4 columns], four registers of 64 products each a step of
 * 4 columns. Lanes are units: no sums within a register, and a row's four gates are finished without leaving registers.
 * With AMX the same bytes are "B" tiles (16 rows, 256 bytes apart), and the activations, row by row, "A" tiles. */

enum { UNIT_BLOCK = 16, UNIT_BLOCK_GATES = 4 * UNIT_BLOCK };

/* Units [u0, u1) of weight (4 * hidden, columns) to packed, and their row sums as pairs (see make_pairs). */
static void pack_lstm(const int8_t *weight, int64_t hidden, int64_t columns, int64_t u0, int64_t u1, void *packed,
                      int32_t *pairs) {
    const int64_t depth = fxq_depth(columns);
    for (int64_t u = u0; u < u1; u += UNIT_BLOCK) {
        const int64_t count = u1 - u < UNIT_BLOCK ? u1 - u : UNIT_BLOCK;
        for (int gate = 0; gate < 4; gate++) {
            int8_t *to = (int8_t *)packed + u * 4 * depth + gate * 64;
            const __m512i sums = pack_16(weight + (gate * hidden + u) * columns, count, columns, to);
            _mm512_store_si512(pairs + u * 4 + gate * UNIT_BLOCK, sums);
        }
    }
}

/* The same of 4 bits: packed as int8, with pairs and scales for each group, (groups, 4 * hidden) in the order of the units. */
static void pack_lstm_int4(const struct fxq_linear_int4 *weight, int64_t hidden, int64_t columns, int64_t u0, int64_t u1,
                           void *packed, int32_t *pairs, float *scale, void *scratch) {
    const int64_t depth = fxq_depth(columns), row_bytes = (columns + 1) / 2, groups = weight->groups;
    const int64_t all = (hidden + UNIT_BLOCK - 1) / UNIT_BLOCK * UNIT_BLOCK_GATES;
    for (int64_t at = u0 * 4, end = (u1 + UNIT_BLOCK - 1) / UNIT_BLOCK * UNIT_BLOCK_GATES; at < end; at += UNIT_BLOCK) {
        const int64_t u = at / UNIT_BLOCK_GATES * UNIT_BLOCK, gate = at / UNIT_BLOCK % 4, row = gate * hidden + u;
        const int64_t count = u1 - u < UNIT_BLOCK ? u1 - u : UNIT_BLOCK;
        int8_t *to = (int8_t *)packed + u * 4 * depth + gate * 64;
        unpack(weight->nibbles + row * row_bytes, row_bytes, count, columns, scratch);
        pack_16(scratch, count, columns, to);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t group_end = g + 1 < groups ? (g + 1) * weight->group : depth;
            __m512i sums = _mm512_setzero_si512();
            for (int64_t k = g * weight->group; k < group_end; k += 4) {
                sums = sum_columns(sums, _mm512_load_si512(to + k * UNIT_BLOCK_GATES));
            }
            _mm512_store_si512(pairs + g * all + at, make_pairs(sums));
            for (int64_t i = 0; i < count; i++) {
                const uint32_t bits = (uint32_t)weight->scale[(row + i) * groups + g] << 16;
                memcpy(&scale[g * all + at + i], &bits, sizeof bits);
            }
        }
    }
}

/* gcc puts an operation next to the one that needs it; this keeps operations where they are written. */
FXQ_INLINE __m512 in_order(__m512 x) {
    __asm__("" : "+v"(x));
    return x;
}

/* count x exp(x) - 1, as exp_minus_1 in elementwise.h, to the bit: the fused multiply-adds here have exact products. An
 * operation takes 4 cycles and two begin in each, so that 8 values side by side keep both units busy. */
#define EACH FXQ_UNROLL(8) for (int i = 0; i < count; i++)
FXQ_INLINE void exp_minus_1_of(__m512 *x, int count) {
    __m512 shifted[8], n[8], p[8];
    EACH x[i] = _mm512_max_ps(_mm512_set1_ps(-43.0f), x[i]); /* the second operand where one is NaN */
    EACH x[i] = _mm512_min_ps(_mm512_set1_ps(43.0f), x[i]);
    EACH shifted[i] = _mm512_mul_ps(x[i], _mm512_set1_ps(1.4426950408889634f));
    EACH shifted[i] = in_order(_mm512_add_ps(shifted[i], _mm512_set1_ps(ROUND)));
    EACH n[i] = in_order(_mm512_sub_ps(shifted[i], _mm512_set1_ps(ROUND)));
    EACH x[i] = in_order(_mm512_fnmadd_ps(n[i], _mm512_set1_ps(0.693359375f), x[i])); /* exact: 10 bits by 7 */
    EACH n[i] = in_order(_mm512_mul_ps(n[i], _mm512_set1_ps(-2.1219444e-4f)));
    EACH x[i] = in_order(_mm512_sub_ps(x[i], n[i]));
    EACH p[i] = in_order(_mm512_mul_ps(x[i], _mm512_set1_ps((float)(1.0 / 5040))));
    EACH p[i] = in_order(_mm512_add_ps(p[i], _mm512_set1_ps((float)(1.0 / 720))));
    EACH p[i] = in_order(_mm512_mul_ps(p[i], x[i]));
    EACH p[i] = in_order(_mm512_add_ps(p[i], _mm512_set1_ps((float)(1.0 / 120))));
    EACH p[i] = in_order(_mm512_mul_ps(p[i], x[i]));
    EACH p[i] = in_order(_mm512_add_ps(p[i], _mm512_set1_ps((float)(1.0 / 24))));
    EACH p[i] = in_order(_mm512_mul_ps(p[i], x[i]));
    EACH p[i] = in_order(_mm512_add_ps(p[i], _mm512_set1_ps((float)(1.0 / 6))));
    EACH p[i] = in_order(_mm512_mul_ps(p[i], x[i]));
    EACH p[i] = in_order(_mm512_add_ps(p[i], _mm512_set1_ps(0.5f)));
    EACH n[i] = in_order(_mm512_mul_ps(x[i], x[i]));
    EACH p[i] = in_order(_mm512_mul_ps(p[i], n[i]));
    EACH p[i] = in_order(_mm512_add_ps(p[i], x[i]));
    EACH {
        const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted[i]), 23);
        const __m512 power = _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)));
        x[i] = _mm512_fmadd_ps(p[i], power, _mm512_sub_ps(power, _mm512_set1_ps(1.0f))); /* exact: by a power of two */
    }
}

/* What a block of 16 units needs at the end of each row. */
struct unit_block {
    int64_t u;
    __mmask16 lanes;
    __m512 scale[4];
    __m512i pairs[4];
};

FXQ_INLINE struct unit_block begin_units(const struct fxq_lstm_step *s, int64_t u) {
    struct unit_block b = {.u = u, .lanes = first_lanes(s->u1 - u)};
    FXQ_UNROLL(4) for (int gate = 0; gate < 4; gate++) {
        b.scale[gate] = _mm512_maskz_loadu_ps(b.lanes, s->scale + gate * s->hidden + u);
        b.pairs[gate] = _mm512_load_si512(s->pairs + u * 4 + gate * UNIT_BLOCK);
    }
    return b;
}

/* Some rows of blocks on their way from products to c and h: reference_recurrent.lstm_cell. */
struct unit_row {
    const struct unit_block *block;
    int64_t m;
    __m512i sums[4];
};

/* What follows the exponentials' arguments e: see finish_states. */
FXQ_INLINE void finish_gates(const struct fxq_lstm_step *s, const struct unit_row *rows, __m512 *e, int count) {
    const __m512 two = _mm512_set1_ps(2.0f);
    exp_minus_1_of(e, 4 * count);
    FXQ_UNROLL(2) for (int i = 0; i < count; i++) {
        const struct unit_block *b = rows[i].block;
        const __m512 di = _mm512_add_ps(e[4 * i], two), df = _mm512_add_ps(e[4 * i + 1], two);
        const __m512 eg = e[4 * i + 2], d_o = _mm512_add_ps(e[4 * i + 3], two);
        float *c = s->c + rows[i].m * s->hidden + b->u;
        const __m512 kept = _mm512_div_ps(_mm512_maskz_loadu_ps(b->lanes, c), df);
        const __m512 added = _mm512_div_ps(eg, _mm512_mul_ps(di, _mm512_add_ps(eg, two)));
        _mm512_mask_storeu_ps(c, b->lanes, _mm512_add_ps(kept, added));
        _mm512_mask_storeu_ps(s->out + rows[i].m * s->out_stride + b->u, b->lanes, d_o);
    }
}

/* count (1 or 2) rows' c, and in h's place the denominator of o, which finish_hidden takes from there. The gates
 * i, f and o come out negated, as the exponential wants them, by a negated scale; so a zero may have another sign, which
 * e + 2 does not show. */
FXQ_INLINE void finish_states(const struct fxq_lstm_step *s, const struct unit_row *rows, int count) {
    const __m512 two = _mm512_set1_ps(2.0f);
    __m512 e[8];
    FXQ_UNROLL(8) for (int i = 0; i < 4 * count; i++) {
        const struct unit_block *b = rows[i / 4].block;
        const struct fxq_row *row = &s->h->row[rows[i / 4].m];
        const int gate = i % 4;
        const float *input = s->input_part + rows[i / 4].m * s->input_stride + b->u + gate * s->hidden;
        const __m512 part = _mm512_maskz_loadu_ps(b->lanes, input);
        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(gate == 2 ? row->scale : -row->scale), b->scale[gate]);
        const __m512i sums = correct(rows[i / 4].sums[gate], b->pairs[gate], row->zero_pair);
        const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale);
        e[i] = gate == 2 ? _mm512_mul_ps(_mm512_add_ps(y, part), two) : _mm512_sub_ps(y, part);
    }
    finish_gates(s, rows, e, count);
}

/* The last part of a step: h = tanh(c) / the denominator of o, for all of the thread's units. */
FXQ_INLINE void finish_hidden_of(const float *c, float *h, int64_t left, int count) {
    const __m512 two = _mm512_set1_ps(2.0f);
    __m512 e[8];
    EACH e[i] = _mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(left - 16 * i), c + 16 * i), two);
    exp_minus_1_of(e, count);
    EACH {
        const __mmask16 lanes = first_lanes(left - 16 * i);
        const __m512 d_o = _mm512_maskz_loadu_ps(lanes, h + 16 * i);
        _mm512_mask_storeu_ps(h + 16 * i, lanes, _mm512_div_ps(e[i], _mm512_mul_ps(d_o, _mm512_add_ps(e[i], two))));
    }
}

static void finish_hidden(const struct fxq_lstm_step *s) {
    for (int64_t m = 0; m < s->h->rows; m++) {
        const float *c = s->c + m * s->hidden;
        float *h = s->out + m * s->out_stride;
        int64_t u = s->u0;
        for (; s->u1 - u > 112; u += 128) finish_hidden_of(c + u, h + u, s->u1 - u, 8);
        for (; s->u1 - u > 16; u += 32) finish_hidden_of(c + u, h + u, s->u1 - u, 2);
        if (u < s->u1) finish_hidden_of(c + u, h + u, s->u1 - u, 1);
    }
}

/* One row: 8 accumulators, since a product's result takes 5 cycles and two begin in each. */
FXQ_INLINE void multiply_units_1(const int8_t *w, int64_t columns, const uint8_t *q, __m512i sums[4]) {
    __m512i odd[4];
    FXQ_UNROLL(4) for (int gate = 0; gate < 4; gate++) sums[gate] = odd[gate] = _mm512_setzero_si512();
    for (int64_t k = 0; k < columns; k += 8, w += 512) {
        int32_t four[2];
        memcpy(four, q + k, sizeof four);
        const __m512i a = _mm512_set1_epi32(four[0]), b = _mm512_set1_epi32(four[1]);
        FXQ_UNROLL(4) for (int gate = 0; gate < 4; gate++) {
            sums[gate] = add_products(sums[gate], a, w + 64 * gate);
            odd[gate] = add_products(odd[gate], b, w + 256 + 64 * gate);
        }
    }
    FXQ_UNROLL(4) for (int gate = 0; gate < 4; gate++) sums[gate] = _mm512_add_epi32(sums[gate], odd[gate]);
}

/* `count` rows (a constant, 2 to 4): count * 4 accumulators, each weight read once. */
FXQ_INLINE void multiply_units(const int8_t *w, int64_t columns, const uint8_t *q, int64_t depth, int count,
                               __m512i (*sums)[4]) {
    FXQ_UNROLL(16) for (int i = 0; i < 4 * count; i++) sums[i / 4][i % 4] = _mm512_setzero_si512();
    for (int64_t k = 0; k < columns; k += 4, w += 256) {
        __m512i weights[4];
        FXQ_UNROLL(4) for (int gate = 0; gate < 4; gate++) weights[gate] = _mm512_load_si512(w + 64 * gate);
        FXQ_UNROLL(4) for (int m = 0; m < count; m++) {
            int32_t four;
            memcpy(&four, q + m * depth + k, sizeof four);
            const __m512i a = _mm512_set1_epi32(four);
            FXQ_UNROLL(4) for (int gate = 0; gate < 4; gate++) {
                __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[m][gate]) : "v"(a), "v"(weights[gate])); /* as add_products */
            }
        }
    }
}

FXQ_INLINE void step_rows(const struct fxq_lstm_step *s, const struct unit_block *b, int64_t m, int count) {
    const int64_t depth = s->h->depth;
    const int8_t *w = (const int8_t *)s->packed + b->u * 4 * depth;
    __m512i sums[4][4];
    multiply_units(w, depth, (const uint8_t *)s->h->packed + m * depth, depth, count, sums);
    struct unit_row rows[4];
    FXQ_UNROLL(4) for (int i = 0; i < count; i++) {
        rows[i] = (struct unit_row){b, m + i, {sums[i][0], sums[i][1], sums[i][2], sums[i][3]}};
    }
    finish_states(s, rows, count < 2 ? count : 2);
    if (count > 2) finish_states(s, rows + 2, count - 2);
}

/* A single row: two blocks of units together, for finish_states' sake. */
static void step_one_row(const struct fxq_lstm_step *s, int64_t m) {
    const int64_t depth = s->h->depth;
    const int8_t *w = s->packed;
    const uint8_t *q = (const uint8_t *)s->h->packed + m * depth;
    int64_t u = s->u0;
    for (; u + UNIT_BLOCK < s->u1; u += 2 * UNIT_BLOCK) {
        const struct unit_block b0 = begin_units(s, u), b1 = begin_units(s, u + UNIT_BLOCK);
        struct unit_row rows[2] = {{.block = &b0, .m = m}, {.block = &b1, .m = m}};
        multiply_units_1(w + u * 4 * depth, depth, q, rows[0].sums);
        multiply_units_1(w + (u + UNIT_BLOCK) * 4 * depth, depth, q, rows[1].sums);
        finish_states(s, rows, 2);
    }
    if (u < s->u1) {
        const struct unit_block b = begin_units(s, u);
        struct unit_row row = {.block = &b, .m = m};
        multiply_units_1(w + u * 4 * depth, depth, q, row.sums);
        finish_states(s, &row, 1);
    }
}

/* The gates of `count` rows (a constant, 1 to 4) by 4-bit weights: a group's products are added to those before it. */
FXQ_INLINE void add_groups(const struct fxq_lstm_step *s, const struct unit_block *b, int64_t m, int count, __m512 (*e)[4]) {
    const int64_t depth = s->h->depth, all = (s->hidden + UNIT_BLOCK - 1) / UNIT_BLOCK * UNIT_BLOCK_GATES;
    const int8_t *w = (const int8_t *)s->packed + b->u * 4 * depth;
    const uint8_t *q = (const uint8_t *)s->h->packed + m * depth;
    FXQ_UNROLL(16) for (int i = 0; i < 4 * count; i++) {
        const float *input = s->input_part + (m + i / 4) * s->input_stride + b->u + i % 4 * s->hidden;
        e[i / 4][i % 4] = _mm512_maskz_loadu_ps(b->lanes, input);
    }
    for (int64_t g = 0, k = 0; g < s->groups; g++, k += s->group) {
        const int64_t columns = g + 1 < s->groups ? s->group : depth - k, at = g * all + b->u * 4;
        __m512i sums[4][4];
        if (count == 1) multiply_units_1(w + k * UNIT_BLOCK_GATES, columns, q + k, sums[0]);
        else multiply_units(w + k * UNIT_BLOCK_GATES, columns, q + k, depth, count, sums);
        FXQ_UNROLL(16) for (int i = 0; i < 4 * count; i++) {
            const struct fxq_row *row = &s->h->row[m + i / 4];
            const int64_t gate = at + i % 4 * UNIT_BLOCK;
            const __m512i whole = correct(sums[i / 4][i % 4], _mm512_load_si512(s->pairs + gate), row->zero_pair);
            const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(row->scale), _mm512_load_ps(s->scale + gate));
            e[i / 4][i % 4] = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale), e[i / 4][i % 4]);
        }
    }
    FXQ_UNROLL(16) for (int i = 0; i < 4 * count; i++) {
        const __m512 y = e[i / 4][i % 4];
        e[i / 4][i % 4] = i % 4 == 2 ? _mm512_add_ps(y, y) : _mm512_sub_ps(_mm512_setzero_ps(), y);
    }
}

FXQ_INLINE void step_rows_int4(const struct fxq_lstm_step *s, int64_t u, int64_t m, int count) {
    const struct unit_block b = {.u = u, .lanes = first_lanes(s->u1 - u)};
    __m512 e[4][4];
    add_groups(s, &b, m, count, e);
    struct unit_row rows[4];
    FXQ_UNROLL(4) for (int i = 0; i < count; i++) rows[i] = (struct unit_row){.block = &b, .m = m + i};
    finish_gates(s, rows, e[0], count < 2 ? count : 2);
    if (count > 2) finish_gates(s, rows + 2, e[2], count - 2);
}

/* A single row: two blocks of units together, as in step_one_row. */
static void step_one_row_int4(const struct fxq_lstm_step *s, int64_t m) {
    int64_t u = s->u0;
    for (; u + UNIT_BLOCK < s->u1; u += 2 * UNIT_BLOCK) {
        const struct unit_block b0 = {.u = u, .lanes = 0xffff};
        const struct unit_block b1 = {.u = u + UNIT_BLOCK, .lanes = first_lanes(s->u1 - u - UNIT_BLOCK)};
        const struct unit_row rows[2] = {{.block = &b0, .m = m}, {.block = &b1, .m = m}};
        __m512 e[2][4];
        add_groups(s, &b0, m, 1, e);
        add_groups(s, &b1, m, 1, e + 1);
        finish_gates(s, rows, e[0], 2);
    }
    if (u < s->u1) step_rows_int4(s, u, m, 1);
}

static void lstm_step_int4(const struct fxq_lstm_step *s) {
    const int64_t rows = s->h->rows, most = rows % 4 == 1 ? rows - 1 : rows;
    for (int64_t u = s->u0; most && u < s->u1; u += UNIT_BLOCK) {
        int64_t m = 0;
        for (; m + 4 <= most; m += 4) step_rows_int4(s, u, m, 4);
        if (most - m == 3) step_rows_int4(s, u, m, 3);
        else if (most - m == 2) step_rows_int4(s, u, m, 2);
    }
    if (most < rows) step_one_row_int4(s, most);
    finish_hidden(s);
}

/* A step without tiles, for any number of rows. */
static void lstm_step_by_rows(const struct fxq_lstm_step *s) {
    const int64_t rows = s->h->rows, most = rows % 4 == 1 ? rows - 1 : rows;
    for (int64_t u = s->u0; most && u < s->u1; u += UNIT_BLOCK) {
        const struct unit_block b = begin_units(s, u);
        int64_t m = 0;
        for (; m + 4 <= most; m += 4) step_rows(s, &b, m, 4);
        if (most - m == 3) step_rows(s, &b, m, 3);
        else if (most - m == 2) step_rows(s, &b, m, 2);
    }
    if (most < rows) step_one_row(s, most);
    finish_hidden(s);
}
#define FXQ_LSTM_INT4 .pack_lstm_int4 = pack_lstm_int4, .lstm_step_int4 = lstm_step_int4
