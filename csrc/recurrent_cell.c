/* One cell of a recurrent layer through time: see recurrent.h. */
#include "recurrent.h"

static void widen(struct fxq_range *range, const struct fxq_range *other) {
    range->low = other->low < range->low ? other->low : range->low;
    range->high = other->high > range->high ? other->high : range->high;
    range->is_nan |= other->is_nan;
}

static void set_all_rows(const struct fxq_activations *x, const struct fxq_range *range) {
    for (int64_t m = 0; m < x->rows && x->kind != FXQ_KIND_FLOAT; m++) {
        if (x->kind == FXQ_KIND_INT16) fxq_set_int16_row(&x->row[m], range);
        else fxq_set_row(&x->row[m], range, x->qmax);
    }
}

/* The rows of the step before: in a packed batch some come from its outputs, and those that begin now from h0. */
struct previous {
    const float *outputs, *h0;
    int64_t outputs_stride, h0_stride, known;
};

static const float *previous_row(const struct previous *p, int64_t m) {
    return m < p->known ? p->outputs + m * p->outputs_stride : p->h0 + m * p->h0_stride;
}

/* A weight of this cell, for products with some rows. */
struct weight {
    const struct fxq_matrix *matrix;
    int64_t outputs, columns;
    const float *bias;
    int32_t *sums; /* of int8 rows, or NULL */
    const struct unpacked *unpacked; /* or NULL */
};

static void begin_rows(struct fxq_grouped *x, int64_t rows, const struct fxq_matrix *by) {
    x->x.rows = rows;
    x->x.kind = kind_of(by);
    x->group = 0;
    if (is_int4(by) && !x->x.is_row_major) fxq_begin_grouped(x, by->int4.group); /* a packed weight takes whole rows */
}

static void quantize_16(const struct fxq_grouped *x, int64_t first, int count, const float *const *rows) {
    if (x->group) fxq_quantize_grouped(x, first, count, rows);
    else fxq_quantize(&x->x, first, count, rows);
}

/* Rows by rows [n0, n1) of the weight they were quantized for. */
static void multiply(const struct cell *cell, const struct fxq_grouped *x, const struct weight *w, int64_t n0, int64_t n1,
                     const struct fxq_target *to) {
    if (x->group == 0) {
        const struct fxq_matmul product = {.x = &x->x, .weight = w->matrix->values, .int16 = w->matrix->int16,
                                           .halves = w->matrix->halves, .floats = w->matrix->floats, .outputs = w->outputs, .scale = w->matrix->scale, .bias = w->bias,
                                           .sums = w->sums};
        fxq_multiply(&product, n0, n1, to, cell->scratch);
        return;
    }
    const struct fxq_int4_product product = {.x = x, .weight = &w->matrix->int4, .outputs = w->outputs, .bias = w->bias,
                                             .values = w->unpacked ? w->unpacked->values : NULL,
                                             .scale = w->unpacked ? w->unpacked->scale : NULL,
                                             .chunk = cell->stack->int4_chunk};
    fxq_multiply_int4(&product, n0, n1, to, cell->scratch);
}

static struct weight hh_of(const struct cell *cell) {
    const struct stack *s = cell->stack;
    return (struct weight){.matrix = &cell->weights->hh, .outputs = s->gates * s->call->hidden, .columns = s->call->outputs,
                           .sums = s->hh_sums, .unpacked = &s->hh_unpacked};
}

static struct weight hr_of(const struct cell *cell) {
    const struct stack *s = cell->stack;
    return (struct weight){.matrix = &cell->weights->hr, .outputs = s->call->outputs, .columns = s->call->hidden,
                           .sums = s->hr_sums, .unpacked = &s->hr_unpacked};
}

/* Quantize the `rows` rows of a state. */
static void quantize_state(struct fxq_grouped *x, int64_t rows, const struct fxq_matrix *by, const struct previous *from) {
    begin_rows(x, rows, by);
    if (!x->x.per_row) {
        struct fxq_range range = {0.0f, 0.0f, false};
        for (int64_t m = 0; m < rows; m++) fxq_active->measure(previous_row(from, m), x->x.columns, &range);
        set_all_rows(&x->x, &range);
    }
    for (int64_t m = 0; m < rows; m += 16) {
        const float *pointers[16];
        const int count = rows - m < 16 ? (int)(rows - m) : 16;
        for (int i = 0; i < count; i++) pointers[i] = previous_row(from, m + i);
        quantize_16(x, m, count, pointers);
    }
}

/* The products of a chunk's input rows with the thread's own rows of weight_ih, plus the bias. */
static void project_input(struct cell *cell, int64_t first_row, int64_t rows, const struct fxq_range *range) {
    struct stack *s = cell->stack;
    const struct fxq_matrix *ih = &cell->weights->ih;
    const int64_t hidden = s->call->hidden, outputs = s->gates * hidden;
    if (cell->thread == 0) {
        s->x.x.columns = cell->inputs;
        s->x.x.depth = fxq_depth(cell->inputs);
        begin_rows(&s->x, rows, ih);
        if (!s->x.x.per_row) set_all_rows(&s->x.x, range);
    }
    fxq_barrier(cell->threads);
    const int64_t last = share(rows, cell->thread + 1, cell->threads);
    for (int64_t m = share(rows, cell->thread, cell->threads); m < last; m += 16) {
        const float *pointers[16];
        const int count = last - m < 16 ? (int)(last - m) : 16;
        for (int i = 0; i < count; i++) pointers[i] = cell->input + (first_row + m + i) * cell->inputs;
        quantize_16(&s->x, m, count, pointers);
    }
    fxq_barrier(cell->threads);
    const struct weight weight = {.matrix = ih, .outputs = outputs, .columns = cell->inputs, .bias = cell->weights->bias};
    if (cell->threads == 1) {
        const struct fxq_target all = {s->input_part, s->input_stride, NULL, 0};
        multiply(cell, &s->x, &weight, 0, outputs, &all);
        return;
    }
    for (int64_t n = 0; n < outputs && cell->u0 < cell->u1; n += hidden) {
        const struct fxq_target to = {s->input_part + n + cell->u0, s->input_stride, NULL, 0};
        multiply(cell, &s->x, &weight, n + cell->u0, n + cell->u1, &to);
    }
}

/* A run of gates: rows n .. n + count - 1 of weight_hh by the last h, plus the input's part of them. */
static void multiply_hidden(struct cell *cell, const struct weight *hh, int64_t n, int64_t count, int64_t first_gate,
                            int64_t units, const float *input_part) {
    const struct fxq_target to = {cell->pre + first_gate * units, cell->stack->gates * units, input_part,
                                  cell->stack->input_stride};
    multiply(cell, &cell->h, hh, n, n + count, &to);
}

/* A GRU's n gate: the hidden part stays alone, with a bias of its own, the same for all rows, since r multiplies it. */
static void multiply_hidden_n(struct cell *cell, const struct weight *hh, int64_t u, int64_t units) {
    const struct stack *s = cell->stack;
    const int64_t n = 2 * s->call->hidden + u;
    const float *bias = cell->weights->hidden_bias;
    const struct fxq_target to = {cell->pre + 2 * units, s->gates * units, bias ? bias + u : NULL, 0};
    multiply(cell, &cell->h, hh, n, n + units, &to);
}

/* `units` of row m from u on: `pre` has their gates, `stride` apart. */
static void finish_row(const struct cell *cell, int64_t m, int64_t u, int64_t units, const float *pre, int64_t stride,
                       const float *input_part, const float *before, float *out) {
    const struct stack *s = cell->stack;
    const int64_t hidden = s->call->hidden;
    switch (s->call->mode) {
        case FXQ_LSTM: fxq_active->lstm_cell(pre, stride, units, cell->c + m * hidden + u, out); break;
        case FXQ_GRU: fxq_active->gru_cell(pre, stride, units, input_part + 2 * hidden + u, before + u, out); break;
        case FXQ_RNN_TANH: fxq_active->rnn_cell(pre, units, false, out); break;
        case FXQ_RNN_RELU: fxq_active->rnn_cell(pre, units, true, out); break;
    }
}

/* One step: `input_part` is that of its rows, `out` where its hidden rows go (out_stride apart). */
static void advance(struct cell *cell, int64_t live, const struct previous *previous, const float *input_part, float *out,
                    int64_t out_stride) {
    const struct stack *s = cell->stack;
    if (packs(s, &cell->weights->hh)) {
        const struct fxq_matrix *hh = &cell->weights->hh;
        const struct fxq_lstm_step whole = {.h = &cell->h.x, .packed = s->packed, .pairs = s->hh_sums,
            .scale = is_int4(hh) ? s->packed_scale : hh->scale, .group = hh->int4.group, .groups = hh->int4.groups,
            .hidden = s->call->hidden, .u0 = cell->u0, .u1 = cell->u1,
            .input_part = input_part, .input_stride = s->input_stride, .c = cell->c, .out = out,
            .out_stride = out_stride};
        if (cell->u0 < cell->u1) (is_int4(hh) ? fxq_active->lstm_step_int4 : fxq_active->lstm_step)(&whole);
        return;
    }
    const int64_t hidden = s->call->hidden, added_gates = s->call->mode == FXQ_GRU ? 2 : s->gates;
    const struct weight hh = hh_of(cell);
    for (int64_t u = cell->u0; u < cell->u1; u += cell->units) {
        const int64_t units = cell->u1 - u < cell->units ? cell->u1 - u : cell->units;
        if (units == hidden) { /* then the gates' rows are one run */
            multiply_hidden(cell, &hh, 0, added_gates * hidden, 0, units, input_part);
        } else {
            for (int64_t gate = 0; gate < added_gates; gate++) {
                multiply_hidden(cell, &hh, gate * hidden + u, units, gate, units, input_part + gate * hidden + u);
            }
        }
        if (s->call->mode == FXQ_GRU) multiply_hidden_n(cell, &hh, u, units);
        for (int64_t m = 0; m < live; m++) {
            finish_row(cell, m, u, units, cell->pre + m * s->gates * units, units, input_part + m * s->input_stride,
                       previous_row(previous, m), out + m * out_stride + u);
        }
    }
}

static void project_hidden(struct cell *cell, int64_t live, float *out) {
    const struct fxq_recurrent *call = cell->stack->call;
    fxq_barrier(cell->threads); /* all units of `hidden` are there */
    const struct previous hidden = {cell->stack->hidden, NULL, call->hidden, 0, live};
    quantize_state(&cell->raw, live, &cell->weights->hr, &hidden);
    const struct weight hr = hr_of(cell);
    const int64_t n0 = share(call->outputs, cell->thread, cell->threads);
    const int64_t n1 = share(call->outputs, cell->thread + 1, cell->threads);
    const struct fxq_target to = {out + n0, cell->out_stride, NULL, 0};
    if (n0 < n1) multiply(cell, &cell->raw, &hr, n0, n1, &to);
}

static void run_steps(struct cell *cell, int64_t first, int64_t last, int64_t first_row) {
    struct stack *s = cell->stack;
    const struct fxq_recurrent *call = s->call;
    for (int64_t i = first; i < last; i++) {
        const int64_t step = cell->is_backward ? call->steps - 1 - i : i;
        const int64_t before = cell->is_backward ? step + 1 : step - 1;
        const int64_t live = live_rows(s, step);
        struct previous previous = {NULL, cell->h0, cell->out_stride, call->outputs, 0};
        if (i > 0) {
            previous.outputs = cell->out + s->starts[before] * cell->out_stride;
            previous.known = live_rows(s, before);
        }
        float *out = cell->out + s->starts[step] * cell->out_stride;
        const float *input_part = s->input_part + (s->starts[step] - first_row) * s->input_stride;
        quantize_state(&cell->h, live, &cell->weights->hh, &previous);
        if (!is_none(&cell->weights->hr)) {
            advance(cell, live, &previous, input_part, s->hidden, call->hidden);
            project_hidden(cell, live, out);
        } else {
            advance(cell, live, &previous, input_part, out, cell->out_stride);
        }
        fxq_barrier(cell->threads);
    }
}

/* What every step needs again of rows [n0, n1) of a weight: their sums, or of 4 bits the integers. */
static void prepare_rows(const struct cell *cell, const struct weight *w, int64_t n0, int64_t n1) {
    const struct fxq_matrix *matrix = w->matrix;
    if (n0 >= n1) return;
    if (matrix->values && w->sums) {
        fxq_active->row_sums(matrix->values, w->outputs, w->columns, n0, n1, w->sums + n0, cell->scratch);
    }
    if (is_int4(matrix) && w->unpacked->values) {
        fxq_unpack_groups(&matrix->int4, w->outputs, w->columns, n0, n1, w->unpacked->values, w->unpacked->scale);
    }
}

static void prepare_weights(const struct cell *cell) {
    const struct stack *s = cell->stack;
    const int64_t hidden = s->call->hidden, outputs = s->call->outputs;
    const struct weight hh = hh_of(cell), hr = hr_of(cell);
    const bool is_packed = packs(s, hh.matrix);
    if (is_packed && is_int4(hh.matrix)) {
        fxq_active->pack_lstm_int4(&hh.matrix->int4, hidden, outputs, cell->u0, cell->u1, s->packed, s->hh_sums,
                                   s->packed_scale, cell->scratch);
    } else if (is_packed) {
        fxq_active->pack_lstm(hh.matrix->values, hidden, outputs, cell->u0, cell->u1, s->packed, s->hh_sums);
    }
    for (int64_t n = 0; !is_packed && n < hh.outputs && cell->u0 < cell->u1; n += hidden) {
        prepare_rows(cell, &hh, n + cell->u0, n + cell->u1);
    }
    if (is_none(hr.matrix)) return;
    prepare_rows(cell, &hr, share(outputs, cell->thread, cell->threads), share(outputs, cell->thread + 1, cell->threads));
}

static struct fxq_range measure_input(const struct cell *cell) {
    struct stack *s = cell->stack;
    struct fxq_range range = {0.0f, 0.0f, false};
    if (s->x.x.per_row) return range;
    const int64_t first = share(s->rows, cell->thread, cell->threads);
    const int64_t last = share(s->rows, cell->thread + 1, cell->threads);
    fxq_active->measure(cell->input + first * cell->inputs, (last - first) * cell->inputs, &range);
    s->ranges[cell->thread] = range;
    fxq_barrier(cell->threads);
    for (int i = 0; i < cell->threads; i++) widen(&range, &s->ranges[i]);
    return range;
}

void fxq_run_cell(struct cell *cell) {
    const struct stack *s = cell->stack;
    const int64_t steps = s->call->steps;
    const struct fxq_range range = measure_input(cell);
    prepare_weights(cell);
    for (int64_t first = 0, last; first < steps; first = last) {
        int64_t rows = 0;
        for (last = first; last < steps; last++) {
            const int64_t more = live_rows(s, cell->is_backward ? steps - 1 - last : last);
            if (last > first && rows + more > s->chunk_rows) break;
            rows += more;
        }
        const int64_t first_row = s->starts[cell->is_backward ? steps - last : first];
        project_input(cell, first_row, rows, &range);
        run_steps(cell, first, last, first_row);
    }
}
