/* One cell of a recurrent layer through time: see recurrent.h. */
#include <string.h>

#include "ops/recurrent.h"

static const float *previous_row(const struct previous *p, int64_t m) {
    return m < p->known ? p->outputs + m * p->outputs_stride : p->h0 + m * p->h0_stride;
}

/* Products with this cell's weights; `sums` are read of int8 alone. */
static struct fxq_matmul by_hh(const struct cell *cell) {
    const struct stack *s = cell->stack;
    return (struct fxq_matmul){
        .x = &cell->h, .weight = &cell->weights->hh, .sums = s->hh_sums, .unpacked = &s->hh_unpacked};
}

static struct fxq_matmul by_hr(const struct cell *cell) {
    const struct stack *s = cell->stack;
    return (struct fxq_matmul){
        .x = &cell->raw, .weight = &cell->weights->hr, .sums = s->hr_sums, .unpacked = &s->hr_unpacked};
}

/* Quantize the `rows` rows of a state. */
static void quantize_state(struct fxq_activations *x, int64_t rows, const struct fxq_weight *by,
                           const struct previous *from) {
    x->rows = rows;
    fxq_begin_activations(x, by);
    if (!x->per_token) {
        struct fxq_range range = {0.0f, 0.0f, false};
        for (int64_t m = 0; m < rows; m++) fxq_active->measure(previous_row(from, m), x->columns, &range);
        fxq_set_rows(x, 0, rows, &range);
    }
    for (int64_t m = 0; m < rows; m += 16) {
        const float *pointers[16];
        const int count = rows - m < 16 ? (int)(rows - m) : 16;
        for (int i = 0; i < count; i++) pointers[i] = previous_row(from, m + i);
        fxq_quantize(x, m, count, pointers);
    }
}

static void quantize_input(void *arg, int thread, int64_t first, int64_t last) {
    struct cell *cell = arg;
    const struct chunk *chunk = &cell->chunk;
    const int64_t begin = share(chunk->rows, first, cell->shares), end = share(chunk->rows, last, cell->shares);
    const struct fxq_rows rows = {.data = cell->input + chunk->first_row * cell->inputs,
                                  .dimensions = 1,
                                  .sizes = {chunk->rows},
                                  .strides = {cell->inputs}};
    (void)thread;
    if (!cell->x.per_token) fxq_set_rows(&cell->x, begin, end, &cell->range);
    fxq_quantize_rows(&cell->x, &rows, begin, end);
}

static void multiply_input(void *arg, int thread, int64_t first, int64_t last) {
    struct cell *cell = arg;
    struct stack *s = cell->stack;
    const int64_t hidden = s->call->hidden, outputs = s->gates * hidden;
    const int64_t u0 = share(hidden, first, cell->shares), u1 = share(hidden, last, cell->shares);
    const struct fxq_matmul product = {.x = &cell->x, .weight = &cell->weights->ih, .bias = cell->weights->bias};
    const bool takes_all = u1 - u0 == hidden; /* then the gates' rows are one run */
    (void)thread;
    for (int64_t n = 0; n < outputs && u0 < u1; n += takes_all ? outputs : hidden) {
        const struct fxq_target to = {s->input_part + n + u0, s->input_stride, NULL, 0};
        fxq_multiply(&product, n + u0, takes_all ? outputs : n + u1, &to, cell->scratch);
    }
}

/* The products of a chunk's input rows with weight_ih, plus the bias. */
static void project_input(struct cell *cell) {
    cell->x = cell->stack->x;
    cell->x.rows = cell->chunk.rows;
    fxq_begin_activations(&cell->x, &cell->weights->ih);
    fxq_round(cell->team, cell->shares, quantize_input, cell);
    fxq_round(cell->team, cell->shares, multiply_input, cell);
}

/* A run of gates: rows n .. n + count - 1 of weight_hh by the last h, plus the input's part of them. */
static void multiply_hidden(struct cell *cell, const struct fxq_matmul *by_hidden, int64_t n, int64_t count,
                            int64_t first_gate, int64_t units, const float *input_part) {
    const struct fxq_target to = {cell->pre + first_gate * units, cell->stack->gates * units, input_part,
                                  cell->stack->input_stride};
    fxq_multiply(by_hidden, n, n + count, &to, cell->scratch);
}

/* A GRU's n gate: the hidden part stays alone, with a bias of its own, the same for all rows, since r multiplies it. */
static void multiply_hidden_n(struct cell *cell, const struct fxq_matmul *by_hidden, int64_t u, int64_t units) {
    const struct stack *s = cell->stack;
    const int64_t n = 2 * s->call->hidden + u;
    const float *bias = cell->weights->hidden_bias;
    const struct fxq_target to = {cell->pre + 2 * units, s->gates * units, bias ? bias + u : NULL, 0};
    fxq_multiply(by_hidden, n, n + units, &to, cell->scratch);
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

/* The gates of units [u0, u1), and what comes of them. */
static void advance(struct cell *cell, int64_t u0, int64_t u1) {
    const struct stack *s = cell->stack;
    const struct step *step = &cell->step;
    const int64_t hidden = s->call->hidden, added_gates = s->call->mode == FXQ_GRU ? 2 : s->gates;
    const struct fxq_matmul product = by_hh(cell);
    for (int64_t u = u0; u < u1; u += cell->units) {
        const int64_t units = u1 - u < cell->units ? u1 - u : cell->units;
        if (units == hidden) { /* then the gates' rows are one run */
            multiply_hidden(cell, &product, 0, added_gates * hidden, 0, units, step->input_part);
        } else {
            for (int64_t gate = 0; gate < added_gates; gate++) {
                multiply_hidden(cell, &product, gate * hidden + u, units, gate, units,
                                step->input_part + gate * hidden + u);
            }
        }
        if (s->call->mode == FXQ_GRU) multiply_hidden_n(cell, &product, u, units);
        for (int64_t m = 0; m < step->live; m++) {
            finish_row(cell, m, u, units, cell->pre + m * s->gates * units, units,
                       step->input_part + m * s->input_stride, previous_row(&step->previous, m),
                       step->hidden + m * step->hidden_stride + u);
        }
    }
}

static void advance_packed(struct cell *cell, int64_t u0, int64_t u1) {
    const struct stack *s = cell->stack;
    const struct step *step = &cell->step;
    const struct fxq_lstm_step whole = {.h = &cell->h,
                                        .weight = &cell->weights->hh,
                                        .packed = s->packed,
                                        .pairs = s->hh_sums,
                                        .scale = s->packed_scale,
                                        .hidden = s->call->hidden,
                                        .u0 = u0,
                                        .u1 = u1,
                                        .input_part = step->input_part,
                                        .input_stride = s->input_stride,
                                        .c = cell->c,
                                        .out = step->hidden,
                                        .out_stride = step->hidden_stride};
    fxq_active->lstm_step(&whole);
}

/* Outputs [n0, n1) of the rows whose last step this is are their last ones. Time may run backward. */
static void keep_last(const struct cell *cell, int64_t n0, int64_t n1) {
    const struct stack *s = cell->stack;
    const int64_t next = cell->is_backward ? cell->step.index - 1 : cell->step.index + 1;
    const bool has_next = next >= 0 && next < s->call->steps;
    const int64_t first = !has_next ? 0 : cell->is_backward ? cell->step.live : live_rows(s, next);
    for (int64_t m = first; m < cell->step.live; m++) {
        const float *row = cell->step.out + m * cell->out_stride;
        memcpy(cell->last + m * s->call->outputs + n0, row + n0, (size_t)(n1 - n0) * sizeof *row);
    }
}

static void advance_shares(void *arg, int thread, int64_t first, int64_t last) {
    struct cell *cell = arg;
    const int64_t hidden = cell->stack->call->hidden;
    const int64_t u0 = share(hidden, first, cell->shares), u1 = share(hidden, last, cell->shares);
    (void)thread;
    if (!cell->step.has_state) quantize_state(&cell->h, cell->step.live, &cell->weights->hh, &cell->step.previous);
    cell->step.has_state = true;
    if (u0 == u1) return;
    (packs(cell->stack, &cell->weights->hh) ? advance_packed : advance)(cell, u0, u1);
    if (cell->weights->hr.format == FXQ_NONE) keep_last(cell, u0, u1);
}

static void project_shares(void *arg, int thread, int64_t first, int64_t last) {
    struct cell *cell = arg;
    const struct fxq_recurrent *call = cell->stack->call;
    const struct previous hidden = {cell->step.hidden, NULL, call->hidden, 0, cell->step.live};
    const struct fxq_matmul product = by_hr(cell);
    const int64_t n0 = share(call->outputs, first, cell->shares), n1 = share(call->outputs, last, cell->shares);
    const struct fxq_target to = {cell->step.out + n0, cell->out_stride, NULL, 0};
    (void)thread;
    if (!cell->step.has_raw) quantize_state(&cell->raw, cell->step.live, &cell->weights->hr, &hidden);
    cell->step.has_raw = true;
    if (n0 == n1) return;
    fxq_multiply(&product, n0, n1, &to, cell->scratch);
    keep_last(cell, n0, n1);
}

static void run_step(struct cell *cell, int64_t index, bool is_first) {
    const struct stack *s = cell->stack;
    const int64_t before = cell->is_backward ? index + 1 : index - 1;
    const bool is_projected = cell->weights->hr.format != FXQ_NONE;
    float *out = cell->out + s->starts[index] * cell->out_stride;
    cell->step =
        (struct step){.index = index,
                      .live = live_rows(s, index),
                      .out = out,
                      .previous = {NULL, cell->h0, cell->out_stride, s->call->outputs, 0},
                      .input_part = s->input_part + (s->starts[index] - cell->chunk.first_row) * s->input_stride,
                      .hidden = is_projected ? s->hidden : out,
                      .hidden_stride = is_projected ? s->call->hidden : cell->out_stride};
    if (!is_first) {
        cell->step.previous.outputs = cell->out + s->starts[before] * cell->out_stride;
        cell->step.previous.known = live_rows(s, before);
    }
    fxq_round(cell->team, cell->shares, advance_shares, cell);
    if (is_projected) fxq_round(cell->team, cell->shares, project_shares, cell);
}

/* What every step needs again of rows [n0, n1) of a weight: their sums, or of a grouped one the integers. */
static void prepare_rows(const struct cell *cell, const struct fxq_matmul *by, int64_t n0, int64_t n1) {
    const struct fxq_weight *weight = by->weight;
    int32_t *sums = weight == &cell->weights->hh ? cell->stack->hh_sums : cell->stack->hr_sums;
    if (n0 >= n1) return;
    if (weight->format == FXQ_INT8 && sums) fxq_active->row_sums(weight, n0, n1, sums + n0, cell->scratch);
    if (weight->group && by->unpacked->values) fxq_unpack_groups(weight, n0, n1, by->unpacked);
}

static void prepare_shares(void *arg, int thread, int64_t first, int64_t last) {
    const struct cell *cell = arg;
    const struct stack *s = cell->stack;
    const int64_t hidden = s->call->hidden, outputs = s->call->outputs;
    const int64_t u0 = share(hidden, first, cell->shares), u1 = share(hidden, last, cell->shares);
    const struct fxq_matmul hh = by_hh(cell), hr = by_hr(cell);
    (void)thread;
    if (packs(s, hh.weight)) {
        fxq_active->pack_lstm(hh.weight, u0, u1, s->packed, s->hh_sums, s->packed_scale, cell->scratch);
    } else {
        for (int64_t n = 0; n < hh.weight->outputs && u0 < u1; n += hidden) prepare_rows(cell, &hh, n + u0, n + u1);
    }
    if (hr.weight->format == FXQ_NONE) return;
    prepare_rows(cell, &hr, share(outputs, first, cell->shares), share(outputs, last, cell->shares));
}

static void measure_shares(void *arg, int thread, int64_t first, int64_t last) {
    const struct cell *cell = arg;
    struct stack *s = cell->stack;
    (void)thread;
    for (int64_t i = first; i < last; i++) {
        const int64_t begin = share(s->rows, i, cell->shares), end = share(s->rows, i + 1, cell->shares);
        s->ranges[i] = (struct fxq_range){0.0f, 0.0f, false};
        fxq_active->measure(cell->input + begin * cell->inputs, (end - begin) * cell->inputs, &s->ranges[i]);
    }
}

void fxq_run_cell(struct cell *cell) {
    const struct stack *s = cell->stack;
    const int64_t steps = s->call->steps;
    if (!s->x.per_token) {
        fxq_round(cell->team, cell->shares, measure_shares, cell);
        cell->range = fxq_join_ranges(s->ranges, cell->shares);
    }
    fxq_round(cell->team, cell->shares, prepare_shares, cell);
    for (int64_t first = 0, last; first < steps; first = last) {
        int64_t rows = 0;
        for (last = first; last < steps; last++) {
            const int64_t more = live_rows(s, cell->is_backward ? steps - 1 - last : last);
            if (last > first && rows + more > s->chunk_rows) break;
            rows += more;
        }
        cell->chunk = (struct chunk){s->starts[cell->is_backward ? steps - last : first], rows};
        project_input(cell);
        for (int64_t i = first; i < last; i++) run_step(cell, cell->is_backward ? steps - 1 - i : i, i == 0);
    }
}
