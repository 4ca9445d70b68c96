/* A whole stack of LSTM, GRU or plain RNN layers in one call: layers by directions by steps, by one team of threads. */
#include <string.h>

#include "ops/recurrent.h"

enum {
    GATES_BYTES = 512 << 10, /* of a chunk's input products: they stay in the L2 cache until their step */
    CHUNK_ROWS = 32,         /* but at least so many rows, for the matrix product's sake */
    GATES_TOGETHER = 1024,   /* rows times hidden units whose gates are finished together: 16 KiB, in the L1 cache */
    PACKED_STEPS = 4,        /* steps that repay the packing of an LSTM's weight_hh, */
    PACKED_ROWS = 8,         /* if they have so many rows together */
    PACKED_BYTES = 8 << 20,  /* of it, or of grouped weights unpacked for all steps: the scratch memory is kept */
    PACKED_COLUMNS = 32768   /* row sums must fit make_pairs() */
};

/* Memory handed out piece by piece; without a base only the sum counts. */
struct supply {
    char *base;
    int64_t used;
};

static void *take(struct supply *supply, int64_t bytes) {
    void *taken = supply->base ? supply->base + supply->used : NULL;
    supply->used += fxq_aligned(bytes);
    return taken;
}

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* What the weights of all cells take at most. */
static void measure_weights(struct stack *s) {
    for (int i = 0; i < s->call->layers * s->call->directions; i++) {
        const struct fxq_recurrent_weights *w = &s->call->cells[i];
        s->x_bytes = most(s->x_bytes, fxq_activation_bytes(&w->ih, s->chunk_rows));
        s->h_bytes = most(s->h_bytes, fxq_activation_bytes(&w->hh, s->call->batch));
        s->raw_bytes = most(s->raw_bytes, fxq_activation_bytes(&w->hr, s->call->batch));
        s->hh_groups = most(s->hh_groups, w->hh.groups);
        s->hr_groups = most(s->hr_groups, w->hr.groups);
        const int64_t by_state = most(fxq_product_scratch_bytes(&w->hh), fxq_product_scratch_bytes(&w->hr));
        s->scratch_bytes = most(s->scratch_bytes, most(fxq_product_scratch_bytes(&w->ih), by_state));
    }
}

static struct fxq_activations take_activations(struct supply *memory, const struct stack *s, int64_t rows,
                                               int64_t bytes) {
    struct fxq_activations x = {.qmax = s->call->qmax, .per_token = s->call->per_token, .packed = take(memory, bytes)};
    x.row = take(memory, rows * (int64_t)sizeof *x.row);
    return x;
}

/* For a grouped weight that each step multiplies with, many rows at a time: few are multiplied with nibbles as they
 * lie. */
static struct fxq_unpacked take_unpacked(struct supply *memory, const struct stack *s, int64_t outputs, int64_t columns,
                                         int64_t groups) {
    const int64_t values = fxq_aligned(outputs * columns), scales = outputs * groups * (int64_t)sizeof(float);
    const bool is_repaid =
        s->call->steps > 1 && s->call->batch > fxq_active->most_nibble_rows && !fxq_active->matmul_groups;
    if (groups == 0 || !is_repaid || values + scales > PACKED_BYTES) return (struct fxq_unpacked){NULL, NULL};
    int8_t *taken = take(memory, values);
    return (struct fxq_unpacked){taken, take(memory, scales)};
}

static bool is_projected(const struct fxq_recurrent *call) { return call->cells->hr.format != FXQ_NONE; }

static void lay_out_cell(struct cell *cell, const struct fxq_recurrent *call, struct supply *memory) {
    const struct stack *s = cell->stack;
    cell->h = take_activations(memory, s, call->batch, s->h_bytes);
    cell->h.is_row_major = s->packs;
    cell->raw = take_activations(memory, s, is_projected(call) ? call->batch : 0, s->raw_bytes);
    cell->units = most(GATES_TOGETHER / call->batch / 64, 1) * 64;
    if (cell->units > call->hidden) cell->units = call->hidden;
    cell->pre = take(memory, call->batch * s->gates * cell->units * (int64_t)sizeof(float));
    cell->scratch = take(memory, s->scratch_bytes);
}

static void lay_out_stack(struct stack *s, const struct fxq_recurrent *call, int threads, struct supply *memory) {
    const int64_t floats = sizeof(float), width = call->directions * call->outputs;
    const bool needs_sums = call->steps > 1 && fxq_active->row_sums;
    s->x = take_activations(memory, s, s->chunk_rows, s->x_bytes);
    s->ranges = take(memory, threads * (int64_t)sizeof *s->ranges);
    s->input_stride = s->gates * call->hidden + 16;
    s->input_part = take(memory, s->chunk_rows * s->input_stride * floats);
    for (int i = 0; i < 2; i++) s->layer[i] = take(memory, call->layers > 1 + i ? s->rows * width * floats : 0);
    s->hidden = take(memory, is_projected(call) ? call->batch * call->hidden * floats : 0);
    const int64_t units = (call->hidden + 15) / 16 * 16;
    s->packed = take(memory, s->packs ? 4 * units * fxq_depth(call->outputs) : 0);
    const int64_t groups = s->packs ? s->hh_groups : 0;
    s->packed_scale = take(memory, groups * s->gates * units * floats);
    void *sums = take(memory, most(groups, 1) * s->gates * units * floats);
    s->hh_sums = needs_sums ? sums : NULL;
    sums = take(memory, call->outputs * floats);
    s->hr_sums = needs_sums ? sums : NULL;
    s->hh_unpacked = take_unpacked(memory, s, s->gates * call->hidden, call->outputs, s->hh_groups);
    s->hr_unpacked = take_unpacked(memory, s, call->outputs, call->hidden, s->hr_groups);
    s->own = take(memory, threads * s->own_bytes);
}

static void run(void *arg, struct fxq_team *team) {
    struct stack *s = arg;
    const struct fxq_recurrent *call = s->call;
    const int64_t width = call->directions * call->outputs, states = call->batch * call->outputs;
    struct cell cell = {.stack = s, .team = team, .shares = team->threads, .out_stride = width};
    struct supply own = {s->own + team->thread * s->own_bytes, 0};
    lay_out_cell(&cell, call, &own);
    if (fxq_active->begin) fxq_active->begin();
    for (int layer = 0; layer < call->layers; layer++) {
        float *out = layer + 1 < call->layers ? s->layer[layer % 2] : call->out;
        cell.input = layer ? s->layer[(layer - 1) % 2] : call->x;
        cell.inputs = layer ? width : call->inputs;
        for (int direction = 0; direction < call->directions; direction++) {
            const int index = layer * call->directions + direction;
            cell.weights = &call->cells[index];
            cell.h0 = call->h0 + index * states;
            cell.c = call->c ? call->c + index * call->batch * call->hidden : NULL;
            cell.out = out + direction * call->outputs;
            cell.last = call->h + index * states;
            cell.is_backward = direction == 1;
            fxq_run_cell(&cell);
        }
    }
    if (fxq_active->end) fxq_active->end();
}

static bool packs_weights(const struct fxq_recurrent *call) {
    const int64_t bytes = 4 * call->hidden * call->outputs;
    return call->mode == FXQ_LSTM && fxq_active->pack_lstm && call->steps >= PACKED_STEPS &&
           call->steps * call->batch >= PACKED_ROWS && bytes <= PACKED_BYTES && call->outputs <= PACKED_COLUMNS;
}

int fxq_recurrent(const struct fxq_recurrent *call, int threads) {
    struct stack s = {.call = call, .gates = call->mode == FXQ_LSTM ? 4 : call->mode == FXQ_GRU ? 3 : 1};
    const int64_t step_work = s.gates * call->hidden * call->outputs * call->batch; /* worth a barrier at each step? */
    const struct fxq_hands hands = fxq_worthwhile(step_work, (call->hidden + 15) / 16, threads);
    for (int64_t t = 0; t < call->steps; t++) s.rows += call->sizes ? call->sizes[t] : call->batch;
    s.chunk_rows = most(most(CHUNK_ROWS, call->batch), GATES_BYTES / (4 * s.gates * call->hidden));
    if (s.chunk_rows > s.rows) s.chunk_rows = s.rows;

    s.packs = packs_weights(call);
    measure_weights(&s);
    struct cell any = {.stack = &s};
    struct supply measure_cell = {NULL, 0}, measure_all = {NULL, 0};
    lay_out_cell(&any, call, &measure_cell);
    s.own_bytes = measure_cell.used;
    const int64_t starts_bytes = (call->steps + 1) * (int64_t)sizeof *s.starts;
    take(&measure_all, starts_bytes);
    lay_out_stack(&s, call, hands.threads, &measure_all);
    struct supply memory = {fxq_scratch(measure_all.used), 0};
    if (memory.base == NULL) return FXQ_NO_MEMORY;
    int64_t *starts = take(&memory, starts_bytes);
    starts[0] = 0;
    for (int64_t t = 0; t < call->steps; t++) starts[t + 1] = starts[t] + (call->sizes ? call->sizes[t] : call->batch);
    s.starts = starts;
    lay_out_stack(&s, call, hands.threads, &memory);
    const int64_t states = (int64_t)call->layers * call->directions * call->batch * call->outputs;
    memcpy(call->h, call->h0, (size_t)states * sizeof *call->h); /* which rows that no step reaches keep */
    fxq_run(run, &s, hands,
            (step_work * call->steps + s.rows * s.gates * call->hidden * call->inputs) * call->layers *
                call->directions);
    fxq_trim_scratch();
    return FXQ_OK;
}
