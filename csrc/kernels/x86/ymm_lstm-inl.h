/* The steps of an LSTM. A sequence uses weight_hh again at each step, so it is packed once: for 16 hidden units at a
 * time a panel (see ymm-inl.h) a gate. Expects: ymm-inl.h.
 *
 * Of a grouped weight a panel holds int8 too, and each group's products are added to those before it. */

/* A panel's place: gate `gate` of units [u, u + count). */
struct unit_gate {
    int64_t u, gate, count;
};

/* Values of the weight's rows for a panel, (count, columns) int8 from column k on. */
static void gather_rows(const struct fxq_weight *weight, const struct unit_gate *at, int64_t k, int64_t columns,
                        int8_t *values) {
    const int64_t row = at->gate * (weight->outputs / 4) + at->u;
    if (weight->group) unpack(weight, row, at->count, k, columns, values);
    else memcpy(values, (const int8_t *)weight->data + row * columns, (size_t)(at->count * columns));
}

/* What is added up in one go: all columns, or a group of them. */
static int64_t group_count(const struct fxq_weight *weight) { return weight->group ? weight->groups : 1; }

static int64_t group_columns(const struct fxq_weight *weight, int64_t k) {
    const int64_t left = weight->columns - k;
    return weight->group && weight->group < left ? weight->group : left;
}

static void pack_gate(const struct fxq_weight *weight, const struct unit_gate *at, void *packed, int32_t *pairs,
                      float *scale, void *scratch) {
    const int64_t depth = fxq_depth(weight->columns), hidden = weight->outputs / 4;
    const int64_t all = (hidden + PANEL - 1) / PANEL * PANEL * 4, first = 4 * at->u + PANEL * at->gate;
    for (int64_t g = 0; g < group_count(weight); g++) {
        const int64_t k = g * weight->group, columns = group_columns(weight, k), width = (columns + 31) / 32 * 32;
        FXQ_VALUE *ones = (FXQ_VALUE *)((int8_t *)scratch + PANEL * columns + width);
        for (int64_t i = 0; i < width; i++) ones[i] = i < columns;
        gather_rows(weight, at, k, columns, scratch);
        pack_panel(scratch, columns, width, ones, (int8_t *)packed + first * depth + k * PANEL,
                   pairs ? pairs + g * all + first : NULL); /* NULL: halves need no sums */
        for (int64_t i = 0; i < at->count && weight->group; i++) {
            const int64_t row = at->gate * hidden + at->u + i;
            const uint32_t bits = (uint32_t)((const uint16_t *)weight->scale)[row * weight->groups + g] << 16;
            memcpy(&scale[g * all + first + i], &bits, sizeof bits);
        }
    }
}

static void pack_lstm(const struct fxq_weight *weight, int64_t u0, int64_t u1, void *packed, int32_t *pairs,
                      float *scale, void *scratch) {
    for (int64_t u = u0; u < u1; u += PANEL) {
        for (int gate = 0; gate < 4; gate++) {
            const struct unit_gate at = {u, gate, u1 - u < PANEL ? u1 - u : PANEL};
            pack_gate(weight, &at, packed, pairs, scale, scratch);
        }
    }
}

/* A gate of `tokens` tokens of the last step's outputs, which x begins with: h by the weight, plus the input's part. */
static void multiply_gate(const struct fxq_lstm_step *s, const struct fxq_activations *x, const struct unit_gate *at,
                          int tokens, const float *input_part, float (*gates)[4 * PANEL]) {
    const int64_t depth = x->depth, n = at->gate * s->hidden + at->u, first = 4 * at->u + PANEL * at->gate;
    const int64_t all = (s->hidden + PANEL - 1) / PANEL * PANEL * 4;
    const int8_t *panel = (const int8_t *)s->packed + first * depth;
    struct fxq_target to = {gates[0] + PANEL * at->gate, 4 * PANEL, input_part + n, s->input_stride};
    for (int64_t g = 0; g < group_count(s->weight); g++) {
        const int64_t k = g * s->weight->group, columns = (group_columns(s->weight, k) + 31) / 32 * 32;
        const struct fxq_weight weight = {.scale = s->weight->group ? s->scale + g * all + first
                                                                    : (const float *)s->weight->scale + n};
        const struct fxq_matmul job = {.x = x, .weight = &weight};
        __m256i sums[PANEL_TOKENS][2];
        multiply_panel(panel + k * PANEL, (const FXQ_VALUE *)x->packed + k, columns, depth, sums, tokens);
        for (int half = 0; 8 * half < at->count; half++) {
            struct outputs_8 o = begin_outputs(&job, &to, 8 * half, 0, at->count);
            if (s->pairs) o.row_sums = _mm256_loadu_si256((const __m256i *)(s->pairs + g * all + first + 8 * half));
            for (int i = 0; i < tokens; i++) finish_outputs(&o, i, sums[i][half]);
        }
        to.addend = to.out;
        to.addend_stride = to.out_stride;
    }
}

static void lstm_step(const struct fxq_lstm_step *s) {
    const int64_t tiles = (s->h->rows + PANEL_TOKENS - 1) / PANEL_TOKENS;
    for (int64_t u = s->u0; u < s->u1; u += PANEL) {
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t m = fxq_share(s->h->rows, 1, tile, tiles);
            const int tokens = (int)(fxq_share(s->h->rows, 1, tile + 1, tiles) - m);
            const int64_t units = s->u1 - u < PANEL ? s->u1 - u : PANEL;
            struct fxq_activations x = *s->h;
            float gates[PANEL_TOKENS][4 * PANEL];
            x.row += m;
            x.packed = (FXQ_VALUE *)x.packed + m * x.depth;
            for (int gate = 0; gate < 4; gate++) {
                const struct unit_gate at = {u, gate, units};
                multiply_gate(s, &x, &at, tokens, s->input_part + m * s->input_stride, gates);
            }
            for (int i = 0; i < tokens; i++) {
                lstm_cell(gates[i], PANEL, units, s->c + (m + i) * s->hidden + u, s->out + (m + i) * s->out_stride + u);
            }
        }
    }
}
