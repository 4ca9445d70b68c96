/* One cell of a recurrent layer through time: see recurrent.h. */
#include "recurrent.h"

static void widen(struct fxq_range *range, const struct fxq_range *other) {
    range->low = other->low < range->low ? other->low : range->low;
    range->high = other->high > range->high ? other->high : range->high;
    range->is_nan |= other->is_nan;
}

static void set_all_rows(const struct fxq_activations *x, const struct fxq_range *range) {
    for (int64_t m = 0; m < x->rows; m++) fxq_set_row(&x->row[m], range, x->qmax);
}

/* The rows of the step before: in a packed batch some come from its outputs, and those that begin now from h0. */
struct previous {
    const float *outputs, *h0;
    int64_t outputs_stride, h0_stride, known;
};

static const float *previous_row(const struct previous *p, int64_t m) {
    return m < p->known ? p->outputs + m * p->outputs_stride : p->h0 + m * p->h0_stride;
}

/* Quantize the `rows` rows of a state. */
static void quantize_state(struct fxq_activations *x, int64_t rows, const struct previous *from) {
    x->rows = rows;
    if (!x->per_row) {
        struct fxq_range range = {0.0f, 0.0f, false};
        for (int64_t m = 0; m < rows; m++) fxq_active->measure(previous_row(from, m), x->columns, &range);
        set_all_rows(x, &range);
    }
    for (int64_t m = 0; m < rows; m += 16) {
        const float *pointers[16];
        const int count = rows - m < 16 ? (int)(rows - m) : 16;
        for (int i = 0; i < count; i++) pointers[i] = previous_row(from, m + i);
        fxq_active->quantize(x, m, count, pointers);
    }
}

/* The products of a chunk's input rows with the thread's own rows of weight_ih, plus the bias. */
static void project_input(const struct cell *cell, int64_t first_row, int64_t rows, const struct fxq_range *range) {
    struct stack *s = cell->stack;
    const int64_t hidden = s->call->hidden, outputs = s->gates * hidden;
    if (cell->thread == 0) {
        s->x.rows = rows;
        s->x.columns = cell->inputs;
        s->x.depth = fxq_depth(cell->inputs);
        if (!s->x.per_row) set_all_rows(&s->x, range);
    }
    fxq_barrier(cell->threads);
    fxq_quantize_rows(&s->x, cell->input + first_row * cell->inputs, cell->inputs, share(rows, cell->thread, cell->threads),
                      share(rows, cell->thread + 1, cell->threads));
    fxq_barrier(cell->threads);
    const struct fxq_matmul product = {.x = &s->x, .weight = cell->weights->ih, .outputs = outputs,
                                       .scale = cell->weights->ih_scale, .bias = cell->weights->bias};
    if (cell->threads == 1) {
        const struct fxq_target all = {s->input_part, s->input_stride, NULL, 0};
        fxq_active->matmul(&product, 0, outputs, &all, cell->scratch);
        return;
    }
    for (int64_t n = 0; n < outputs && cell->u0 < cell->u1; n += hidden) {
        const struct fxq_target to = {s->input_part + n + cell->u0, s->input_stride, NULL, 0};
        fxq_active->matmul(&product, n + cell->u0, n + cell->u1, &to, cell->scratch);
    }
}

/* A run of gates: rows n .. n + count - 1 of weight_hh by the last h, plus the input's part of them where it is given. */
static void multiply_hidden(struct cell *cell, const struct fxq_matmul *product, int64_t n, int64_t count,
                            int64_t first_gate, int64_t units, const float *input_part) {
    const struct stack *s = cell->stack;
    const struct fxq_target to = {cell->pre + first_gate * units, s->gates * units, input_part, s->input_stride};
    fxq_active->matmul(product, n, n + count, &to, cell->scratch);
}

/* A GRU's n gate: the hidden part stays alone, with a bias of its own, since r multiplies it. */
static void multiply_hidden_n(struct cell *cell, int64_t u, int64_t units) {
    const struct stack *s = cell->stack;
    const int64_t hidden = s->call->hidden, first = 2 * hidden;
    const struct fxq_matmul product = {.x = &cell->h, .weight = cell->weights->hh + first * s->call->outputs,
                                       .outputs = hidden, .scale = cell->weights->hh_scale + first,
                                       .bias = cell->weights->hidden_bias,
                                       .sums = s->hh_sums ? s->hh_sums + first : NULL};
    multiply_hidden(cell, &product, u, units, 2, units, NULL);
}

static void finish_row(const struct cell *cell, int64_t m, int64_t u, int64_t units, const float *input_part,
                       const float *before, float *out) {
    const struct stack *s = cell->stack;
    const int64_t hidden = s->call->hidden;
    const float *pre = cell->pre + m * s->gates * units;
    switch (s->call->mode) {
        case FXQ_LSTM: fxq_active->lstm_cell(pre, units, units, cell->c + m * hidden + u, out); break;
        case FXQ_GRU: fxq_active->gru_cell(pre, units, units, input_part + 2 * hidden + u, before + u, out); break;
        case FXQ_RNN_TANH: fxq_active->rnn_cell(pre, units, false, out); break;
        case FXQ_RNN_RELU: fxq_active->rnn_cell(pre, units, true, out); break;
    }
}

/* One step: `input_part` is that of its rows, `out` where its hidden rows go (out_stride apart). */
static void advance(struct cell *cell, int64_t live, const struct previous *previous, const float *input_part, float *out,
                    int64_t out_stride) {
    const struct stack *s = cell->stack;
    if (s->packs) {
        const struct fxq_lstm_step whole = {.h = &cell->h, .packed = s->packed, .pairs = s->hh_sums,
            .scale = cell->weights->hh_scale, .hidden = s->call->hidden, .u0 = cell->u0, .u1 = cell->u1,
            .input_part = input_part, .input_stride = s->input_stride, .c = cell->c, .out = out,
            .out_stride = out_stride};
        if (cell->u0 < cell->u1) fxq_active->lstm_step(&whole);
        return;
    }
    const int64_t hidden = s->call->hidden, added_gates = s->call->mode == FXQ_GRU ? 2 : s->gates;
    const struct fxq_matmul product = {.x = &cell->h, .weight = cell->weights->hh, .outputs = s->gates * hidden,
                                       .scale = cell->weights->hh_scale, .sums = s->hh_sums};
    for (int64_t u = cell->u0; u < cell->u1; u += cell->units) {
        const int64_t units = cell->u1 - u < cell->units ? cell->u1 - u : cell->units;
        if (units == hidden) { /* then the gates' rows are one run */
            multiply_hidden(cell, &product, 0, added_gates * hidden, 0, units, input_part);
        } else {
            for (int64_t gate = 0; gate < added_gates; gate++) {
                multiply_hidden(cell, &product, gate * hidden + u, units, gate, units, input_part + gate * hidden + u);
            }
        }
        if (s->call->mode == FXQ_GRU) multiply_hidden_n(cell, u, units);
        for (int64_t m = 0; m < live; m++) {
            finish_row(cell, m, u, units, input_part + m * s->input_stride, previous_row(previous, m),
                       out + m * out_stride + u);
        }
    }
}

static void project_hidden(struct cell *cell, int64_t live, float *out) {
    const struct fxq_recurrent *call = cell->stack->call;
    fxq_barrier(cell->threads); /* all units of `hidden` are there */
    const struct previous hidden = {cell->stack->hidden, NULL, call->hidden, 0, live};
    quantize_state(&cell->raw, live, &hidden);
    const struct fxq_matmul product = {.x = &cell->raw, .weight = cell->weights->hr, .outputs = call->outputs,
                                       .scale = cell->weights->hr_scale, .sums = cell->stack->hr_sums};
    const int64_t n0 = share(call->outputs, cell->thread, cell->threads);
    const int64_t n1 = share(call->outputs, cell->thread + 1, cell->threads);
    const struct fxq_target to = {out + n0, cell->out_stride, NULL, 0};
    if (n0 < n1) fxq_active->matmul(&product, n0, n1, &to, cell->scratch);
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
        quantize_state(&cell->h, live, &previous);
        if (cell->weights->hr) {
            advance(cell, live, &previous, input_part, s->hidden, call->hidden);
            project_hidden(cell, live, out);
        } else {
            advance(cell, live, &previous, input_part, out, cell->out_stride);
        }
        fxq_barrier(cell->threads);
    }
}

/* What every step needs again: sums of the recurrent weights' own rows, and these weights packed. */
static void prepare_weights(const struct cell *cell) {
    const struct stack *s = cell->stack;
    const int64_t hidden = s->call->hidden, outputs = s->call->outputs;
    if (s->hh_sums == NULL) return;
    const int64_t rows = s->gates * hidden;
    if (s->packs) {
        fxq_active->pack_lstm(cell->weights->hh, hidden, outputs, cell->u0, cell->u1, s->packed, s->hh_sums);
    }
    for (int64_t n = 0; !s->packs && n < rows && cell->u0 < cell->u1; n += hidden) {
        fxq_active->row_sums(cell->weights->hh, rows, outputs, n + cell->u0, n + cell->u1, s->hh_sums + n + cell->u0,
                             cell->scratch);
    }
    const int64_t n0 = share(outputs, cell->thread, cell->threads);
    const int64_t n1 = share(outputs, cell->thread + 1, cell->threads);
    if (cell->weights->hr && n0 < n1) {
        fxq_active->row_sums(cell->weights->hr, outputs, hidden, n0, n1, s->hr_sums + n0, cell->scratch);
    }
}

static struct fxq_range measure_input(const struct cell *cell) {
    struct stack *s = cell->stack;
    struct fxq_range range = {0.0f, 0.0f, false};
    if (s->x.per_row) return range;
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
