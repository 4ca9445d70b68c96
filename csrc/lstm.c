/* A whole stack of LSTM layers in one call: layers by directions by steps, one team of threads, one barrier a step.
 *
 * A cell (one direction of one layer) takes its input in chunks of steps: quantize the chunk's rows, multiply them with
 * weight_ih all at once, then step through time. Each thread owns some hidden units, with the four gates and the state
 * of each; a step needs other threads' units only as the quantized h of the step before, which every thread makes for
 * itself. That h is read from the output rows: they are never written twice. */
#include <string.h>

#include "fxquant.h"

enum {
    GATES_BYTES = 512 << 10, /* of a chunk's input products: they stay in the L2 cache until their step */
    CHUNK_ROWS = 32,         /* but at least so many rows, for the matrix product's sake */
    GATES_TOGETHER = 1024    /* rows times hidden units whose gates are finished together: 16 KiB, in the L1 cache */
};

struct stack {
    const struct fxq_lstm *call;
    int64_t rows, chunk_rows;
    const int64_t *starts; /* (steps + 1,) first row of each step */
    struct fxq_activations x; /* of a chunk */
    struct fxq_range *ranges; /* a thread */
    float *gates;             /* (chunk_rows, gates_stride >= 4H): the input's part, with the bias */
    int64_t gates_stride;     /* 16 more: rows a power of two apart would share few sets of the L1 cache */
    float *layer[2];          /* outputs of the layers between */
    float *hidden;            /* (batch, H), before a projection */
    int32_t *hh_sums, *hr_sums;
    char *own; /* each thread's memory */
    int64_t own_bytes;
};

/* One cell, as one thread sees it. */
struct cell {
    struct stack *stack;
    const struct fxq_lstm_cell_weights *weights;
    const float *input, *h0;
    int64_t inputs;
    float *out, *c; /* out: (rows, out_stride), its first column this direction's */
    int64_t out_stride;
    bool is_backward;
    int thread, threads;
    int64_t u0, u1;             /* own hidden units */
    struct fxq_activations h;   /* the last step's outputs */
    struct fxq_activations raw; /* hidden before the projection */
    int64_t units;              /* hidden units at a time */
    float *pre;                 /* (batch, 4, units) gates before their nonlinearities */
    void *scratch;
};

static int64_t share(int64_t count, int index, int parts) {
    const int64_t at = (count + 15) / 16 * index / parts * 16;
    return at < count ? at : count;
}

static int64_t live_rows(const struct stack *s, int64_t step) { return s->starts[step + 1] - s->starts[step]; }

static void widen(struct fxq_range *range, const struct fxq_range *other) {
    range->low = other->low < range->low ? other->low : range->low;
    range->high = other->high > range->high ? other->high : range->high;
    range->is_nan |= other->is_nan;
}

static void set_all_rows(const struct fxq_activations *x, const struct fxq_range *range) {
    for (int64_t m = 0; m < x->rows; m++) fxq_set_row(&x->row[m], range, x->qmax);
}

/* Quantize `rows` rows: the first `split` from a, the others from b, both counted from the batch's first row. */
static void quantize_state(struct fxq_activations *x, int64_t rows, const float *a, int64_t a_stride, int64_t split,
                           const float *b, int64_t b_stride) {
    x->rows = rows;
    if (!x->per_row) {
        struct fxq_range range = {0.0f, 0.0f, false};
        for (int64_t m = 0; m < rows; m++) {
            fxq_active->measure(m < split ? a + m * a_stride : b + m * b_stride, x->columns, &range);
        }
        set_all_rows(x, &range);
    }
    for (int64_t m = 0; m < rows; m += 16) {
        const float *pointers[16];
        const int count = rows - m < 16 ? (int)(rows - m) : 16;
        for (int i = 0; i < count; i++) pointers[i] = m + i < split ? a + (m + i) * a_stride : b + (m + i) * b_stride;
        fxq_active->quantize(x, m, count, pointers);
    }
}

/* The products of a chunk's input rows with the thread's own rows of weight_ih, plus the bias. */
static void project_input(const struct cell *cell, int64_t first_row, int64_t rows, const struct fxq_range *range) {
    struct stack *s = cell->stack;
    const int64_t hidden = s->call->hidden;
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
    const struct fxq_matmul product = {.x = &s->x, .weight = cell->weights->ih, .outputs = 4 * hidden,
                                       .scale = cell->weights->ih_scale, .bias = cell->weights->bias};
    if (cell->threads == 1) {
        const struct fxq_target all = {s->gates, s->gates_stride, NULL, 0};
        fxq_active->matmul(&product, 0, 4 * hidden, &all, cell->scratch);
        return;
    }
    for (int64_t n = 0; n < 4 * hidden && cell->u0 < cell->u1; n += hidden) {
        const struct fxq_target to = {s->gates + n + cell->u0, s->gates_stride, NULL, 0};
        fxq_active->matmul(&product, n + cell->u0, n + cell->u1, &to, cell->scratch);
    }
}

/* One step: `gates` is the input's part of its rows, `out` where its hidden rows go (out_stride apart). */
static void advance(struct cell *cell, int64_t live, const float *gates, float *out, int64_t out_stride) {
    const int64_t hidden = cell->stack->call->hidden;
    const struct fxq_matmul product = {.x = &cell->h, .weight = cell->weights->hh, .outputs = 4 * hidden,
                                       .scale = cell->weights->hh_scale, .sums = cell->stack->hh_sums};
    for (int64_t u = cell->u0; u < cell->u1; u += cell->units) {
        const int64_t units = cell->u1 - u < cell->units ? cell->u1 - u : cell->units;
        const bool is_whole = units == hidden; /* then the four gates' rows are one run */
        for (int gate = 0; gate < (is_whole ? 1 : 4); gate++) {
            const int64_t n = gate * hidden + u;
            const struct fxq_target to = {cell->pre + gate * units, 4 * units, gates + n, cell->stack->gates_stride};
            fxq_active->matmul(&product, n, is_whole ? 4 * hidden : n + units, &to, cell->scratch);
        }
        for (int64_t m = 0; m < live; m++) {
            fxq_active->lstm_cell(cell->pre + m * 4 * units, units, units, cell->c + m * hidden + u, out + m * out_stride + u);
        }
    }
}

static void project_hidden(struct cell *cell, int64_t live, float *out) {
    const struct fxq_lstm *call = cell->stack->call;
    fxq_barrier(cell->threads); /* all units of `hidden` are there */
    quantize_state(&cell->raw, live, cell->stack->hidden, call->hidden, live, NULL, 0);
    const struct fxq_matmul product = {.x = &cell->raw, .weight = cell->weights->hr, .outputs = call->outputs,
                                       .scale = cell->weights->hr_scale, .sums = cell->stack->hr_sums};
    const int64_t n0 = share(call->outputs, cell->thread, cell->threads), n1 = share(call->outputs, cell->thread + 1, cell->threads);
    const struct fxq_target to = {out + n0, cell->out_stride, NULL, 0};
    if (n0 < n1) fxq_active->matmul(&product, n0, n1, &to, cell->scratch);
}

static void run_steps(struct cell *cell, int64_t first, int64_t last, int64_t first_row) {
    struct stack *s = cell->stack;
    const struct fxq_lstm *call = s->call;
    for (int64_t i = first; i < last; i++) {
        const int64_t step = cell->is_backward ? call->steps - 1 - i : i, before = cell->is_backward ? step + 1 : step - 1;
        const int64_t live = live_rows(s, step), known = i == 0 ? 0 : live_rows(s, before);
        const float *previous = i == 0 ? NULL : cell->out + s->starts[before] * cell->out_stride;
        float *out = cell->out + s->starts[step] * cell->out_stride;
        const float *gates = s->gates + (s->starts[step] - first_row) * s->gates_stride;
        quantize_state(&cell->h, live, previous, cell->out_stride, known, cell->h0, call->outputs);
        if (cell->weights->hr) {
            advance(cell, live, gates, s->hidden, call->hidden);
            project_hidden(cell, live, out);
        } else {
            advance(cell, live, gates, out, cell->out_stride);
        }
        fxq_barrier(cell->threads);
    }
}

/* Sums of the recurrent weights' own rows, which every step needs again. */
static void sum_weights(const struct cell *cell) {
    const struct stack *s = cell->stack;
    const int64_t hidden = s->call->hidden, outputs = s->call->outputs;
    if (s->hh_sums == NULL) return;
    for (int64_t n = 0; n < 4 * hidden && cell->u0 < cell->u1; n += hidden) {
        fxq_active->row_sums(cell->weights->hh, 4 * hidden, outputs, n + cell->u0, n + cell->u1, s->hh_sums + n + cell->u0, cell->scratch);
    }
    const int64_t n0 = share(outputs, cell->thread, cell->threads), n1 = share(outputs, cell->thread + 1, cell->threads);
    if (cell->weights->hr && n0 < n1) {
        fxq_active->row_sums(cell->weights->hr, outputs, hidden, n0, n1, s->hr_sums + n0, cell->scratch);
    }
}

static struct fxq_range measure_input(const struct cell *cell) {
    struct stack *s = cell->stack;
    struct fxq_range range = {0.0f, 0.0f, false};
    if (s->x.per_row) return range;
    const int64_t first = share(s->rows, cell->thread, cell->threads), last = share(s->rows, cell->thread + 1, cell->threads);
    fxq_active->measure(cell->input + first * cell->inputs, (last - first) * cell->inputs, &range);
    s->ranges[cell->thread] = range;
    fxq_barrier(cell->threads);
    for (int i = 0; i < cell->threads; i++) widen(&range, &s->ranges[i]);
    return range;
}

static void run_cell(struct cell *cell) {
    const struct stack *s = cell->stack;
    const int64_t steps = s->call->steps;
    const struct fxq_range range = measure_input(cell);
    sum_weights(cell);
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

/* Each row's last output: of step 0 when time runs backward, else of the last step that the row lives to. */
static void keep_last_rows(const struct cell *cell, float *h) {
    const struct stack *s = cell->stack;
    const int64_t batch = s->call->batch, outputs = s->call->outputs;
    for (int64_t b = 0, step; b < batch; b++) {
        for (step = cell->is_backward ? 0 : s->call->steps - 1; step > 0 && live_rows(s, step) <= b; step--) {}
        const bool has_lived = live_rows(s, step) > b;
        const float *row = has_lived ? cell->out + (s->starts[step] + b) * cell->out_stride : cell->h0 + b * outputs;
        memcpy(h + b * outputs, row, (size_t)outputs * sizeof *h);
    }
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

/* Memory handed out piece by piece; without a base only the sum counts. */
struct supply {
    char *base;
    int64_t used;
};

static void *take(struct supply *supply, int64_t bytes) {
    void *taken = supply->base ? supply->base + supply->used : NULL;
    supply->used += aligned(bytes);
    return taken;
}

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static struct fxq_activations take_activations(struct supply *memory, const struct fxq_lstm *call, int64_t rows, int64_t columns) {
    struct fxq_activations x = {.columns = columns, .depth = fxq_depth(columns), .qmax = call->qmax, .per_row = call->per_row};
    x.packed = take(memory, fxq_packed_bytes(rows, columns));
    x.row = take(memory, rows * (int64_t)sizeof *x.row);
    return x;
}

static void lay_out_cell(struct cell *cell, const struct fxq_lstm *call, struct supply *memory) {
    const int64_t columns = most(most(call->inputs, call->hidden), call->directions * call->outputs);
    cell->h = take_activations(memory, call, call->batch, call->outputs);
    cell->raw = take_activations(memory, call, call->cells->hr ? call->batch : 0, call->hidden);
    cell->units = most(GATES_TOGETHER / call->batch / 64, 1) * 64;
    if (cell->units > call->hidden) cell->units = call->hidden;
    cell->pre = take(memory, call->batch * 4 * cell->units * (int64_t)sizeof(float));
    cell->scratch = take(memory, fxq_matmul_scratch_bytes(columns));
}

static void lay_out_stack(struct stack *s, const struct fxq_lstm *call, int threads, struct supply *memory) {
    const int64_t floats = sizeof(float), width = call->directions * call->outputs;
    const bool needs_sums = call->steps > 1 && fxq_active->row_sums;
    s->x = take_activations(memory, call, s->chunk_rows, most(call->inputs, width));
    s->ranges = take(memory, threads * (int64_t)sizeof *s->ranges);
    s->gates_stride = 4 * call->hidden + 16;
    s->gates = take(memory, s->chunk_rows * s->gates_stride * floats);
    for (int i = 0; i < 2; i++) s->layer[i] = take(memory, call->layers > 1 + i ? s->rows * width * floats : 0);
    s->hidden = take(memory, call->cells->hr ? call->batch * call->hidden * floats : 0);
    void *sums = take(memory, 4 * call->hidden * floats);
    s->hh_sums = needs_sums ? sums : NULL;
    sums = take(memory, call->outputs * floats);
    s->hr_sums = needs_sums ? sums : NULL;
    s->own = take(memory, threads * s->own_bytes);
}

static void work(void *arg, int thread, int threads) {
    struct stack *s = arg;
    const struct fxq_lstm *call = s->call;
    const int64_t width = call->directions * call->outputs, states = call->batch * call->outputs;
    struct cell cell = {.stack = s, .thread = thread, .threads = threads};
    struct supply own = {s->own + thread * s->own_bytes, 0};
    lay_out_cell(&cell, call, &own);
    cell.u0 = share(call->hidden, thread, threads);
    cell.u1 = share(call->hidden, thread + 1, threads);
    cell.out_stride = width;
    if (fxq_active->begin) fxq_active->begin();
    for (int layer = 0; layer < call->layers; layer++) {
        float *out = layer + 1 < call->layers ? s->layer[layer % 2] : call->out;
        cell.input = layer ? s->layer[(layer - 1) % 2] : call->x;
        cell.inputs = layer ? width : call->inputs;
        for (int direction = 0; direction < call->directions; direction++) {
            const int index = layer * call->directions + direction;
            cell.weights = &call->cells[index];
            cell.h0 = call->h0 + index * states;
            cell.c = call->c + index * call->batch * call->hidden;
            cell.out = out + direction * call->outputs;
            cell.is_backward = direction == 1;
            run_cell(&cell);
            if (thread == 0) keep_last_rows(&cell, call->h + index * states);
        }
    }
    if (fxq_active->end) fxq_active->end();
}

int fxq_lstm(const struct fxq_lstm *call, int threads) {
    const int64_t step_work = 4 * call->hidden * call->outputs * call->batch; /* a barrier must be worth it at each */
    threads = fxq_worthwhile(step_work, (call->hidden + 15) / 16, threads);
    struct stack s = {.call = call};
    for (int64_t t = 0; t < call->steps; t++) s.rows += call->sizes ? call->sizes[t] : call->batch;
    s.chunk_rows = most(most(CHUNK_ROWS, call->batch), GATES_BYTES / (16 * call->hidden));
    if (s.chunk_rows > s.rows) s.chunk_rows = s.rows;

    struct cell any = {.stack = &s};
    struct supply measure_cell = {NULL, 0}, measure_all = {NULL, 0};
    lay_out_cell(&any, call, &measure_cell);
    s.own_bytes = measure_cell.used;
    const int64_t starts_bytes = (call->steps + 1) * (int64_t)sizeof *s.starts;
    take(&measure_all, starts_bytes);
    lay_out_stack(&s, call, threads, &measure_all);
    struct supply memory = {fxq_scratch(measure_all.used), 0};
    if (memory.base == NULL) return FXQ_NO_MEMORY;
    int64_t *starts = take(&memory, starts_bytes);
    starts[0] = 0;
    for (int64_t t = 0; t < call->steps; t++) starts[t + 1] = starts[t] + (call->sizes ? call->sizes[t] : call->batch);
    s.starts = starts;
    lay_out_stack(&s, call, threads, &memory);
    fxq_run(work, &s, threads);
    fxq_trim_scratch();
    return FXQ_OK;
}
