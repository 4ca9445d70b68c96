/* The Python module: tensors in, tensors out, nothing kept, the GIL released while a kernel runs.
 *
 * Each operator takes what its schema (fxquant/ops/schema.py) says, after `asks`: whether it is to look first if anybody
 * watches. It gives None, having done nothing, where somebody does, where arguments are left out, or where a tensor is not
 * dense (the input of a linear: in its last dimension), not of the dtype or shape that the kernels want, or a number is out
 * of range: its caller, fxquant/ops, then makes dense copies, or lets the reference say what is wrong. */
#include "tensors.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fxquant.h"

#define INTEGER(object) PyLong_AsLongLong(object)

/* Whether to go on with an operator; else it gives `nothing()`. */
static bool may_run(PyObject *asks, PyObject *x) { return asks != Py_True || !is_watched(x); }

static PyObject *nothing(void) {
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

/* The greatest integer of activations of 8 bits; whether it is one. */
static bool read_qmax(PyObject *number, int *qmax) {
    const long long value = INTEGER(number);
    *qmax = (int)value;
    return value >= 1 && value <= 255;
}

/* The outputs, or for a status that is not FXQ_OK nothing, or MemoryError. Takes the outputs over. */
static PyObject *finish(int status, PyObject *outputs) {
    if (status == FXQ_OK) return outputs;
    Py_DECREF(outputs);
    return status == FXQ_NO_MEMORY ? PyErr_NoMemory() : nothing();
}

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
static PyObject *linear(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct tensor x, out;
    struct fxq_linear call = {0};
    if (count != 10) return nothing();
    const int64_t group = INTEGER(args[8]);
    if (!may_run(args[0], args[1]) || !read_rows(args[1], &x, &call) ||
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
static PyObject *transpose(PyObject *self, PyObject *const *args, Py_ssize_t count) {
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

/* One item of a sequence of tensors: its owner keeps it alive. */
static PyObject *item(PyObject *sequence, Py_ssize_t i) {
    PyObject *tensor = PySequence_GetItem(sequence, i);
    Py_XDECREF(tensor);
    return tensor;
}

/* The least group size that gives so many groups, or 0. */
static int64_t group_size_of(int64_t columns, int64_t groups) {
    for (int64_t size = 32; size <= 128; size *= 2) {
        if ((columns + size - 1) / size == groups) return size;
    }
    return 0;
}

/* Item i of the weights with item i of the scales; floats have none, or one of any kind. */
static bool read_matrix(PyObject *weights, PyObject *scales, Py_ssize_t i, int64_t rows, int64_t columns,
                        struct fxq_matrix *matrix) {
    struct tensor values, scale;
    PyObject *weight = item(weights, i), *of_weight = PySequence_Size(scales) ? item(scales, i) : Py_None;
    if (!weight || !of_weight || !read_tensor(weight, &values) || values.dimensions != 2 || values.shape[0] != rows) return false;
    if (values.kind == FLOAT16 || values.kind == FLOAT32) {
        if (values.kind == FLOAT16) matrix->halves = values.data;
        else matrix->floats = values.data;
        return values.shape[1] == columns;
    }
    if (values.kind == INT8 || values.kind == INT16) {
        if (values.kind == INT8) matrix->values = values.data;
        else matrix->int16 = values.data;
        return values.shape[1] == columns && read_vector(of_weight, rows, &matrix->scale);
    }
    if (values.kind != UINT8 || values.shape[1] != (columns + 1) / 2 || !read_kind(of_weight, BFLOAT16, 2, &scale)) return false;
    const int64_t groups = scale.shape[1], group = group_size_of(columns, groups);
    matrix->int4 = (struct fxq_linear_int4){values.data, scale.data, group, groups};
    return scale.shape[0] == rows && group > 0;
}

static bool read_item(PyObject *tensors, Py_ssize_t i, int64_t count, const float **data) {
    PyObject *tensor = item(tensors, i);
    return tensor && read_vector(tensor, count, data);
}

enum { WEIGHTS, SCALES, BIASES, HIDDEN_BIASES }; /* the sequences of a recurrent layer's tensors */

/* Fill in the weights of all cells of a call whose sizes are known; whether they all fit. */
static bool read_cells(PyObject *const *parts, const struct fxq_recurrent *call, int gates,
                       struct fxq_recurrent_weights *weights) {
    const Py_ssize_t cells = (Py_ssize_t)call->layers * call->directions, each = PySequence_Size(parts[WEIGHTS]) / cells;
    const bool has_bias = PySequence_Size(parts[BIASES]) > 0, has_own = PySequence_Size(parts[HIDDEN_BIASES]) > 0;
    const int64_t rows = gates * call->hidden;
    for (Py_ssize_t i = 0, at = 0; i < cells; i++, at += each) {
        struct fxq_recurrent_weights *w = &weights[i];
        const int64_t columns = i < call->directions ? call->inputs : call->directions * call->outputs;
        if (!read_matrix(parts[WEIGHTS], parts[SCALES], at, rows, columns, &w->ih) ||
            !read_matrix(parts[WEIGHTS], parts[SCALES], at + 1, rows, call->outputs, &w->hh) ||
            (has_bias && !read_item(parts[BIASES], i, rows, &w->bias)) ||
            (has_own && !read_item(parts[HIDDEN_BIASES], i, call->hidden, &w->hidden_bias))) {
            return false;
        }
        if (each == 3 && !read_matrix(parts[WEIGHTS], parts[SCALES], at + 2, call->outputs, call->hidden, &w->hr)) return false;
    }
    return true;
}

/* Whether the numbers of tensors fit each other. */
static bool are_complete(PyObject *const *parts, int64_t cells, bool is_projected) {
    const Py_ssize_t biases = PySequence_Size(parts[BIASES]), own = PySequence_Size(parts[HIDDEN_BIASES]);
    const Py_ssize_t weights = (Py_ssize_t)cells * (is_projected ? 3 : 2);
    const Py_ssize_t scales = PySequence_Size(parts[SCALES]);
    return PySequence_Size(parts[WEIGHTS]) == weights && (scales == 0 || scales == weights) &&
           (biases == 0 || biases == cells) && (own == 0 || own == cells);
}

/* Whether packed rows fall from at most `batch` to at least 1 and are `rows` together. */
static bool are_sizes_sound(const struct tensor *sizes, int64_t rows, int64_t batch) {
    const int64_t *size = sizes->data;
    for (int64_t i = 0; i < sizes->count; i++) {
        if (size[i] < 1 || size[i] > (i ? size[i - 1] : batch)) return false;
        rows -= size[i];
    }
    return rows == 0;
}

/* The input and the states' sizes; whether they fit each other and are not empty. */
static bool read_sequence(struct fxq_recurrent *call, PyObject *x, PyObject *batch_sizes, PyObject *h0, PyObject *c0,
                          struct tensor *state, struct tensor *cell_state, bool is_bidirectional) {
    struct tensor input, sizes;
    const bool is_packed = batch_sizes != Py_None;
    if (!read_kind(x, FLOAT32, is_packed ? 2 : 3, &input) || !read_kind(h0, FLOAT32, 3, state)) return false;
    *cell_state = *state;
    if (c0 != Py_None && !read_kind(c0, FLOAT32, 3, cell_state)) return false;
    call->x = input.data;
    call->inputs = input.shape[input.dimensions - 1];
    call->batch = state->shape[1];
    call->outputs = state->shape[2];
    call->hidden = cell_state->shape[2];
    call->directions = is_bidirectional ? 2 : 1;
    call->layers = (int)(state->shape[0] / call->directions);
    call->steps = input.shape[0];
    if (state->shape[0] % call->directions || cell_state->shape[0] != state->shape[0] ||
        cell_state->shape[1] != call->batch || !input.count || !state->count || !cell_state->count) {
        return false;
    }
    if (!is_packed) return input.shape[1] == call->batch;
    if (!read_kind(batch_sizes, INT64, 1, &sizes) || !are_sizes_sound(&sizes, input.shape[0], call->batch)) return false;
    call->steps = sizes.count;
    call->sizes = sizes.data;
    return true;
}

/* The outputs of a call as a tuple (output, h, or output, h, c), with the initial states copied where they advance. */
static PyObject *new_outputs(struct fxq_recurrent *call, PyObject *x, const struct tensor *h0, const struct tensor *c0) {
    struct tensor out, h, c;
    if (!read_tensor(x, &out)) return NULL;
    out.shape[out.dimensions - 1] = call->directions * call->outputs;
    const bool has_cells = call->mode == FXQ_LSTM;
    PyObject *outputs = PyTuple_New(has_cells ? 3 : 2);
    PyObject *made[3] = {new_tensor(out.shape, out.dimensions, &out), new_tensor(h0->shape, 3, &h),
                         has_cells ? new_tensor(c0->shape, 3, &c) : NULL};
    bool are_made = outputs != NULL;
    for (int i = 0; i < (has_cells ? 3 : 2); i++) {
        are_made = are_made && made[i];
        if (outputs && made[i]) PyTuple_SetItem(outputs, i, made[i]);
        else Py_XDECREF(made[i]);
    }
    if (!are_made) {
        Py_XDECREF(outputs);
        return NULL;
    }
    call->h0 = h0->data;
    call->h = h.data;
    call->out = out.data;
    if (has_cells) {
        memcpy(c.data, c0->data, (size_t)c.count * sizeof(float));
        call->c = c.data;
    }
    return outputs;
}

/* args: asks, x, batch_sizes, h0; parts: weights, scales, biases, hidden_biases; options: bidirectional, per_row, qmax */
static PyObject *recurrent(struct fxq_recurrent call, int gates, PyObject *const *args, PyObject *c0,
                           PyObject *const *parts, PyObject *const *options) {
    struct tensor h, c;
    if (!may_run(args[0], args[1]) || !may_run(args[0], args[3]) || (c0 != Py_None && !may_run(args[0], c0)) ||
        !read_sequence(&call, args[1], args[2], args[3], c0, &h, &c, INTEGER(options[0]) != 0)) {
        return nothing();
    }
    const int64_t cells = h.shape[0];
    const bool is_projected = PySequence_Size(parts[WEIGHTS]) == 3 * cells;
    if (!are_complete(parts, cells, is_projected) || (!is_projected && call.hidden != call.outputs) ||
        !read_qmax(options[2], &call.qmax)) {
        return nothing();
    }
    call.per_row = INTEGER(options[1]) != 0;
    const int threads = thread_count();
    if (PyErr_Occurred()) return NULL;
    struct fxq_recurrent_weights *weights = calloc((size_t)cells, sizeof *weights);
    if (weights == NULL) return PyErr_NoMemory();
    PyObject *outputs = read_cells(parts, &call, gates, weights) ? new_outputs(&call, args[1], &h, &c) : nothing();
    if (outputs && outputs != Py_None) {
        call.cells = weights;
        int status;
        Py_BEGIN_ALLOW_THREADS
        status = fxq_recurrent(&call, threads);
        Py_END_ALLOW_THREADS
        outputs = finish(status, outputs);
    }
    free(weights);
    return outputs;
}

/* lstm(asks, x, batch_sizes, h0, c0, weights, scales, biases, bidirectional, per_row, qmax) -> (output, h, c) */
static PyObject *lstm(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (count != 11) return nothing();
    PyObject *no_hidden_biases = PyTuple_New(0);
    if (no_hidden_biases == NULL) return NULL;
    PyObject *parts[] = {args[5], args[6], args[7], no_hidden_biases};
    PyObject *outputs = recurrent((struct fxq_recurrent){.mode = FXQ_LSTM}, 4, args, args[4], parts, args + 8);
    Py_DECREF(no_hidden_biases);
    return outputs;
}

/* rnn(asks, x, batch_sizes, h0, weights, scales, biases, hidden_biases, mode, bidirectional, per_row, qmax) -> (output, h) */
static PyObject *rnn(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    static const char *const modes[] = {"gru", "rnn_tanh", "rnn_relu"}; /* in the order of enum fxq_mode */
    if (count != 12) return nothing();
    for (int i = 0; i < 3; i++) {
        if (PyUnicode_CompareWithASCIIString(args[8], modes[i]) == 0) {
            const struct fxq_recurrent call = {.mode = (enum fxq_mode)(FXQ_GRU + i)};
            return recurrent(call, i == 0 ? 3 : 1, args, Py_None, args + 4, args + 9);
        }
    }
    return nothing();
}

/* indices, weight, scale, zero_point, embedding_dim as the operators have them */
static bool read_table(PyObject *const *args, int bits, PyObject *dtype, struct fxq_table *table, struct fxq_indices *indices,
                       struct tensor *index) {
    struct tensor weight;
    const int64_t columns = INTEGER(args[4]), width = bits == 4 ? (columns + 1) / 2 : columns;
    if (!is_float32(dtype) || !read_tensor(args[0], index) || (index->kind != INT32 && index->kind != INT64) ||
        index->dimensions == MOST_DIMENSIONS || !read_tensor(args[1], &weight) || weight.dimensions != 2 ||
        (weight.kind != INT8 && weight.kind != UINT8 && weight.kind != FLOAT16) || weight.shape[1] != width) {
        return false;
    }
    const bool is_half = weight.kind == FLOAT16;
    *table = (struct fxq_table){.values = weight.data, .rows = weight.shape[0], .columns = columns, .bits = is_half ? 16 : bits,
                                .is_signed = weight.kind == INT8};
    *indices = (struct fxq_indices){index->data, index->count, index->kind == INT64};
    if (is_half) return bits != 4 && args[2] == Py_None && args[3] == Py_None;
    if (bits != 4 && bits != 8) return false;
    return read_vector(args[2], table->rows, &table->scale) && read_optional_vector(args[3], table->rows, &table->zero_point);
}

/* embedding(asks, indices, weight, scale, zero_point, embedding_dim, bits, dtype); None too for an index beyond the table */
static PyObject *embedding(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct tensor index, out;
    struct fxq_table table;
    struct fxq_indices indices;
    if (count != 8) return nothing();
    if (!may_run(args[0], args[1]) || !read_table(args + 1, (int)INTEGER(args[6]), args[7], &table, &indices, &index)) {
        return nothing();
    }
    const int threads = thread_count();
    if (PyErr_Occurred()) return NULL;
    index.shape[index.dimensions] = table.columns;
    PyObject *made = new_tensor(index.shape, index.dimensions + 1, &out);
    if (made == NULL) return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fxq_embedding(&table, &indices, out.data, threads);
    Py_END_ALLOW_THREADS
    return finish(status, made);
}

/* How the indices are divided into bags: mode, offsets or None, per_sample_weights or None, include_last_offset. */
static bool read_bags(PyObject *mode, PyObject *offsets, PyObject *weights, bool has_end, const struct tensor *index,
                      struct fxq_bags *bags) {
    static const char *const modes[] = {"sum", "mean", "max"}; /* FXQ_SUM, FXQ_MEAN, FXQ_MAX */
    struct tensor tensor;
    for (bags->mode = 0; bags->mode < 3 && PyUnicode_CompareWithASCIIString(mode, modes[bags->mode]) != 0;) bags->mode++;
    if (bags->mode == 3 || index->dimensions != (offsets == Py_None ? 2 : 1)) return false;
    bags->count = index->shape[0];
    bags->width = offsets == Py_None ? index->shape[1] : 0;
    if (offsets != Py_None) {
        if (!read_kind(offsets, INT64, 1, &tensor) || tensor.count < has_end) return false;
        bags->offsets = tensor.data;
        bags->has_end = has_end;
        bags->count = tensor.count - has_end;
    }
    if (weights == Py_None) return true;
    if (bags->mode != FXQ_SUM || !read_kind(weights, FLOAT32, index->dimensions, &tensor) ||
        memcmp(tensor.shape, index->shape, (size_t)index->dimensions * sizeof *index->shape) != 0) {
        return false;
    }
    bags->weights = tensor.data;
    return true;
}

/* embedding_bag(asks, indices, weight, scale, zero_point, embedding_dim, offsets, mode, per_sample_weights,
 *               include_last_offset, padding_idx, bits, dtype); None too for an index beyond the table, or offsets that do
 * not rise from 0 to the number of indices */
static PyObject *embedding_bag(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct tensor index, out;
    struct fxq_table table;
    struct fxq_indices indices;
    struct fxq_bags bags = {.padding = -1};
    if (count != 13) return nothing();
    if (!may_run(args[0], args[1]) || (args[8] != Py_None && !may_run(args[0], args[8])) ||
        !read_table(args + 1, (int)INTEGER(args[11]), args[12], &table, &indices, &index) ||
        !read_bags(args[7], args[6], args[8], INTEGER(args[9]) != 0, &index, &bags)) {
        return nothing();
    }
    if (args[10] != Py_None) {
        bags.padding = INTEGER(args[10]);
        if (bags.padding < 0) bags.padding += table.rows;
    }
    const int threads = thread_count();
    if (PyErr_Occurred()) return NULL;
    PyObject *made = new_tensor((int64_t[]){bags.count, table.columns}, 2, &out);
    if (made == NULL) return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fxq_embedding_bag(&table, &indices, &bags, out.data, threads);
    Py_END_ALLOW_THREADS
    return finish(status, made);
}

/* isas() -> ((name, obstacle), ...), best first; an empty obstacle: it can be used */
static PyObject *isas(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *all = PyTuple_New(fxq_isa_count());
    for (int i = 0; all && i < fxq_isa_count(); i++) {
        PyObject *pair = Py_BuildValue("(ss)", fxq_isa_name(i), fxq_isa_obstacle(i));
        if (pair == NULL || PyTuple_SetItem(all, i, pair) != 0) Py_CLEAR(all);
    }
    return all;
}

static PyObject *active_isa(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyUnicode_FromString(fxq_active->name);
}

/* select_isa(index into isas()) -> whether it is now in use. No kernel may be running. */
static PyObject *select_isa(PyObject *self, PyObject *index) {
    (void)self;
    const long long i = INTEGER(index);
    if (PyErr_Occurred()) return NULL;
    return PyBool_FromLong(i >= 0 && i < fxq_isa_count() && fxq_select_isa((int)i));
}

/* use_huge_pages(address, bytes): ask for them; whether they come does not matter */
static PyObject *use_huge_pages(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "use_huge_pages takes 2 arguments, got %zd", count);
    const uintptr_t address = (uintptr_t)PyLong_AsVoidPtr(args[0]), bytes = (uintptr_t)INTEGER(args[1]);
    if (PyErr_Occurred()) return NULL;
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
    if (first < last) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)address, (void)bytes;
#endif
    Py_RETURN_NONE;
}

/* set_least_share(multiplications): tests make threads share even the smallest work */
static PyObject *set_least_share(PyObject *self, PyObject *least) {
    (void)self;
    const long long value = INTEGER(least);
    if (PyErr_Occurred()) return NULL;
    fxq_least_share = value < 1 ? 1 : value;
    Py_RETURN_NONE;
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {
    FAST(set_torch), FAST(linear), FAST(transpose), FAST(lstm), FAST(rnn), FAST(embedding), FAST(embedding_bag),
    FAST(use_huge_pages),
    {"isas", isas, METH_NOARGS, NULL},
    {"active_isa", active_isa, METH_NOARGS, NULL},
    {"select_isa", select_isa, METH_O, NULL},
    {"set_least_share", set_least_share, METH_O, NULL},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "fxquant's CPU kernels.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    fxq_select_isa(-1);
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddIntConstant(module, "interface", 8) != 0) Py_CLEAR(module); /* of native.py's _INTERFACE */
    return module;
}
