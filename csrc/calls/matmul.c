/* The module's calls of a product of two activations and of attention. */
#include "calls/calls.h"

/* A float operand of any strides, and its place in the batches: `dimensions` of them, where it has 1 it is shared. */
static bool read_operand(object value, int dimensions, struct tensor *x) {
    return read_strided(value, x) && x->dtype == FLOAT32 && x->dimensions >= 2 && x->dimensions <= dimensions;
}

/* Adds an operand's outer dimensions to the batches; whether they broadcast. */
static bool add_batches(const struct tensor *x, int operand, struct fxq_batches *batches) {
    for (int i = 0; i < batches->dimensions; i++) {
        const int at = x->dimensions - 2 - batches->dimensions + i;
        const int64_t size = at < 0 ? 1 : x->shape[at];
        if (size != 1 && batches->sizes[i] != 1 && size != batches->sizes[i]) return false;
        batches->strides[operand][i] = size == 1 ? 0 : x->strides[at];
        if (size != 1) batches->sizes[i] = size;
    }
    return true;
}

/* matmul(asks, a, b): a (..., M, K) by b (..., K, N), broadcast, both of two dimensions or more */
CALL(matmul) {
    struct tensor a, b;
    if (count != 3) return nothing();
    if (!may_run(args[0], args[1]) || !may_run(args[0], args[2]) || !read_operand(args[1], MOST_DIMENSIONS, &a) ||
        !read_operand(args[2], MOST_DIMENSIONS, &b) || a.shape[a.dimensions - 1] != b.shape[b.dimensions - 2]) {
        return nothing();
    }
    const int dimensions = a.dimensions > b.dimensions ? a.dimensions : b.dimensions;
    const int64_t *shape = a.shape + a.dimensions - 2, *a_stride = a.strides + a.dimensions - 2,
                  *b_stride = b.strides + b.dimensions - 2;
    struct fxq_product call = {.a = a.data,
                               .b = b.data,
                               .a_row = a_stride[0],
                               .a_column = a_stride[1],
                               .b_row = b_stride[0],
                               .b_column = b_stride[1],
                               .rows = shape[0],
                               .depth = shape[1],
                               .columns = b.shape[b.dimensions - 1]};
    call.batches.dimensions = dimensions - 2;
    for (int i = 0; i < dimensions - 2; i++) call.batches.sizes[i] = 1;
    if (!add_batches(&a, 0, &call.batches) || !add_batches(&b, 1, &call.batches)) return nothing();
    int64_t sizes[MOST_DIMENSIONS];
    call.batches.count = 1;
    for (int i = 0; i < dimensions - 2; i++) call.batches.count *= sizes[i] = call.batches.sizes[i];
    sizes[dimensions - 2] = call.rows;
    sizes[dimensions - 1] = call.columns;
    RETURN_OUTPUT(sizes, dimensions, (call.out = out, fxq_product(&call, threads)));
}

/* Whether a tensor expands to (batch, heads, m, n) with the call's batch and heads; how it does. */
static bool read_heads(const struct tensor *x, int operand, int64_t m, int64_t n, struct fxq_batches *batches,
                       struct fxq_operand *to) {
    const int64_t sizes[4] = {batches->sizes[0], batches->sizes[1], m, n};
    int64_t strides[4];
    for (int i = 0; i < 4; i++) {
        const int at = x->dimensions - 4 + i;
        if (at >= 0 && x->shape[at] != sizes[i] && x->shape[at] != 1) return false;
        strides[i] = at < 0 || x->shape[at] != sizes[i] ? 0 : x->strides[at];
    }
    batches->strides[operand][0] = strides[0];
    batches->strides[operand][1] = strides[1];
    *to = (struct fxq_operand){x->data, strides[2], strides[3]};
    return true;
}

/* attention(asks, q, k, v, mask, is_causal, scale): q (B, H, L, E), k (B, H, S, E), v (B, H, S, O), mask float and such
 * that it expands to (B, H, L, S), or None -> (B, L, H, O) */
CALL(attention) {
    struct tensor q, k, v, mask;
    if (count != 7) return nothing();
    for (int i = 1; i < 5; i++) {
        if (!is_none(args[i]) && !may_run(args[0], args[i])) return nothing();
    }
    if (!read_operand(args[1], 4, &q) || q.dimensions != 4 || !read_operand(args[2], 4, &k) || k.dimensions != 4 ||
        !read_operand(args[3], 4, &v) || v.dimensions != 4 || k.shape[3] != q.shape[3] || v.shape[2] != k.shape[2] ||
        (!is_none(args[4]) && (!read_strided(args[4], &mask) || mask.dtype != FLOAT32 || mask.dimensions > 4))) {
        return nothing();
    }
    struct fxq_attention call = {.rows = q.shape[2],
                                 .keys = k.shape[2],
                                 .depth = q.shape[3],
                                 .outputs = v.shape[3],
                                 .is_causal = is_true(args[5]),
                                 .scale = (float)NUMBER(args[6])};
    call.batches =
        (struct fxq_batches){.dimensions = 2, .count = q.shape[0] * q.shape[1], .sizes = {q.shape[0], q.shape[1]}};
    if (!read_heads(&q, 0, call.rows, call.depth, &call.batches, &call.q) ||
        !read_heads(&k, 1, call.keys, call.depth, &call.batches, &call.k) ||
        !read_heads(&v, 2, call.keys, call.outputs, &call.batches, &call.v) ||
        (!is_none(args[4]) && !read_heads(&mask, 3, call.rows, call.keys, &call.batches, &call.mask))) {
        return nothing();
    }
    const int64_t shape[] = {q.shape[0], call.rows, q.shape[1], call.outputs};
    RETURN_OUTPUT(shape, 4, (call.out = out, fxq_attention(&call, threads)));
}
