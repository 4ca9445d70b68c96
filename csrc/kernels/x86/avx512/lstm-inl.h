/* The steps of an LSTM. A sequence uses weight_hh again at each step, so it is packed once:
 * for 16 hidden units at a time [depth / 4][4 gates][16 units][4 columns], four registers of 64 products each a step of
 * 4 columns. Lanes are units: no sums within a register, and a row's four gates are finished without leaving registers.
 * With AMX the same bytes are "B" tiles (16 rows, 256 bytes apart), and the activations, row by row, "A" tiles.
 *
 * Expects: packing-inl.h. */

#include "kernels/x86/avx512/gates-inl.h"

/* Units [u0, u1) of weight (4 * hidden, columns) to packed, and their row sums as pairs (see make_pairs). */
static void pack_rows(const struct fxq_weight *weight, int64_t u0, int64_t u1, void *packed, int32_t *pairs) {
    const int64_t columns = weight->columns, depth = fxq_depth(columns), hidden = weight->outputs / 4;
    for (int64_t u = u0; u < u1; u += UNIT_BLOCK) {
        const int64_t count = u1 - u < UNIT_BLOCK ? u1 - u : UNIT_BLOCK;
        for (int gate = 0; gate < 4; gate++) {
            int8_t *to = (int8_t *)packed + u * 4 * depth + gate * 64;
            const __m512i sums =
                pack_16((const int8_t *)weight->data + (gate * hidden + u) * columns, count, columns, to);
            _mm512_store_si512(pairs + u * 4 + gate * UNIT_BLOCK, sums);
        }
    }
}

/* The same of a grouped weight: packed as int8, with pairs and scales for each group, (groups, 4 * hidden) in the order
 * of the units. */
static void pack_groups(const struct fxq_weight *weight, int64_t u0, int64_t u1, void *packed, int32_t *pairs,
                        float *scale, void *scratch) {
    const int64_t columns = weight->columns, depth = fxq_depth(columns), groups = weight->groups,
                  hidden = weight->outputs / 4;
    const int64_t all = (hidden + UNIT_BLOCK - 1) / UNIT_BLOCK * UNIT_BLOCK_GATES;
    for (int64_t at = u0 * 4, end = (u1 + UNIT_BLOCK - 1) / UNIT_BLOCK * UNIT_BLOCK_GATES; at < end; at += UNIT_BLOCK) {
        const int64_t u = at / UNIT_BLOCK_GATES * UNIT_BLOCK, gate = at / UNIT_BLOCK % 4, row = gate * hidden + u;
        const int64_t count = u1 - u < UNIT_BLOCK ? u1 - u : UNIT_BLOCK;
        int8_t *to = (int8_t *)packed + u * 4 * depth + gate * 64;
        unpack(weight, row, count, 0, columns, scratch);
        pack_16(scratch, count, columns, to);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t group_end = g + 1 < groups ? (g + 1) * weight->group : depth;
            __m512i sums = _mm512_setzero_si512();
            for (int64_t k = g * weight->group; k < group_end; k += 4) {
                sums = sum_columns(sums, _mm512_load_si512(to + k * UNIT_BLOCK_GATES));
            }
            _mm512_store_si512(pairs + g * all + at, make_pairs(sums));
            for (int64_t i = 0; i < count; i++) {
                const uint32_t bits = (uint32_t)((const uint16_t *)weight->scale)[(row + i) * groups + g] << 16;
                memcpy(&scale[g * all + at + i], &bits, sizeof bits);
            }
        }
    }
}

static void pack_lstm(const struct fxq_weight *weight, int64_t u0, int64_t u1, void *packed, int32_t *pairs,
                      float *scale, void *scratch) {
    if (weight->group) pack_groups(weight, u0, u1, packed, pairs, scale, scratch);
    else pack_rows(weight, u0, u1, packed, pairs);
}

/* One row: 8 accumulators, since a product's result takes 5 cycles and two begin in each. */
FXQ_INLINE void add_products_1(const int8_t *w, int64_t columns, const uint8_t *q, __m512i sums[2][4]) {
    for (int64_t k = 0; k < columns; k += 8, w += 512) {
        int32_t four[2];
        memcpy(four, q + k, sizeof four);
        const __m512i a = _mm512_set1_epi32(four[0]), b = _mm512_set1_epi32(four[1]);
        FXQ_FOR(4, int gate = 0; gate < 4; gate++) {
            sums[0][gate] = add_products(sums[0][gate], a, w + 64 * gate);
            sums[1][gate] = add_products(sums[1][gate], b, w + 256 + 64 * gate);
        }
    }
}

FXQ_INLINE void multiply_units_1(const int8_t *w, int64_t columns, const uint8_t *q, __m512i sums[4]) {
    __m512i both[2][4];
    FXQ_FOR(4, int gate = 0; gate < 4; gate++) both[0][gate] = both[1][gate] = _mm512_setzero_si512();
    add_products_1(w, columns, q, both);
    FXQ_FOR(4, int gate = 0; gate < 4; gate++) sums[gate] = _mm512_add_epi32(both[0][gate], both[1][gate]);
}

/* `count` rows (a constant, 2 to 4): count * 4 accumulators, each weight read once. */
FXQ_INLINE void multiply_units(const int8_t *w, int64_t columns, const uint8_t *q, int64_t depth, int count,
                               __m512i (*sums)[4]) {
    FXQ_FOR(16, int i = 0; i < 4 * count; i++) sums[i / 4][i % 4] = _mm512_setzero_si512();
    add_packed(q, depth, count, w, columns, sums);
}

FXQ_INLINE void step_rows(const struct fxq_lstm_step *s, const struct unit_block *b, int64_t m, int count) {
    const int64_t depth = s->h->depth;
    const int8_t *w = (const int8_t *)s->packed + b->u * 4 * depth;
    __m512i sums[4][4];
    multiply_units(w, depth, (const uint8_t *)s->h->packed + m * depth, depth, count, sums);
    struct unit_row rows[4];
    FXQ_FOR(4, int i = 0; i < count; i++) {
        rows[i] = (struct unit_row){b, m + i, {sums[i][0], sums[i][1], sums[i][2], sums[i][3]}};
    }
    finish_states(s, rows, count < 2 ? count : 2);
    if (count > 2) finish_states(s, rows + 2, count - 2);
}

/* A single row. The exponentials of a block come part by part between the products of the next one: those wait for the
 * L2 cache, these for each other. */
static void step_one_row(const struct fxq_lstm_step *s, int64_t m) {
    const int64_t depth = s->h->depth, part = depth / EXP_PARTS; /* a multiple of 8 */
    const uint8_t *q = (const uint8_t *)s->h->packed + m * depth;
    const int8_t *w = (const int8_t *)s->packed + s->u0 * 4 * depth;
    struct unit_row unit = {.m = m};
    multiply_units_1(w, depth, q, unit.sums);
    for (int64_t u = s->u0; u < s->u1; u += UNIT_BLOCK) {
        const struct unit_block b = begin_units(s, u);
        struct exponentials e;
        unit.block = &b;
        find_arguments(s, &unit, e.x);
        if (u + UNIT_BLOCK < s->u1) {
            __m512i sums[2][4];
            FXQ_FOR(4, int gate = 0; gate < 4; gate++) sums[0][gate] = sums[1][gate] = _mm512_setzero_si512();
            w += 4 * UNIT_BLOCK * depth;
            FXQ_FOR(8, int i = 0; i < EXP_PARTS; i++) {
                add_products_1(w + i * part * UNIT_BLOCK_GATES, part, q + i * part, sums);
                exp_minus_1_part(&e, 4, i);
            }
            FXQ_FOR(4, int gate = 0; gate < 4; gate++) unit.sums[gate] = _mm512_add_epi32(sums[0][gate], sums[1][gate]);
        } else {
            exp_minus_1_of(&e, 4);
        }
        finish_unit(s, &unit, e.x);
    }
}

/* The gates of `count` rows (a constant, 1 to 4) by a grouped weight: a group's products are added to those before it.
 */
FXQ_INLINE void add_groups(const struct fxq_lstm_step *s, const struct unit_block *b, int64_t m, int count, __m512 *e) {
    const int64_t depth = s->h->depth, all = (s->hidden + UNIT_BLOCK - 1) / UNIT_BLOCK * UNIT_BLOCK_GATES;
    const int8_t *w = (const int8_t *)s->packed + b->u * 4 * depth;
    const uint8_t *q = (const uint8_t *)s->h->packed + m * depth;
    FXQ_FOR(16, int i = 0; i < 4 * count; i++) {
        const float *input = s->input_part + (m + i / 4) * s->input_stride + b->u + i % 4 * s->hidden;
        e[i] = _mm512_maskz_loadu_ps(b->lanes, input);
    }
    const int64_t group = s->weight->group, groups = s->weight->groups;
    for (int64_t g = 0, k = 0; g < groups; g++, k += group) {
        const int64_t columns = g + 1 < groups ? group : depth - k, at = g * all + b->u * 4;
        __m512i sums[4][4];
        if (count == 1) multiply_units_1(w + k * UNIT_BLOCK_GATES, columns, q + k, sums[0]);
        else multiply_units(w + k * UNIT_BLOCK_GATES, columns, q + k, depth, count, sums);
        FXQ_FOR(16, int i = 0; i < 4 * count; i++) {
            const struct fxq_row *row = &s->h->row[m + i / 4];
            const int64_t gate = at + i % 4 * UNIT_BLOCK;
            const __m512i whole = correct(sums[i / 4][i % 4], _mm512_load_si512(s->pairs + gate), row->zero_pair);
            const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(row->scale), _mm512_load_ps(s->scale + gate));
            e[i] = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale), e[i]);
        }
    }
    FXQ_FOR(16, int i = 0; i < 4 * count; i++) {
        const __m512 y = e[i];
        e[i] = i % 4 == 2 ? _mm512_add_ps(y, y) : _mm512_sub_ps(_mm512_setzero_ps(), y);
    }
}

FXQ_INLINE void step_group_rows(const struct fxq_lstm_step *s, int64_t u, int64_t m, int count) {
    const struct unit_block b = {.u = u, .lanes = first_lanes(s->u1 - u)};
    __m512 x[16];
    add_groups(s, &b, m, count, x);
    FXQ_FOR(2, int first = 0; first < count; first += 2) {
        struct unit_row rows[2] = {{.block = &b, .m = m + first}, {.block = &b, .m = m + first + 1}};
        struct exponentials e;
        const int both = count - first < 2 ? 1 : 2;
        FXQ_FOR(8, int i = 0; i < 4 * both; i++) e.x[i] = x[4 * first + i];
        finish_gates(s, rows, &e, both);
    }
}

/* A single row: two blocks of units together, so that there are 8 exponentials side by side. */
static void step_one_group_row(const struct fxq_lstm_step *s, int64_t m) {
    int64_t u = s->u0;
    for (; u + UNIT_BLOCK < s->u1; u += 2 * UNIT_BLOCK) {
        const struct unit_block b0 = {.u = u, .lanes = 0xffff};
        const struct unit_block b1 = {.u = u + UNIT_BLOCK, .lanes = first_lanes(s->u1 - u - UNIT_BLOCK)};
        const struct unit_row rows[2] = {{.block = &b0, .m = m}, {.block = &b1, .m = m}};
        struct exponentials e;
        add_groups(s, &b0, m, 1, e.x);
        add_groups(s, &b1, m, 1, e.x + 4);
        finish_gates(s, rows, &e, 2);
    }
    if (u < s->u1) step_group_rows(s, u, m, 1);
}

static void lstm_step_by_groups(const struct fxq_lstm_step *s) {
    const int64_t rows = s->h->rows, most = rows % 4 == 1 ? rows - 1 : rows;
    for (int64_t u = s->u0; most && u < s->u1; u += UNIT_BLOCK) {
        int64_t m = 0;
        for (; m + 4 <= most; m += 4) step_group_rows(s, u, m, 4);
        if (most - m == 3) step_group_rows(s, u, m, 3);
        else if (most - m == 2) step_group_rows(s, u, m, 2);
    }
    if (most < rows) step_one_group_row(s, most);
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
