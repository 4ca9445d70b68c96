/* The module's calls of a linear, of a transpose and of a histogram. */
#include "calls/calls.h"

/* The rows of a call's input of any strides, if each of them is dense; dimensions are joined where one goes on as the
 * other. */
static bool read_rows(object value, struct tensor *x, struct fxq_linear *call) {
    if (!read_strided(value, x) || x->dtype != FLOAT32 || x->dimensions < 1 || x->count > INT64_MAX >> 10) return false;
    const int last = x->dimensions - 1;
    struct fxq_rows *rows = &call->x;
    rows->data = x->data;
    call->rows = 1;
    for (int i = 0; i < last; i++) {
        call->rows *= x->shape[i];
        if (x->shape[i] == 1) continue;
        const int outer = rows->dimensions - 1;
        if (outer < 0 || rows->strides[outer] != x->shape[i] * x->strides[i]) rows->sizes[rows->dimensions++] = 1;
        rows->sizes[rows->dimensions - 1] *= x->shape[i];
        rows->strides[rows->dimensions - 1] = x->strides[i];
    }
    return x->strides[last] == 1 || x->shape[last] <= 1 || x->count == 0;
}

/* linear(asks, x, weight, scale, bias, relu, per_token, qmax, format, group_size, in_features) */
CALL(linear) {
    struct tensor x;
    struct fxq_linear call = {0};
    struct fxq_weight *weight = &call.weight;
    if (count != 11) return nothing();
    const int64_t group = INTEGER(args[9]);
    const bool trains_bias = is_yes(args[0]) && !is_none(args[4]) && is_trained(args[4]);
    if (group < 0 || !may_run(args[0], args[1]) || trains_bias || !read_rows(args[1], &x, &call) ||
        !read_weight(args[2], args[3], x.shape[x.dimensions - 1], read_format(args[8]), group, weight) ||
        weight->format == FXQ_FLOAT32 || (group && INTEGER(args[10]) != weight->columns) ||
        !read_optional_vector(args[4], weight->outputs, &call.bias) ||
        (fxq_formats[weight->format].takes == FXQ_TO_UINT8 && !read_qmax(args[7], &call.qmax))) {
        return nothing();
    }
    x.shape[x.dimensions - 1] = weight->outputs;
    call.relu = INTEGER(args[5]) != 0;
    call.per_token = INTEGER(args[6]) != 0;
    RETURN_OUTPUT(x.shape, x.dimensions, (call.out = out, fxq_linear(&call, threads)));
}

/* transpose(asks, x): x (B, M, N) as (B, N, M); None too where M or N is so small that torch's loop does as well */
CALL(transpose) {
    struct tensor x;
    if (count != 2 || !may_run(args[0], args[1]) || !read_dtype(args[1], FLOAT32, 3, &x) || x.shape[1] < 16 ||
        x.shape[2] < 16) {
        return nothing();
    }
    const int64_t *size = x.shape, shape[] = {size[0], size[2], size[1]};
    RETURN_OUTPUT(shape, 3, (fxq_transpose(x.data, size[0], size[1], size[2], out, threads), FXQ_OK));
}

/* histogram(x, inverse, offset): the counts of `fxq_histogram`, (2048,) float32 */
CALL(histogram) {
    struct tensor x;
    const int64_t shape[] = {FXQ_HISTOGRAM_BINS};
    if (count != 3 || !read_tensor(args[0], &x) || x.dtype != FLOAT32 || x.count > 1 << 24) return nothing();
    const float inverse = (float)NUMBER(args[1]), offset = (float)NUMBER(args[2]);
    RETURN_OUTPUT(shape, 1, (fxq_histogram(x.data, x.count, inverse, offset, out), (void)threads, FXQ_OK));
}
