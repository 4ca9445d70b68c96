/* The module's calls of static quantization's pools. */
#include "calls/calls.h"
#include "calls/layout.h"

/* A pool's input, whose channels are its second dimension. */
static bool read_pooled(object value, struct tensor *x, bool *says, struct fxq_pool *call) {
    if (!read_strided(value, x) || x->dtype != UINT8 || x->dimensions < 3 || x->dimensions > 2 + FXQ_SPACE ||
        !lies_by_pixels(x, says) || x->count == 0) {
        return false;
    }
    call->x = x->data;
    call->batch = x->shape[0];
    call->channels = x->shape[1];
    for (int i = 0; i < FXQ_SPACE; i++) {
        call->in[i] = call->out[i] = call->kernel[i] = call->stride[i] = call->dilation[i] = 1;
    }
    for (int i = 2; i < x->dimensions; i++) call->in[FXQ_SPACE - x->dimensions + i] = x->shape[i];
    return true;
}

/* The output's size in one dimension, as torch has it. */
int64_t pooled_size(const struct fxq_pool *c, int i, bool rounds_up) {
    const int64_t window = c->dilation[i] * (c->kernel[i] - 1) + 1, whole = c->in[i] + 2 * c->before[i] - window;
    if (whole < 0) return 0;
    int64_t size = (whole + (rounds_up ? c->stride[i] - 1 : 0)) / c->stride[i] + 1;
    if (rounds_up && (size - 1) * c->stride[i] >= c->in[i] + c->before[i]) size--;
    return size;
}

/* Whether 32 bits hold the sum of a window. */
bool sums_fit(const struct fxq_pool *c) {
    return !c->is_average || c->kernel[0] * c->kernel[1] * c->kernel[2] <= INT32_MAX / 255;
}

/* kernel, stride, padding */
static bool read_windows(object const *args, int rank, struct fxq_pool *call) {
    if (!read_integers(args[0], rank, call->kernel) || !read_integers(args[1], rank, call->stride) ||
        !read_integers(args[2], rank, call->before)) {
        return false;
    }
    for (int i = 0; i < FXQ_SPACE; i++) {
        if (call->kernel[i] < 1 || call->stride[i] < 1 || call->before[i] < 0 || 2 * call->before[i] > call->kernel[i])
            return false;
    }
    return true;
}

static object run_pool(object asks, struct tensor *x, bool says, bool rounds_up, struct fxq_pool *call) {
    struct tensor made;
    for (int i = 0; i < FXQ_SPACE; i++) call->out[i] = pooled_size(call, i, rounds_up);
    for (int i = 2; i < x->dimensions; i++) x->shape[i] = call->out[FXQ_SPACE - x->dimensions + i];
    if (call->out[0] < 1 || call->out[1] < 1 || call->out[2] < 1 || !sums_fit(call) || has_failed()) return nothing();
    object output = new_output(asks, x->shape, x->dimensions, says, false, &made);
    if (output == NULL) return nothing();
    call->y = made.data;
    RUN(output, fxq_pool_windows(call, threads));
}

/* max_pool_value(asks, x, kernel, stride, padding, dilation, ceil_mode) */
CALL(max_pool_value) {
    struct tensor x;
    struct fxq_pool call = {0};
    bool says;
    if (count != 7 || !may_run(args[0], args[1]) || !read_pooled(args[1], &x, &says, &call) ||
        !read_windows(args + 2, x.dimensions - 2, &call) || !read_integers(args[5], x.dimensions - 2, call.dilation) ||
        call.dilation[0] < 1 || call.dilation[1] < 1 || call.dilation[2] < 1) {
        return nothing();
    }
    return run_pool(args[0], &x, says, is_yes(args[6]), &call);
}

/* x, its scale and zero point, scale, zero_point; and qmax */
static bool read_averaged(object const *args, object qmax, struct tensor *x, bool *says, struct fxq_pool *call) {
    call->is_average = true;
    return may_run(args[0], args[1]) && read_pooled(args[1], x, says, call) &&
           read_scale(args[2], args[3], &call->x_scale) && read_scale(args[4], args[5], &call->scale) &&
           read_qmax(qmax, &call->qmax);
}

/* pool_value(asks, x, its scale and zero point, scale, zero_point, kernel, stride, padding, ceil_mode,
 * count_include_pad, divisor, qmax) */
CALL(pool_value) {
    struct tensor x;
    struct fxq_pool call = {0};
    bool says;
    if (count != 13 || !read_averaged(args, args[12], &x, &says, &call) ||
        !read_windows(args + 6, x.dimensions - 2, &call)) {
        return nothing();
    }
    call.counts_padding = is_yes(args[10]);
    call.divisor = is_none(args[11]) ? 0 : INTEGER(args[11]);
    if (!is_none(args[11]) && call.divisor < 1) return nothing();
    return run_pool(args[0], &x, says, is_yes(args[9]), &call);
}

/* adaptive_pool_value(asks, x, its scale and zero point, scale, zero_point, size, qmax): sizes that divide the input's
 */
CALL(adaptive_pool_value) {
    struct tensor x;
    struct fxq_pool call = {0};
    int64_t size[FXQ_SPACE] = {1, 1, 1};
    bool says;
    if (count != 8 || !read_averaged(args, args[7], &x, &says, &call) ||
        !read_integers(args[6], x.dimensions - 2, size)) {
        return nothing();
    }
    for (int i = 0; i < FXQ_SPACE; i++) {
        if (size[i] < 1 || call.in[i] % size[i]) return nothing();
        call.kernel[i] = call.stride[i] = call.in[i] / size[i];
    }
    return run_pool(args[0], &x, says, false, &call);
}

/* mean_value(asks, x, its scale and zero point, scale, zero_point, dims, keepdim, qmax): over all but batch and
 * channels */
CALL(mean_value) {
    struct tensor x, made;
    struct fxq_pool call = {0};
    bool says, is_meant[MOST_DIMENSIONS] = {false};
    if (count != 9 || !read_averaged(args, args[8], &x, &says, &call) || length_of(args[6]) != x.dimensions - 2) {
        return nothing();
    }
    for (int i = 2; i < x.dimensions; i++) {
        const int64_t dim = integer_at(args[6], i - 2), at = dim < 0 ? dim + x.dimensions : dim;
        if (at < 2 || at >= x.dimensions || is_meant[at]) return nothing();
        is_meant[at] = true;
    }
    for (int i = 0; i < FXQ_SPACE; i++) call.kernel[i] = call.stride[i] = call.in[i];
    if (is_yes(args[7])) return run_pool(args[0], &x, says, false, &call);
    if (!sums_fit(&call)) return nothing();
    const int64_t strides[2] = {x.shape[1], 1};
    object output = has_failed() ? NULL : new_strided(x.shape, strides, 2, UINT8, &made);
    if (output == NULL) return NULL;
    call.y = made.data;
    RUN(output, fxq_pool_windows(&call, threads));
}
