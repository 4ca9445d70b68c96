/* What the calls of the Python module (call_*.c) share: tensors in, tensors out, nothing kept, the GIL released while a
 * kernel runs.
 *
 * Each operator takes what its schema (fxquant/ops/) says, after `asks`: whether it is to look first if anybody
 * watches. It gives None, having done nothing, where somebody does, where arguments are left out, or where a tensor is
 * not dense (the input of a linear: in its last dimension), not of the dtype or shape that the kernels want, or a
 * number is out of range: its caller, fxquant/ops, then makes dense copies, or lets the reference say what is wrong. */
#ifndef FXQ_CALLS_H
#define FXQ_CALLS_H

#include "fxquant.h"
#include "python/tensors.h"

#define INTEGER(object) PyLong_AsLongLong(object)

/* Whether to go on with an operator; else it gives `nothing()`. */
static inline bool may_run(PyObject *asks, PyObject *x) { return asks != Py_True || !is_watched(x); }

static inline PyObject *nothing(void) {
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

/* The greatest integer of activations of 8 bits; whether it is one. */
static inline bool read_qmax(PyObject *number, int *qmax) {
    const long long value = INTEGER(number);
    *qmax = (int)value;
    return value >= 1 && value <= 255;
}

/* weights.c. A matrix of so many columns, with its scales. group: columns that share a scale, 0: none do; ANY_GROUP: as
 * the scales' shape says. */
enum { ANY_GROUP = -1 };
bool read_weight(PyObject *object, PyObject *scale, int64_t columns, enum fxq_format format, int64_t group,
                 struct fxq_weight *weight);
bool read_table(PyObject *object, PyObject *scale, PyObject *zero_point, int64_t columns, enum fxq_format format,
                struct fxq_table *table);
enum fxq_format read_format(PyObject *name); /* FXQ_NONE: there is none of this name */

/* The outputs, or for a status that is not FXQ_OK nothing, or MemoryError. Takes the outputs over. */
static inline PyObject *finish(int status, PyObject *outputs) {
    if (status == FXQ_OK) return outputs;
    Py_DECREF(outputs);
    return status == FXQ_NO_MEMORY ? PyErr_NoMemory() : nothing();
}

/* Ends a call: runs the kernel without the GIL and returns the output as finish() does. kernel: an expression of
 * `threads` that gives a status. */
#define RUN(output, kernel)                 \
    do {                                    \
        const int threads = thread_count(); \
        int status;                         \
        if (PyErr_Occurred()) {             \
            Py_DECREF(output);              \
            return NULL;                    \
        }                                   \
        Py_BEGIN_ALLOW_THREADS              \
        status = (kernel);                  \
        Py_END_ALLOW_THREADS                \
        return finish(status, output);      \
    } while (0)

/* The same of a call with one output, which it makes: float32. kernel: an expression of `out`, the output's data, too.
 */
#define RETURN_OUTPUT(shape, dimensions, kernel)                                               \
    do {                                                                                       \
        struct tensor made;                                                                    \
        PyObject *output = PyErr_Occurred() ? NULL : new_tensor((shape), (dimensions), &made); \
        if (output == NULL) return NULL;                                                       \
        float *const out = made.data;                                                          \
        RUN(output, kernel);                                                                   \
    } while (0)

typedef PyObject *call_of_module(PyObject *self, PyObject *const *args, Py_ssize_t count);
call_of_module linear, transpose, histogram; /* call_linear.c */
call_of_module matmul, attention;            /* call_matmul.c */
call_of_module lstm, rnn;                    /* call_recurrent.c */
call_of_module embedding, embedding_bag;     /* call_embedding.c */

/* call_static.c, call_values.c */
call_of_module static_linear, static_convolution, quantize, dequantize, lookup, add_values, mul_values;
call_of_module mean_value, pool_value, adaptive_pool_value, max_pool_value;
call_of_module plan_run, run; /* call_run.c */

#endif
