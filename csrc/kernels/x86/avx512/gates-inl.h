/* An LSTM's gates: from the products of a block of 16 hidden units to c and h.
 *
 * Expects: common-inl.h, exponentials-inl.h. */

enum { UNIT_BLOCK = 16, UNIT_BLOCK_GATES = 4 * UNIT_BLOCK };

/* What a block of 16 units needs at the end of each row. */
struct unit_block {
    int64_t u;
    __mmask16 lanes;
    __m512 scale[4];
    __m512i pairs[4];
};

FXQ_INLINE struct unit_block begin_units(const struct fxq_lstm_step *s, int64_t u) {
    struct unit_block b = {.u = u, .lanes = first_lanes(s->u1 - u)};
    FXQ_FOR(4, int gate = 0; gate < 4; gate++) {
        b.scale[gate] = _mm512_maskz_loadu_ps(b.lanes, (const float *)s->weight->scale + gate * s->hidden + u);
        b.pairs[gate] = _mm512_load_si512(s->pairs + u * 4 + gate * UNIT_BLOCK);
    }
    return b;
}

/* Some rows of blocks on their way from products to c and h: fxquant.ops.elementwise.lstm_cell. */
struct unit_row {
    const struct unit_block *block;
    int64_t m;
    __m512i sums[4];
};

/* The four gates' arguments of the exponentials. The gates i, f and o come out negated, as the exponential wants them,
 * by a negated scale; so a zero may have another sign, which e + 2 does not show. */
FXQ_INLINE void find_arguments(const struct fxq_lstm_step *s, const struct unit_row *unit, __m512 *x) {
    const struct unit_block *b = unit->block;
    const struct fxq_row *row = &s->h->row[unit->m];
    FXQ_FOR(4, int gate = 0; gate < 4; gate++) {
        const float *input = s->input_part + unit->m * s->input_stride + b->u + gate * s->hidden;
        const __m512 part = _mm512_maskz_loadu_ps(b->lanes, input);
        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(gate == 2 ? row->scale : -row->scale), b->scale[gate]);
        const __m512i sums = correct(unit->sums[gate], b->pairs[gate], row->zero_pair);
        const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale);
        x[gate] = gate == 2 ? _mm512_mul_ps(_mm512_add_ps(y, part), _mm512_set1_ps(2.0f)) : _mm512_sub_ps(y, part);
    }
}

/* From the four exponentials e to c, and in h's place the denominator of o, which finish_hidden takes from there. */
FXQ_INLINE void finish_unit(const struct fxq_lstm_step *s, const struct unit_row *unit, const __m512 *e) {
    const __m512 two = _mm512_set1_ps(2.0f);
    const struct unit_block *b = unit->block;
    const __m512 di = _mm512_add_ps(e[0], two), df = _mm512_add_ps(e[1], two);
    const __m512 eg = e[2], d_o = _mm512_add_ps(e[3], two);
    float *c = s->c + unit->m * s->hidden + b->u;
    const __m512 kept = _mm512_div_ps(_mm512_maskz_loadu_ps(b->lanes, c), df);
    const __m512 added = _mm512_div_ps(eg, _mm512_mul_ps(di, _mm512_add_ps(eg, two)));
    _mm512_mask_storeu_ps(c, b->lanes, _mm512_add_ps(kept, added));
    _mm512_mask_storeu_ps(s->out + unit->m * s->out_stride + b->u, b->lanes, d_o);
}

/* count (1 or 2) rows, of which e has the arguments. */
FXQ_INLINE void finish_gates(const struct fxq_lstm_step *s, const struct unit_row *rows, struct exponentials *e,
                             int count) {
    exp_minus_1_of(e, 4 * count);
    FXQ_FOR(2, int i = 0; i < count; i++) finish_unit(s, &rows[i], e->x + 4 * i);
}

FXQ_INLINE void finish_states(const struct fxq_lstm_step *s, const struct unit_row *rows, int count) {
    struct exponentials e;
    FXQ_FOR(2, int i = 0; i < count; i++) find_arguments(s, &rows[i], e.x + 4 * i);
    finish_gates(s, rows, &e, count);
}

/* The last part of a step: h = tanh(c) / the denominator of o, for all of the thread's units. */
FXQ_INLINE void finish_hidden_of(const float *c, float *h, int64_t left, int count) {
    const __m512 two = _mm512_set1_ps(2.0f);
    struct exponentials e;
    EACH e.x[i] = _mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(left - 16 * i), c + 16 * i), two);
    exp_minus_1_of(&e, count);
    EACH {
        const __mmask16 lanes = first_lanes(left - 16 * i);
        const __m512 d_o = _mm512_maskz_loadu_ps(lanes, h + 16 * i);
        _mm512_mask_storeu_ps(h + 16 * i, lanes, _mm512_div_ps(e.x[i], _mm512_mul_ps(d_o, _mm512_add_ps(e.x[i], two))));
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
