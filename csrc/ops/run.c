/* A run of static operators, one after another in one call. Values live in an arena, each from the step that makes it
 * to the last one that reads it. */
#include <string.h>

#include "kernels.h"
#include "runtime/pool.h"

/* A value's place in the arena. */
struct place {
    int64_t first, end;
    int last_use;
};

/* Gives each value that has none yet a place, and returns how many bytes the arena needs. offsets: by value. */
static int64_t place_values(const struct fxq_step *steps, int count, const struct fxq_value *values, int64_t *offsets) {
    struct place living[FXQ_MOST_VALUES]; /* by their order in memory */
    int alive = 0;
    int64_t needed = 0;
    for (int i = 0; i < count; i++) {
        const struct fxq_value *value = &values[steps[i].output];
        int kept = 0;
        for (int j = 0; j < alive; j++) {
            if (living[j].last_use >= i) living[kept++] = living[j];
        }
        alive = kept;
        if (value->data) continue;
        const int64_t bytes = fxq_aligned(fxq_bytes(value) + 64);
        int at = 0;
        int64_t first = 0;
        while (at < alive && living[at].first - first < bytes) first = living[at++].end;
        memmove(living + at + 1, living + at, (size_t)(alive - at) * sizeof *living);
        living[at] = (struct place){first, first + bytes, steps[i].last_use};
        alive++;
        offsets[steps[i].output] = first;
        if (first + bytes > needed) needed = first + bytes;
    }
    return needed;
}

/* Steps with the memory that they need: all of it before they run, so that none can fail. */
struct run {
    const struct fxq_step *steps;
    int count;
    const struct fxq_value *values;
    char *scratch; /* so much a thread */
    int64_t scratch_bytes, turned_bytes;
    uint8_t *turned;         /* a value between its two layouts, or a part of one */
    int64_t work, most_work; /* of all steps, and of the greatest */
};

static int64_t count_of(const struct fxq_value *value) { return fxq_bytes(value) / (value->is_float ? 4 : 1); }

/* Channels by rows become pixels, and the other way round. */
static void turn(const struct fxq_value *shape, bool to_rows, const uint8_t *from, uint8_t *to, int threads) {
    const int64_t channels = shape->dimensions > 1 ? shape->shape[1] : 1, pixels = fxq_pixels(shape);
    if (to_rows) fxq_turn_bytes(from, shape->shape[0], pixels, channels, to, threads);
    else fxq_turn_bytes(from, shape->shape[0], channels, pixels, to, threads);
}

static void import(const struct fxq_value *x, uint8_t *q, int threads) {
    if (x->by_rows) turn(x, false, x->data, q, threads);
    else fxq_turn_bytes(x->data, 1, 1, count_of(x), q, threads);
}

static void quantize(const struct run *run, const struct fxq_step *s, int threads) {
    const struct fxq_value *x = &run->values[s->inputs[0]], *y = &run->values[s->output];
    uint8_t *q = x->by_rows ? run->turned : y->data;
    fxq_quantize_value(x->data, count_of(x), s->call.single.scale, s->call.single.qmax, q, threads);
    if (x->by_rows) turn(x, false, q, y->data, threads);
}

static void dequantize(const struct run *run, const struct fxq_step *s, int threads) {
    const struct fxq_value *x = &run->values[s->inputs[0]], *y = &run->values[s->output];
    if (y->by_rows) turn(x, true, x->data, run->turned, threads);
    fxq_dequantize_value(y->by_rows ? run->turned : x->data, count_of(x), s->call.single.scale, y->data, threads);
}

struct join_job {
    const struct fxq_step *step;
    const struct fxq_value *values;
    int64_t pixels, pieces;
};

static void join(void *arg, int thread, int64_t first, int64_t last) {
    const struct join_job *job = arg;
    const int64_t width = job->values[job->step->output].shape[1],
                  begin = fxq_share(job->pixels, 1, first, job->pieces),
                  end = fxq_share(job->pixels, 1, last, job->pieces);
    uint8_t *to = job->values[job->step->output].data;
    (void)thread;
    for (int i = 0; i < job->step->input_count; i++) {
        const struct fxq_value *x = &job->values[job->step->inputs[i]];
        const uint8_t *from = x->data;
        const int64_t channels = x->shape[1];
        for (int64_t p = begin; p < end; p++) memcpy(to + p * width, from + p * channels, (size_t)channels);
        to += channels;
    }
}

static void join_all(const struct fxq_step *step, const struct fxq_value *values, int threads) {
    const struct fxq_value *y = &values[step->output];
    struct join_job job = {step, values, y->shape[0] * fxq_pixels(y), 0};
    const struct fxq_hands hands = fxq_worthwhile(4 * fxq_bytes(y), job.pixels, threads);
    job.pieces = fxq_piece_count(job.pixels, hands);
    fxq_split(join, &job, job.pieces, hands, 4 * fxq_bytes(y));
}

static void convolve(const struct run *run, const struct fxq_convolution *c, int threads) {
    if (!c->is_transposed) {
        fxq_convolve_in(c, threads, run->scratch, run->scratch_bytes);
        return;
    }
    struct fxq_transposed_bytes bytes = fxq_transposed_bytes(c);
    bytes.thread = run->scratch_bytes;
    fxq_convolve_transposed(c, threads, run->scratch, &bytes, (char *)run->turned);
}

static void run_step(const struct run *run, int thread_count, const struct fxq_step *s) {
    const struct fxq_value *x = &run->values[s->inputs[0]], *y = &run->values[s->output];
    switch (s->operator) {
        case FXQ_IMPORT: import(x, y->data, thread_count); break;
        case FXQ_QUANTIZE: quantize(run, s, thread_count); break;
        case FXQ_DEQUANTIZE: dequantize(run, s, thread_count); break;
        case FXQ_CONVOLVE: convolve(run, &s->call.convolution, thread_count); break;
        case FXQ_COMBINE: fxq_combine(&s->call.pair, thread_count); break;
        case FXQ_POOL: fxq_pool_windows(&s->call.pool, thread_count); break;
        case FXQ_LOOK_UP: fxq_look_up(x->data, count_of(x), s->call.single.table, y->data, thread_count); break;
        case FXQ_PAD: fxq_pad_value(&s->call.pad, thread_count); break;
        case FXQ_RESIZE: fxq_resize_value(&s->call.resize, thread_count); break;
        case FXQ_LOOK_UP_CHANNELS: fxq_look_up_channels(&s->call.tables, thread_count); break;
        case FXQ_FLATTEN: turn(x, true, x->data, y->data, thread_count); break;
        default: join_all(s, run->values, thread_count);
    }
    if (y->leaves == NULL) return;
    if (y->is_float) fxq_transpose(y->data, y->shape[0], fxq_pixels(y), y->shape[1], y->leaves, thread_count);
    else turn(y, true, y->data, y->leaves, thread_count);
}

/* One thread's part: of each step. */
static void run_job(void *arg, struct fxq_team *team) {
    const struct run *run = arg;
    fxq_split_within(team);
    for (int i = 0; i < run->count; i++) run_step(run, team->threads, &run->steps[i]);
    fxq_split_within(NULL);
}

/* Where a step's values lie, now that they have a place; and what it needs. */
static void bind(struct run *run, struct fxq_step *s) {
    const struct fxq_value *x = &run->values[s->inputs[0]], *y = &run->values[s->output];
    int64_t work = 8 * fxq_bytes(y), bytes = 0, turned = 0;
    if (s->operator == FXQ_CONVOLVE) {
        struct fxq_convolution *c = &s->call.convolution;
        c->x = x->data;
        c->ending.addend = s->input_count > 1 ? run->values[s->inputs[1]].data : NULL;
        c->y = y->data;
        const struct fxq_transposed_bytes parts =
            c->is_transposed ? fxq_transposed_bytes(c) : (struct fxq_transposed_bytes){0};
        bytes = c->is_transposed ? parts.thread : fxq_convolution_bytes(c);
        turned = parts.output + parts.addend;
        work = fxq_convolution_work(c);
    } else if (s->operator == FXQ_COMBINE) {
        s->call.pair.a = x->data;
        s->call.pair.b = run->values[s->inputs[1]].data;
        s->call.pair.out = y->data;
    } else if (s->operator == FXQ_POOL) {
        s->call.pool.x = x->data;
        s->call.pool.y = y->data;
    } else if (s->operator == FXQ_PAD) {
        s->call.pad.x = x->data;
        s->call.pad.y = y->data;
    } else if (s->operator == FXQ_RESIZE) {
        s->call.resize.x = x->data;
        s->call.resize.y = y->data;
    } else if (s->operator == FXQ_LOOK_UP_CHANNELS) {
        s->call.tables.q = x->data;
        s->call.tables.out = y->data;
    }
    const bool turns = s->operator == FXQ_QUANTIZE ? x->by_rows : s->operator == FXQ_DEQUANTIZE && y->by_rows;
    if (turns) turned = count_of(x);
    if (turned > run->turned_bytes) run->turned_bytes = turned;
    if (bytes > run->scratch_bytes) run->scratch_bytes = bytes;
    if (work > run->most_work) run->most_work = work;
    run->work += work;
}

/* The whole run is one job: a helper is called once, not for each step, and stays until the end. */
int fxq_run_steps(struct fxq_step *steps, int count, struct fxq_value *values, int threads) {
    int64_t offsets[FXQ_MOST_VALUES];
    struct run run = {.steps = steps, .count = count, .values = values};
    const int64_t bytes = place_values(steps, count, values, offsets);
    char *arena = fxq_arena(bytes);
    if (arena == NULL) return FXQ_NO_MEMORY;
    for (int i = 0; i < count; i++) {
        struct fxq_value *value = &values[steps[i].output];
        if (value->data == NULL) value->data = arena + offsets[steps[i].output];
    }
    for (int i = 0; i < count; i++) bind(&run, &steps[i]);
    const struct fxq_hands hands = fxq_worthwhile(run.most_work, FXQ_MOST_THREADS, threads);
    run.scratch = fxq_scratch(hands.threads * run.scratch_bytes + run.turned_bytes);
    if (run.scratch == NULL) return FXQ_NO_MEMORY;
    run.turned = (uint8_t *)run.scratch + hands.threads * run.scratch_bytes;
    fxq_run(run_job, &run, hands, run.work);
    fxq_trim_scratch();
    return FXQ_OK;
}
