/* The module's calls of recurrent layers: LSTM, GRU and plain RNN. */
#include <stdlib.h>
#include <string.h>

#include "python/calls.h"

/* One item of a sequence of tensors: its owner keeps it alive. */
static PyObject *item(PyObject *sequence, Py_ssize_t i) {
    PyObject *tensor = PySequence_GetItem(sequence, i);
    Py_XDECREF(tensor);
    return tensor;
}

static bool read_item(PyObject *tensors, Py_ssize_t i, int64_t count, const float **data) {
    PyObject *tensor = item(tensors, i);
    return tensor && read_vector(tensor, count, data);
}

enum { WEIGHTS, SCALES, BIASES, HIDDEN_BIASES, FORMATS }; /* the sequences of a recurrent layer's operands */

/* Item i of the weights, in its format, with item i of the scales, whose shape tells a grouped one's group size. */
static bool read_matrix(PyObject *const *parts, Py_ssize_t i, int64_t rows, int64_t columns,
                        struct fxq_weight *weight) {
    PyObject *matrix = item(parts[WEIGHTS], i),
             *scale = PySequence_Size(parts[SCALES]) ? item(parts[SCALES], i) : Py_None;
    PyObject *name = parts[FORMATS] == Py_None ? NULL : item(parts[FORMATS], i);
    if (!matrix || !scale || PyErr_Occurred()) return false;
    const enum fxq_format format = name ? read_format(name) : FXQ_INT8;
    return read_weight(matrix, scale, columns, format, ANY_GROUP, weight) && weight->outputs == rows;
}

/* Fill in the weights of all cells of a call whose sizes are known; whether they all fit. */
static bool read_cells(PyObject *const *parts, const struct fxq_recurrent *call, int gates,
                       struct fxq_recurrent_weights *weights) {
    const Py_ssize_t cells = (Py_ssize_t)call->layers * call->directions,
                     each = PySequence_Size(parts[WEIGHTS]) / cells;
    const bool has_bias = PySequence_Size(parts[BIASES]) > 0, has_own = PySequence_Size(parts[HIDDEN_BIASES]) > 0;
    const int64_t rows = gates * call->hidden;
    for (Py_ssize_t i = 0, at = 0; i < cells; i++, at += each) {
        struct fxq_recurrent_weights *w = &weights[i];
        const int64_t columns = i < call->directions ? call->inputs : call->directions * call->outputs;
        if (!read_matrix(parts, at, rows, columns, &w->ih) ||
            !read_matrix(parts, at + 1, rows, call->outputs, &w->hh) ||
            (has_bias && !read_item(parts[BIASES], i, rows, &w->bias)) ||
            (has_own && !read_item(parts[HIDDEN_BIASES], i, call->hidden, &w->hidden_bias))) {
            return false;
        }
        if (each == 3 && !read_matrix(parts, at + 2, call->outputs, call->hidden, &w->hr)) return false;
    }
    return true;
}

/* Whether the numbers of tensors fit each other. */
static bool are_complete(PyObject *const *parts, int64_t cells, bool is_projected) {
    const Py_ssize_t biases = PySequence_Size(parts[BIASES]), own = PySequence_Size(parts[HIDDEN_BIASES]);
    const Py_ssize_t weights = (Py_ssize_t)cells * (is_projected ? 3 : 2);
    const Py_ssize_t scales = PySequence_Size(parts[SCALES]);
    if (parts[FORMATS] != Py_None && PySequence_Size(parts[FORMATS]) != weights) return false;
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
    if (!read_kind(batch_sizes, INT64, 1, &sizes) || !are_sizes_sound(&sizes, input.shape[0], call->batch))
        return false;
    call->steps = sizes.count;
    call->sizes = sizes.data;
    return true;
}

/* The outputs of a call as a tuple (output, h, or output, h, c), with the initial states copied where they advance. */
static PyObject *new_outputs(struct fxq_recurrent *call, PyObject *x, const struct tensor *h0,
                             const struct tensor *c0) {
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

/* args: asks, x, batch_sizes, h0; parts: weights, scales, biases, hidden_biases, formats (None: all int8); options:
 * bidirectional, per_token, qmax */
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
    call.per_token = INTEGER(options[1]) != 0;
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

/* lstm(asks, x, batch_sizes, h0, c0, weights, scales, biases, bidirectional, per_token, qmax, formats) ->
 * (output, h, c)
 */
PyObject *lstm(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (count != 12) return nothing();
    PyObject *no_hidden_biases = PyTuple_New(0);
    if (no_hidden_biases == NULL) return NULL;
    PyObject *parts[] = {args[5], args[6], args[7], no_hidden_biases, args[11]};
    PyObject *outputs = recurrent((struct fxq_recurrent){.mode = FXQ_LSTM}, 4, args, args[4], parts, args + 8);
    Py_DECREF(no_hidden_biases);
    return outputs;
}

/* rnn(asks, x, batch_sizes, h0, weights, scales, biases, hidden_biases, mode, bidirectional, per_token, qmax, formats)
 * -> (output, h) */
PyObject *rnn(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    static const char *const modes[] = {"gru", "rnn_tanh", "rnn_relu"}; /* in the order of enum fxq_mode */
    if (count != 13) return nothing();
    PyObject *parts[] = {args[4], args[5], args[6], args[7], args[12]};
    for (int i = 0; i < 3; i++) {
        if (PyUnicode_CompareWithASCIIString(args[8], modes[i]) == 0) {
            const struct fxq_recurrent call = {.mode = (enum fxq_mode)(FXQ_GRU + i)};
            return recurrent(call, i == 0 ? 3 : 1, args, Py_None, parts, args + 9);
        }
    }
    return nothing();
}
