/* The module's calls of a linear and of a transpose. */
#include "python/calls.h"

/* The weight and scale of a linear of so many columns: int8, int16, float16 without a scale or, with a group size, int4. */
static bool read_weight(PyObject *weight, PyObject *scale, int64_t columns, int64_t group, struct fxq_linear *call) {
    struct tensor matrix, scales;
    if (!read_tensor(weight, &matrix) || matrix.dimensions != 2) return false;
    if (group ? matrix.kind != UINT8 : matrix.kind != INT8 && matrix.kind != INT16 && matrix.kind != FLOAT16) return false;
    call->outputs = matrix.shape[0];
    call->columns = columns;
    if (group == 0) {
        call->kind = matrix.kind == INT16 ? FXQ_KIND_INT16 : matrix.kind == FLOAT16 ? FXQ_KIND_FLOAT : FXQ_KIND_UINT8;
        call->weight = matrix.data;
        return matrix.shape[1] == columns && (call->kind == FXQ_KIND_FLOAT || read_vector(scale, call->outputs, &call->scale));
    }
    if ((group != 32 && group != 64 && group != 128) || columns == 0) return false;
    call->int4 = (struct fxq_linear_int4){matrix.data, NULL, group, (columns + group - 1) / group};
    if (matrix.shape[1] != (columns + 1) / 2 || !read_kind(scale, BFLOAT16, 2, &scales)) return false;
    call->int4.scale = scales.data;
    return scales.shape[0] == call->outputs && scales.shape[1] == call->int4.groups;
}

/* The rows of a call's input of any strides, if each of them is dense; dimensions are joined where one goes on as the other. */
static bool read_rows(PyObject *object, struct tensor *x, struct fxq_linear *call) {
    if (!read_strided(object, x) || x->kind != FLOAT32 || x->dimensions < 1 || x->count > INT64_MAX >> 10) return false;
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

/* linear(asks, x, weight, scale, bias, relu, per_row, qmax, group_size, in_features) */
PyObject *linear(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct tensor x, out;
    struct fxq_linear call = {0};
    if (count != 10) return nothing();
    const int64_t group = INTEGER(args[8]);
    const bool trains_bias = args[0] == Py_True && args[4] != Py_None && is_trained(args[4]);
    if (!may_run(args[0], args[1]) || trains_bias || !read_rows(args[1], &x, &call) ||
        !read_weight(args[2], args[3], x.shape[x.dimensions - 1], group, &call) ||
        (group && INTEGER(args[9]) != call.columns) || !read_optional_vector(args[4], call.outputs, &call.bias) ||
        (call.kind == FXQ_KIND_UINT8 && !read_qmax(args[7], &call.qmax))) {
        return nothing();
    }
    x.shape[x.dimensions - 1] = call.outputs;
    call.relu = INTEGER(args[5]) != 0;
    call.per_row = INTEGER(args[6]) != 0;
    const int threads = thread_count();
    PyObject *made = PyErr_Occurred() ? NULL : new_tensor(x.shape, x.dimensions, &out);
    if (made == NULL) return NULL;
    call.out = out.data;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = (group ? fxq_linear_int4 : fxq_linear)(&call, threads);
    Py_END_ALLOW_THREADS
    return finish(status, made);
}

/* transpose(asks, x): x (B, M, N) as (B, N, M); None too where M or N is so small that torch's loop does as well */
PyObject *transpose(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct tensor x, out;
    if (count != 2 || !may_run(args[0], args[1]) || !read_kind(args[1], FLOAT32, 3, &x) || x.shape[1] < 16 || x.shape[2] < 16) {
        return nothing();
    }
    const int threads = thread_count();
    if (PyErr_Occurred()) return NULL;
    PyObject *made = new_tensor((int64_t[]){x.shape[0], x.shape[2], x.shape[1]}, 3, &out);
    if (made == NULL) return NULL;
    Py_BEGIN_ALLOW_THREADS
    fxq_transpose(x.data, x.shape[0], x.shape[1], x.shape[2], out.data, threads);
    Py_END_ALLOW_THREADS
    return made;
}
