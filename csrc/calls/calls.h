/* What the operators' calls share: tensors in, tensors out, nothing kept. They are compiled once for each door:
 * Python's module and torch's dispatcher (door.h).
 *
 * Each operator takes what its schema (fxquant/ops/) says, after `asks`: whether it is to look first if anybody
 * watches. It gives None, having done nothing, where somebody does, where arguments are left out, or where a tensor is
 * not dense (the input of a linear: in its last dimension), not of the dtype or shape that the kernels want, or a
 * number is out of range: its caller, fxquant/ops, then makes dense copies, or lets the reference say what is wrong. */
#ifndef FXQ_CALLS_H
#define FXQ_CALLS_H

#include "fxquant.h"
#include "calls/tensors.h"

/* Whether to go on with an operator; else it gives `nothing()`. */
static inline bool may_run(object asks, object x) { return !is_yes(asks) || !is_watched(x); }

static inline object nothing(void) { return has_failed() ? NULL : new_none(); }

/* The greatest integer of activations of 8 bits; whether it is one. */
static inline bool read_qmax(object number, int *qmax) {
    const long long value = INTEGER(number);
    *qmax = (int)value;
    return value >= 1 && value <= 255;
}

/* weights.c. A matrix of so many columns, with its scales. group: columns that share a scale, 0: none do; ANY_GROUP: as
 * the scales' shape says. */
enum { ANY_GROUP = -1 };
bool read_weight(object value, object scale, int64_t columns, enum fxq_format format, int64_t group,
                 struct fxq_weight *weight);
bool read_table(object value, object scale, object zero_point, int64_t columns, enum fxq_format format,
                struct fxq_table *table);
enum fxq_format read_format(object name); /* FXQ_NONE: there is none of this name */

/* The outputs, or for a status that is not FXQ_OK nothing, or MemoryError. Takes the outputs over. */
static inline object finish(int status, object outputs) {
    if (status == FXQ_OK) return outputs;
    drop(outputs);
    return status == FXQ_NO_MEMORY ? no_memory() : nothing();
}

/* Ends a call: runs the kernel (Python's lock released) and returns the output as finish() does. kernel: an expression
 * of `threads` that gives a status. */
#define RUN(output, kernel)                 \
    do {                                    \
        const int threads = thread_count(); \
        int status;                         \
        if (has_failed()) {                 \
            drop(output);                   \
            return NULL;                    \
        }                                   \
        BEGIN_KERNEL                        \
        status = (kernel);                  \
        END_KERNEL                          \
        return finish(status, output);      \
    } while (0)

/* The same of a call with one output, which it makes: float32. kernel: an expression of `out`, the output's data, too.
 */
#define RETURN_OUTPUT(shape, dimensions, kernel)                                        \
    do {                                                                                \
        struct tensor made;                                                             \
        object output = has_failed() ? NULL : new_tensor((shape), (dimensions), &made); \
        if (output == NULL) return NULL;                                                \
        float *const out = made.data;                                                   \
        RUN(output, kernel);                                                            \
    } while (0)

CALL(linear);
CALL(transpose);
CALL(histogram);
CALL(matmul);
CALL(attention);
CALL(lstm);
CALL(rnn);
CALL(embedding);
CALL(embedding_bag);
CALL(static_linear);
CALL(static_convolution);
CALL(quantize);
CALL(dequantize);
CALL(lookup);
CALL(add_values);
CALL(mul_values);
CALL(mean_value);
CALL(pool_value);
CALL(adaptive_pool_value);
CALL(max_pool_value);
CALL(pad_value);
CALL(resize_value);
CALL(lookup_channels);

#endif
