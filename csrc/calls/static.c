/* The module's calls of static products. */
#include <math.h>

#include "calls/calls.h"
#include "calls/layout.h"

/* None or a curve's name, which has no bounds beside it, and its slope. */
static bool read_curve(object curve, object slope, struct fxq_ending *to) {
    static const char *const names[] = {"leaky_relu", "hardswish", "silu"};
    to->curve = FXQ_NO_CURVE;
    if (is_none(curve)) return true;
    to->slope = read_bound(slope, 0.0f);
    for (int i = 0; i < 3; i++) {
        if (is_text(curve, names[i])) to->curve = (enum fxq_curve)(i + 1);
    }
    return to->curve != FXQ_NO_CURVE && to->low == -INFINITY && to->high == INFINITY && !has_failed();
}

/* weight_scale, bias, scale, zero_point; and addend and its scale, which lies as the output. */
static bool read_ending(object const *args, object const *more, int64_t outputs, struct fxq_ending *to) {
    to->is_float = is_none(args[2]);
    to->low = read_bound(more[4], -INFINITY);
    to->high = read_bound(more[5], INFINITY);
    return read_vector(args[0], outputs, &to->weight_scale) && read_optional_vector(args[1], outputs, &to->bias) &&
           (to->is_float || (read_scale(args[2], args[3], &to->scale) && read_qmax(more[3], &to->qmax))) &&
           (is_none(more[0]) || read_scale(more[1], more[2], &to->addend_scale)) && read_curve(more[6], more[7], to);
}

static bool read_addend(object value, const struct tensor *output, struct fxq_ending *to) {
    struct tensor addend;
    to->addend = NULL;
    if (is_none(value)) return true;
    if (!read_strided(value, &addend) || addend.dtype != UINT8 || addend.dimensions != output->dimensions) return false;
    for (int i = 0; i < addend.dimensions; i++) {
        if (addend.shape[i] != output->shape[i]) return false;
        if (addend.shape[i] != 1 && addend.strides[i] != output->strides[i]) return false;
    }
    to->addend = addend.data;
    return true;
}

/* The least number of the inputs that can make a sum pass 2^31. */
enum { MOST_WINDOW = 65535 };

/* static_linear(asks, x, x_scale, x_zero_point, weight, weight_scale, bias, scale, zero_point, addend, addend_scale,
 * addend_zero_point, qmax, low, high, curve, slope) */
CALL(static_linear) {
    struct tensor x, weight, made;
    struct fxq_convolution c = {0};
    if (count != 17 || !may_run(args[0], args[1]) || !read_tensor(args[1], &x) || x.dtype != UINT8 ||
        x.dimensions < 1 || !read_scale(args[2], args[3], &c.x_scale) || !read_dtype(args[4], INT8, 2, &weight) ||
        x.shape[x.dimensions - 1] != weight.shape[1] || weight.shape[1] > MOST_WINDOW || weight.shape[1] == 0 ||
        !read_ending(args + 5, args + 9, weight.shape[0], &c.ending)) {
        return nothing();
    }
    for (int i = 0; i < FXQ_SPACE; i++) c.in[i] = c.out[i] = c.kernel[i] = c.stride[i] = c.dilation[i] = 1;
    c.batch = c.groups = 1;
    c.in[2] = c.out[2] = x.count / weight.shape[1];
    c.inputs = weight.shape[1];
    c.outputs = weight.shape[0];
    c.x = x.data;
    c.weight = weight.data;
    c.weight_strides[0] = c.inputs;
    c.weight_strides[1] = 1;
    x.shape[x.dimensions - 1] = c.outputs;
    int64_t strides[MOST_DIMENSIONS];
    set_strides(x.shape, x.dimensions, false, strides);
    object output =
        has_failed() ? NULL : new_strided(x.shape, strides, x.dimensions, c.ending.is_float ? FLOAT32 : UINT8, &made);
    if (output == NULL) return NULL;
    c.y = made.data;
    if (!read_addend(args[9], &made, &c.ending)) {
        drop(output);
        return nothing();
    }
    RUN(output, fxq_convolve(&c, threads));
}

/* How far apart a weight's outputs and inputs lie: a transposed one has its inputs first. */
static void read_channel_strides(const struct tensor *weight, struct fxq_convolution *c) {
    c->weight_strides[0] = weight->strides[c->is_transposed ? 1 : 0];
    c->weight_strides[1] = weight->strides[c->is_transposed ? 0 : 1];
    if (c->is_transposed && c->groups > 1) {
        c->weight_skip = weight->shape[0] / c->groups * weight->strides[0] - weight->shape[1] * weight->strides[1];
        if (weight->shape[1] == 1) c->weight_strides[0] += c->weight_skip, c->weight_skip = 0;
    }
}

/* Sizes of a convolution's input, weight and output; whether they fit. shape: of the output. */
static bool read_sizes(const struct tensor *x, const struct tensor *weight, object const *args,
                       struct fxq_convolution *c, int64_t *shape) {
    const int rank = x->dimensions - 2;
    int64_t sides[2 * FXQ_SPACE], more[FXQ_SPACE] = {0};
    for (int i = 0; i < FXQ_SPACE; i++) c->in[i] = c->out[i] = c->kernel[i] = c->stride[i] = c->dilation[i] = 1;
    c->groups = INTEGER(args[3]);
    c->is_transposed = is_yes(args[4]);
    if (!read_integers(args[0], rank, c->stride) || length_of(args[1]) != 2 * rank ||
        !read_integers(args[2], rank, c->dilation) || c->groups < 1 ||
        (c->is_transposed && !read_integers(args[5], rank, more)) || has_failed()) {
        return false;
    }
    for (int i = 0; i < 2 * rank; i++) sides[i] = integer_at(args[1], i);
    shape[0] = c->batch = x->shape[0];
    shape[1] = c->outputs = c->is_transposed ? weight->shape[1] * c->groups : weight->shape[0];
    c->inputs = x->shape[1];
    read_channel_strides(weight, c);
    int64_t window = c->is_transposed ? weight->shape[0] / c->groups : weight->shape[1];
    for (int i = 0; i < rank; i++) {
        const int at = FXQ_SPACE - rank + i;
        c->in[at] = x->shape[2 + i];
        window *= c->kernel[at] = weight->shape[2 + i];
        c->weight_strides[2 + at] = weight->strides[2 + i];
        c->before[at] = sides[2 * i];
        const int64_t beside = sides[2 * i] + sides[2 * i + 1], reach = c->dilation[at] * (c->kernel[at] - 1) + 1;
        if (sides[2 * i] < 0 || sides[2 * i + 1] < 0 || c->stride[at] < 1 || c->dilation[at] < 1) return false;
        if (c->is_transposed) c->out[at] = (c->in[at] - 1) * c->stride[at] + reach - beside + more[at];
        else c->out[at] = c->in[at] + beside < reach ? 0 : (c->in[at] + beside - reach) / c->stride[at] + 1;
        const bool is_uneven = c->is_transposed && sides[2 * i] != sides[2 * i + 1];
        if (c->in[at] < 1 || c->out[at] < 1 || more[at] < 0 || is_uneven) return false;
        shape[2 + i] = c->out[at];
    }
    return c->inputs == (c->is_transposed ? weight->shape[0] : weight->shape[1] * c->groups) &&
           c->inputs % c->groups == 0 && c->outputs % c->groups == 0 && window > 0 && window <= MOST_WINDOW;
}

/* static_convolution(asks, x, x_scale, x_zero_point, weight, weight_scale, bias, scale, zero_point, stride, padding,
 * dilation, groups, is_transposed, output_padding, addend, addend_scale, addend_zero_point, qmax, low, high, curve,
 * slope) */
CALL(static_convolution) {
    struct tensor x, weight, made;
    struct fxq_convolution c = {0};
    int64_t shape[MOST_DIMENSIONS];
    bool says;
    if (count != 23 || !may_run(args[0], args[1]) || !read_strided(args[1], &x) || x.dtype != UINT8 ||
        x.dimensions < 3 || x.dimensions > 2 + FXQ_SPACE || !read_strided(args[4], &weight) || weight.dtype != INT8 ||
        weight.dimensions != x.dimensions || !lies_by_pixels(&x, &says) || !read_scale(args[2], args[3], &c.x_scale) ||
        !read_sizes(&x, &weight, args + 9, &c, shape) || !read_ending(args + 5, args + 15, c.outputs, &c.ending)) {
        return nothing();
    }
    c.x = x.data;
    c.weight = weight.data;
    object output = has_failed() ? NULL : new_output(args[0], shape, x.dimensions, says, c.ending.is_float, &made);
    if (output == NULL) return nothing();
    c.y = made.data;
    if (!read_addend(args[15], &made, &c.ending)) {
        drop(output);
        return nothing();
    }
    RUN(output, fxq_convolve(&c, threads));
}
