/* The steps of a run, with the shapes and tensors of a call. */
#include <string.h>

#include "python/plan.h"

static bool set_scale(const struct tensor *tensors, const int *places, struct fxq_scale *to) {
    if (places[0] < 0 || places[1] < 0) return false;
    const struct tensor *scale = &tensors[places[0]], *zero_point = &tensors[places[1]];
    if (scale->dtype != FLOAT32 || scale->count != 1 || zero_point->dtype != INT32 || zero_point->count != 1)
        return false;
    *to = (struct fxq_scale){*(const float *)scale->data, *(const int32_t *)zero_point->data};
    return to->zero_point >= 0 && to->zero_point <= 255;
}

static bool set_vector(const struct tensor *tensors, int place, int64_t count, const float **to) {
    *to = place < 0 ? NULL : tensors[place].data;
    return place < 0 || (tensors[place].dtype == FLOAT32 && tensors[place].dimensions == 1 &&
                         tensors[place].count == count && (count < 2 || tensors[place].strides[0] == 1));
}

/* places: x's scale, weight, its scale, bias, the output's scale, the addend's. integers: qmax, the curve. */
static bool set_product(const struct template *t, const struct tensor *tensors, struct fxq_step *s,
                        const struct fxq_value *values) {
    struct fxq_convolution *c = &s->call.convolution;
    struct fxq_ending *e = &c->ending;
    e->is_float = t->places[5] < 0;
    e->low = t->low;
    e->high = t->high;
    e->qmax = (int)t->integers[0];
    e->curve = (enum fxq_curve)t->integers[1];
    e->slope = t->slope;
    if (t->places[2] < 0 || t->places[3] < 0) return false;
    const struct tensor *weight = &tensors[t->places[2]];
    c->outputs = weight->shape[0];
    c->weight = weight->data;
    return weight->dtype == INT8 && set_scale(tensors, t->places, &c->x_scale) && !values[s->inputs[0]].is_float &&
           set_vector(tensors, t->places[3], c->outputs, &e->weight_scale) &&
           set_vector(tensors, t->places[4], c->outputs, &e->bias) &&
           (e->is_float || set_scale(tensors, t->places + 5, &e->scale)) &&
           (s->input_count == 1 || set_scale(tensors, t->places + 7, &e->addend_scale));
}

/* The outputs of one dimension, or 0; sides: padding before and after it, or what is left out of them; more: of the
 * outputs of a transposed one. */
static int64_t convolved_size(const struct fxq_convolution *c, int i, const int64_t *sides, int64_t more) {
    const int64_t beside = sides[0] + sides[1], reach = c->dilation[i] * (c->kernel[i] - 1) + 1;
    if (c->in[i] < 1 || (c->is_transposed && sides[0] != sides[1])) return 0;
    if (c->is_transposed) return (c->in[i] - 1) * c->stride[i] + reach - beside + more;
    return c->in[i] + beside < reach ? 0 : (c->in[i] + beside - reach) / c->stride[i] + 1;
}

/* integers: qmax, curve, groups, stride, dilation, padding before and after of each dimension, whether it is
 * transposed, and its output's padding; of a linear the first two are read. */
static bool prepare_product(const struct template *t, const struct tensor *tensors, struct fxq_step *s,
                            struct fxq_value *values) {
    const struct fxq_value *x = &values[s->inputs[0]];
    struct fxq_value *y = &values[s->output];
    struct fxq_convolution *c = &s->call.convolution;
    if (!set_product(t, tensors, s, values)) return false;
    const struct tensor *weight = &tensors[t->places[2]];
    const int rank = x->dimensions - 2;
    const int64_t *stride = t->integers + 3, *dilation = stride + FXQ_SPACE, *sides = dilation + FXQ_SPACE,
                  *more = sides + 2 * FXQ_SPACE;
    if (rank < 0 || weight->dimensions != x->dimensions) return false;
    y->dimensions = x->dimensions;
    y->is_float = c->ending.is_float;
    y->shape[0] = c->batch = x->shape[0];
    y->shape[1] = c->outputs;
    c->inputs = x->shape[1];
    c->groups = t->integers[2];
    c->is_transposed = *more++;
    c->weight_strides[0] = weight->strides[0];
    c->weight_strides[1] = weight->strides[1];
    int64_t window = weight->shape[1];
    for (int i = 0; i < FXQ_SPACE; i++) {
        const int at = i - (FXQ_SPACE - rank);
        c->in[i] = at < 0 ? 1 : x->shape[2 + at];
        c->kernel[i] = at < 0 ? 1 : weight->shape[2 + at];
        c->weight_strides[2 + i] = at < 0 ? 0 : weight->strides[2 + at];
        c->stride[i] = stride[i];
        c->dilation[i] = dilation[i];
        c->before[i] = sides[2 * i];
        c->out[i] = convolved_size(c, i, sides + 2 * i, more[i]);
        if (c->out[i] < 1) return false;
        if (at >= 0) y->shape[2 + at] = c->out[i];
        window *= c->kernel[i];
    }
    return c->inputs == weight->shape[1] * c->groups && c->outputs % c->groups == 0 && window > 0 && window <= 65535;
}

static bool has_shape_of(const struct fxq_value *a, const struct fxq_value *b) {
    return a->dimensions == b->dimensions && memcmp(a->shape, b->shape, (size_t)a->dimensions * sizeof *a->shape) == 0;
}

/* places: the scales of a, of b and of the output. integers: qmax, whether it multiplies, whether it subtracts. */
static bool prepare_pair(const struct template *t, const struct tensor *tensors, struct fxq_step *s,
                         struct fxq_value *values) {
    const struct fxq_value *a = &values[s->inputs[0]], *b = &values[s->inputs[1]];
    struct fxq_pair *c = &s->call.pair;
    *c = (struct fxq_pair){.images = 1,
                           .pixels = 1,
                           .channels = fxq_bytes(a),
                           .low = t->low,
                           .high = t->high,
                           .qmax = (int)t->integers[0],
                           .multiplies = t->integers[1],
                           .subtracts = t->integers[2]};
    values[s->output].dimensions = a->dimensions;
    memcpy(values[s->output].shape, a->shape, sizeof a->shape);
    if (a->is_float || b->is_float || !set_scale(tensors, t->places, &c->a_scale) ||
        !set_scale(tensors, t->places + 2, &c->b_scale) || !set_scale(tensors, t->places + 4, &c->scale)) {
        return false;
    }
    if (has_shape_of(a, b)) return true;
    c->is_shared = true;
    c->images = a->shape[0];
    c->pixels = fxq_pixels(a);
    c->channels = a->shape[1];
    return a->dimensions > 2 && b->dimensions == a->dimensions && b->shape[0] == a->shape[0] &&
           b->shape[1] == a->shape[1] && fxq_pixels(b) == 1;
}

/* integers: qmax, whether it averages, then kernel, stride, before, dilation, and whether sizes are rounded up, whether
 * padding counts, the divisor, whether only batch and channels are left. A kernel of -n: such that n outputs come out;
 * then the first stride is the input's rank. */
static bool prepare_pool(const struct template *t, const struct tensor *tensors, struct fxq_step *s,
                         struct fxq_value *values) {
    const struct fxq_value *x = &values[s->inputs[0]];
    struct fxq_value *y = &values[s->output];
    struct fxq_pool *c = &s->call.pool;
    const int64_t *kernel = t->integers + 2, *stride = kernel + 3, *before = stride + 3, *dilation = before + 3;
    const int rank = x->dimensions - 2;
    *c = (struct fxq_pool){.batch = x->shape[0],
                           .channels = x->shape[1],
                           .is_average = t->integers[1],
                           .qmax = (int)t->integers[0],
                           .counts_padding = t->integers[15],
                           .divisor = t->integers[16]};
    if (rank < 1 || x->is_float || (kernel[FXQ_SPACE - 1] < 0 && stride[0] != rank) ||
        (c->is_average &&
         (!set_scale(tensors, t->places, &c->x_scale) || !set_scale(tensors, t->places + 2, &c->scale)))) {
        return false;
    }
    *y = (struct fxq_value){.dimensions = x->dimensions, .shape = {c->batch, c->channels}, .data = y->data};
    for (int i = 0; i < FXQ_SPACE; i++) {
        const int at = i - (FXQ_SPACE - rank);
        const int64_t in = c->in[i] = at < 0 ? 1 : x->shape[2 + at], parts = kernel[i] < 0 ? -kernel[i] : 1;
        c->kernel[i] = kernel[i] > 0 ? kernel[i] : in / parts;
        c->stride[i] = kernel[i] > 0 ? stride[i] : c->kernel[i];
        c->before[i] = before[i];
        c->dilation[i] = dilation[i];
        c->out[i] = pooled_size(c, i, t->integers[14]);
        if (in % parts || c->kernel[i] < 1 || c->out[i] < 1) return false;
        if (at >= 0) y->shape[2 + at] = c->out[i];
    }
    if (t->integers[17]) y->dimensions = 2;
    return sums_fit(c);
}

/* places: the zero point. integers: padding before and after of each dimension. */
static bool prepare_pad(const struct template *t, const struct tensor *tensors, struct fxq_step *s,
                        struct fxq_value *values) {
    const struct fxq_value *x = &values[s->inputs[0]];
    struct fxq_value *y = &values[s->output];
    struct fxq_pad *c = &s->call.pad;
    if (t->places[0] < 0 || x->is_float || x->dimensions < 3) return false;
    const struct tensor *zero_point = &tensors[t->places[0]];
    const int64_t fill = zero_point->dtype == INT32 && zero_point->count == 1 ? *(const int32_t *)zero_point->data : -1;
    *c = (struct fxq_pad){.batch = x->shape[0], .channels = x->shape[1], .zero_point = (uint8_t)fill};
    *y = (struct fxq_value){.dimensions = x->dimensions, .shape = {c->batch, c->channels}, .data = y->data};
    for (int i = 0; i < FXQ_SPACE; i++) {
        const int at = i - FXQ_RANK + x->dimensions;
        c->in[i] = at < 0 ? 1 : x->shape[2 + at];
        c->before[i] = t->integers[2 * i];
        c->out[i] = padded_size(c->in[i], c->before[i], t->integers[2 * i + 1]);
        if (c->out[i] < 1 || (at < 0 && c->out[i] != 1)) return false;
        if (at >= 0) y->shape[2 + at] = c->out[i];
    }
    return fill >= 0 && fill <= 255;
}

/* integers: the rank, whether corners are aligned, sizes, and factors, which are the bits of doubles; 0: not given. */
static bool prepare_resize(const struct template *t, struct fxq_step *s, struct fxq_value *values) {
    const struct fxq_value *x = &values[s->inputs[0]];
    struct fxq_value *y = &values[s->output];
    struct fxq_resize *c = &s->call.resize;
    const int rank = x->dimensions - 2;
    if (rank < 1 || x->is_float || t->integers[0] != rank) return false;
    *c = (struct fxq_resize){.batch = x->shape[0], .channels = x->shape[1], .aligns_corners = t->integers[1]};
    *y = (struct fxq_value){.dimensions = x->dimensions, .shape = {c->batch, c->channels}, .data = y->data};
    for (int i = 0; i < FXQ_SPACE; i++) {
        const int at = i - FXQ_SPACE + rank;
        double factor;
        memcpy(&factor, &t->integers[5 + i], sizeof factor);
        c->in[i] = at < 0 ? 1 : x->shape[2 + at];
        if (!resized(c, i, at < 0 ? 1 : t->integers[2 + i], at < 0 ? 0.0 : factor)) return false;
        if (at >= 0) y->shape[2 + at] = c->out[i];
    }
    return true;
}

/* places: the tables. */
static bool prepare_tables(const struct template *t, const struct tensor *tensors, struct fxq_step *s,
                           struct fxq_value *values) {
    const struct fxq_value *x = &values[s->inputs[0]];
    struct fxq_value *y = &values[s->output];
    if (t->places[0] < 0 || x->is_float || x->dimensions < 3) return false;
    const struct tensor *table = &tensors[t->places[0]];
    y->dimensions = x->dimensions;
    memcpy(y->shape, x->shape, sizeof y->shape);
    s->call.tables = (struct fxq_tables){
        .tables = table->data, .images = x->shape[0], .channels = x->shape[1], .pixels = fxq_pixels(x)};
    return table->dtype == UINT8 && table->dimensions == 2 && table->shape[0] == x->shape[1] &&
           table->shape[1] == 256 && table->strides[1] == 1 && (table->shape[0] == 1 || table->strides[0] == 256);
}

static bool prepare_flat(struct fxq_step *s, struct fxq_value *values) {
    const struct fxq_value *x = &values[s->inputs[0]];
    struct fxq_value *y = &values[s->output];
    if (x->dimensions < 2 || x->is_float) return false;
    y->dimensions = 2;
    y->shape[0] = x->shape[0];
    y->shape[1] = x->shape[1] * fxq_pixels(x);
    return true;
}

static bool prepare_join(struct fxq_step *s, struct fxq_value *values) {
    struct fxq_value *y = &values[s->output];
    const struct fxq_value *first = &values[s->inputs[0]];
    y->dimensions = first->dimensions;
    memcpy(y->shape, first->shape, sizeof y->shape);
    for (int i = 0; i < s->input_count; i++) {
        const struct fxq_value *x = &values[s->inputs[i]];
        if (x->is_float || x->dimensions != y->dimensions || x->dimensions < 2) return false;
        for (int d = 0; d < x->dimensions; d++) {
            if (d != 1 && x->shape[d] != y->shape[d]) return false;
        }
        if (i) y->shape[1] += x->shape[1];
    }
    return true;
}

/* integers of single values: qmax. */
static bool prepare_single(const struct template *t, const struct tensor *tensors, struct fxq_step *s,
                           struct fxq_value *values) {
    const struct fxq_value *x = &values[s->inputs[0]];
    struct fxq_value *y = &values[s->output];
    y->dimensions = x->dimensions;
    memcpy(y->shape, x->shape, sizeof y->shape);
    y->is_float = s->operator == FXQ_DEQUANTIZE;
    s->call.single.qmax = (int)t->integers[0];
    if (x->is_float != (s->operator == FXQ_QUANTIZE)) return false;
    if (s->operator == FXQ_IMPORT) return true;
    if (s->operator != FXQ_LOOK_UP) return set_scale(tensors, t->places, &s->call.single.scale);
    const struct tensor *table = &tensors[t->places[0]];
    s->call.single.table = table->data;
    return table->dtype == UINT8 && table->dimensions == 1 && table->count == 256 && table->strides[0] == 1;
}

static bool prepare(const struct template *template, const struct tensor *tensors, struct fxq_step *step,
                    struct fxq_value *values) {
    switch (step->operator) {
        case FXQ_CONVOLVE: return prepare_product(template, tensors, step, values);
        case FXQ_COMBINE: return prepare_pair(template, tensors, step, values);
        case FXQ_POOL: return prepare_pool(template, tensors, step, values);
        case FXQ_FLATTEN: return prepare_flat(step, values);
        case FXQ_JOIN: return prepare_join(step, values);
        case FXQ_PAD: return prepare_pad(template, tensors, step, values);
        case FXQ_RESIZE: return prepare_resize(template, step, values);
        case FXQ_LOOK_UP_CHANNELS: return prepare_tables(template, tensors, step, values);
        default: return prepare_single(template, tensors, step, values);
    }
}

/* Whether an operator by itself would give its output by rows: as its input lies, or looks to. */
static bool gives_rows(const struct fxq_step *step, const struct fxq_value *values) {
    const struct fxq_value *x = &values[step->inputs[0]];
    const bool has_windows = step->operator == FXQ_CONVOLVE || step->operator == FXQ_POOL ||
                             step->operator == FXQ_PAD || step->operator == FXQ_RESIZE;
    return x->by_rows || x->dimensions < 4 || (has_windows && (x->shape[1] == 1 || fxq_pixels(x) == 1));
}

bool prepare_step(const struct template *template, const struct tensor *tensors, struct fxq_step *step,
                  struct fxq_value *values) {
    if (!prepare(template, tensors, step, values)) return false;
    values[step->output].by_rows = gives_rows(step, values);
    values[step->output].is_turned = step->operator == FXQ_DEQUANTIZE;
    return true;
}
