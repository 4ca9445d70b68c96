/* A run of static operators, one after another in one call. Values live in an arena, each from the step that makes it
 * to the last one that reads it. */
#include <string.h>

#include "kernels.h"

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

/* Channels by rows become pixels, and the other way round. */
static void turn(const struct fxq_value *shape, bool to_rows, const uint8_t *from, uint8_t *to) {
    const int64_t channels = shape->dimensions > 1 ? shape->shape[1] : 1, pixels = fxq_pixels(shape);
    if (to_rows) fxq_turn_bytes(from, shape->shape[0], pixels, channels, to);
    else fxq_turn_bytes(from, shape->shape[0], channels, pixels, to);
}

static int64_t count_of(const struct fxq_value *value) { return fxq_bytes(value) / (value->is_float ? 4 : 1); }

static int quantize(const struct fxq_step *s, const struct fxq_value *x, struct fxq_value *y, int threads) {
    const int64_t count = count_of(x);
    uint8_t *q = x->by_rows ? fxq_scratch(count) : y->data;
    if (q == NULL) return FXQ_NO_MEMORY;
    fxq_quantize_value(x->data, count, s->call.single.scale, s->call.single.qmax, q, threads);
    if (x->by_rows) turn(x, false, q, y->data);
    return FXQ_OK;
}

static int dequantize(const struct fxq_step *s, const struct fxq_value *x, struct fxq_value *y, int threads) {
    const int64_t count = count_of(x);
    const uint8_t *q = x->data;
    if (y->by_rows) {
        uint8_t *rows = fxq_scratch(count);
        if (rows == NULL) return FXQ_NO_MEMORY;
        turn(x, true, q, rows);
        q = rows;
    }
    fxq_dequantize_value(q, count, s->call.single.scale, y->data, threads);
    return FXQ_OK;
}

static int convolve(struct fxq_step *s, struct fxq_value *values, int threads) {
    struct fxq_convolution *c = &s->call.convolution;
    c->x = values[s->inputs[0]].data;
    c->ending.addend = s->input_count > 1 ? values[s->inputs[1]].data : NULL;
    c->y = values[s->output].data;
    return fxq_convolve(c, threads);
}

static void combine(struct fxq_step *s, struct fxq_value *values, int threads) {
    struct fxq_pair *c = &s->call.pair;
    c->a = values[s->inputs[0]].data;
    c->b = values[s->inputs[1]].data;
    c->out = values[s->output].data;
    fxq_combine(c, threads);
}

static int pool(struct fxq_step *s, struct fxq_value *values, int threads) {
    struct fxq_pool *c = &s->call.pool;
    c->x = values[s->inputs[0]].data;
    c->y = values[s->output].data;
    return fxq_pool_windows(c, threads);
}

static void join(const struct fxq_step *s, const struct fxq_value *values) {
    const struct fxq_value *y = &values[s->output];
    const int64_t pixels = y->shape[0] * fxq_pixels(y), width = y->shape[1];
    uint8_t *to = y->data;
    for (int i = 0; i < s->input_count; i++) {
        const struct fxq_value *x = &values[s->inputs[i]];
        const uint8_t *from = x->data;
        const int64_t channels = x->shape[1];
        for (int64_t p = 0; p < pixels; p++) memcpy(to + p * width, from + p * channels, (size_t)channels);
        to += channels;
    }
}

static void import(const struct fxq_value *x, uint8_t *q) {
    if (x->by_rows) turn(x, false, x->data, q);
    else memcpy(q, x->data, (size_t)count_of(x));
}

static int run_step(struct fxq_step *s, struct fxq_value *values, int threads) {
    struct fxq_value *x = &values[s->inputs[0]], *y = &values[s->output];
    switch (s->operator) {
        case FXQ_IMPORT: import(x, y->data); break;
        case FXQ_QUANTIZE: return quantize(s, x, y, threads);
        case FXQ_DEQUANTIZE: return dequantize(s, x, y, threads);
        case FXQ_CONVOLVE: return convolve(s, values, threads);
        case FXQ_COMBINE: combine(s, values, threads); break;
        case FXQ_POOL: return pool(s, values, threads);
        case FXQ_LOOK_UP: fxq_look_up(x->data, count_of(x), s->call.single.table, y->data, threads); break;
        case FXQ_FLATTEN: turn(x, true, x->data, y->data); break;
        default: join(s, values);
    }
    return FXQ_OK;
}

int fxq_run_steps(struct fxq_step *steps, int count, struct fxq_value *values, int threads) {
    int64_t offsets[FXQ_MOST_VALUES];
    const int64_t bytes = place_values(steps, count, values, offsets);
    char *arena = fxq_arena(bytes);
    if (arena == NULL) return FXQ_NO_MEMORY;
    for (int i = 0; i < count; i++) {
        struct fxq_value *value = &values[steps[i].output];
        if (value->data == NULL) value->data = arena + offsets[steps[i].output];
    }
    int status = FXQ_OK;
    for (int i = 0; i < count && status == FXQ_OK; i++) status = run_step(&steps[i], values, threads);
    return status;
}
