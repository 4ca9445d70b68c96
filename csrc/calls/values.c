/* The module's calls of static quantization's operators on single values and on pools' windows. */
#include <math.h>

#include "calls/calls.h"
#include "calls/layout.h"

/* Whether a tensor has no gaps: in some order of its dimensions it is dense. */
static bool has_no_gaps(const struct tensor *x) {
    bool is_used[MOST_DIMENSIONS] = {false};
    int64_t dense = 1;
    for (int i = 0; i < x->dimensions; i++) {
        int next = -1;
        for (int d = 0; d < x->dimensions && next < 0; d++) {
            if (!is_used[d] && (x->shape[d] == 1 || x->strides[d] == dense)) next = d;
        }
        if (next < 0) return x->count == 0;
        is_used[next] = true;
        dense *= x->shape[next];
    }
    return true;
}

static bool read_values(object value, enum dtype dtype, struct tensor *x) {
    return read_strided(value, x) && x->dtype == dtype && has_no_gaps(x);
}

/* A tensor like another one, but for its dtype. */
static object new_like(const struct tensor *x, enum dtype dtype, struct tensor *made) {
    return has_failed() ? NULL : new_strided(x->shape, x->strides, x->dimensions, dtype, made);
}

/* quantize(asks, x, scale, zero_point, qmax) */
CALL(quantize) {
    struct tensor x, made;
    struct fxq_scale scale;
    int qmax;
    if (count != 5 || !may_run(args[0], args[1]) || !read_values(args[1], FLOAT32, &x) ||
        !read_scale(args[2], args[3], &scale) || !read_qmax(args[4], &qmax)) {
        return nothing();
    }
    object output = new_like(&x, UINT8, &made);
    if (output == NULL) return NULL;
    RUN(output, (fxq_quantize_value(x.data, x.count, scale, qmax, made.data, threads), FXQ_OK));
}

/* dequantize(asks, q, scale, zero_point) */
CALL(dequantize) {
    struct tensor q, made;
    struct fxq_scale scale;
    if (count != 4 || !may_run(args[0], args[1]) || !read_values(args[1], UINT8, &q) ||
        !read_scale(args[2], args[3], &scale)) {
        return nothing();
    }
    object output = new_like(&q, FLOAT32, &made);
    if (output == NULL) return NULL;
    RUN(output, (fxq_dequantize_value(q.data, q.count, scale, made.data, threads), FXQ_OK));
}

/* lookup(asks, q, table) */
CALL(lookup) {
    struct tensor q, table, made;
    if (count != 3 || !may_run(args[0], args[1]) || !read_values(args[1], UINT8, &q) ||
        !read_dtype(args[2], UINT8, 1, &table) || table.count != 256) {
        return nothing();
    }
    object output = new_like(&q, UINT8, &made);
    if (output == NULL) return NULL;
    RUN(output, (fxq_look_up(q.data, q.count, table.data, made.data, threads), FXQ_OK));
}

/* Whether a and b are alike, or b has one value for each channel of a's images. */
static bool fit(const struct tensor *a, const struct tensor *b, struct fxq_pair *call) {
    bool is_alike = a->dimensions == b->dimensions, says;
    for (int i = 0; is_alike && i < a->dimensions; i++) {
        is_alike = a->shape[i] == b->shape[i] && (a->shape[i] == 1 || a->strides[i] == b->strides[i]);
    }
    call->images = call->pixels = 1;
    call->channels = a->count;
    if (is_alike) return has_no_gaps(a);
    if (a->dimensions < 4 || b->dimensions != a->dimensions || a->shape[0] != b->shape[0] ||
        a->shape[1] != b->shape[1] || b->count != b->shape[0] * b->shape[1] || !lies_by_pixels(a, &says) || !says ||
        (b->shape[1] > 1 && b->strides[1] != 1) || (b->shape[0] > 1 && b->strides[0] != b->shape[1])) {
        return false;
    }
    call->is_shared = true;
    call->images = a->shape[0];
    call->channels = a->shape[1];
    call->pixels = b->count ? a->count / b->count : 0;
    return true;
}

/* The two values of a pair, and what follows: args from a on. */
static bool read_pair(object const *args, struct tensor *a, struct fxq_pair *call) {
    struct tensor b;
    if (!read_strided(args[0], a) || a->dtype != UINT8 || !read_scale(args[1], args[2], &call->a_scale) ||
        !read_strided(args[3], &b) || b.dtype != UINT8 || !read_scale(args[4], args[5], &call->b_scale) ||
        !read_scale(args[6], args[7], &call->scale) || !read_qmax(args[8], &call->qmax) || !fit(a, &b, call)) {
        return false;
    }
    call->a = a->data;
    call->b = b.data;
    return true;
}

/* add_values(asks, a, its scale and zero point, b, its, scale, zero_point, qmax, alpha, low, high) */
CALL(add_values) {
    struct tensor a, made;
    struct fxq_pair call = {0};
    if (count != 13 || !may_run(args[0], args[1]) || !may_run(args[0], args[4]) || !read_pair(args + 1, &a, &call)) {
        return nothing();
    }
    call.subtracts = NUMBER(args[10]) < 0;
    call.low = read_bound(args[11], -INFINITY);
    call.high = read_bound(args[12], INFINITY);
    object output = new_like(&a, UINT8, &made);
    if (output == NULL) return NULL;
    call.out = made.data;
    RUN(output, (fxq_combine(&call, threads), FXQ_OK));
}

/* mul_values(asks, a, its scale and zero point, b, its, scale, zero_point, qmax, low, high) */
CALL(mul_values) {
    struct tensor a, made;
    struct fxq_pair call = {.multiplies = true};
    if (count != 12 || !may_run(args[0], args[1]) || !may_run(args[0], args[4]) || !read_pair(args + 1, &a, &call)) {
        return nothing();
    }
    call.low = read_bound(args[10], -INFINITY);
    call.high = read_bound(args[11], INFINITY);
    object output = new_like(&a, UINT8, &made);
    if (output == NULL) return NULL;
    call.out = made.data;
    RUN(output, (fxq_combine(&call, threads), FXQ_OK));
}
