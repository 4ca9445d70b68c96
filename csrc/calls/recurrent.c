/* The module's calls of recurrent layers: LSTM, GRU and plain RNN. */
#include <stdlib.h>
#include <string.h>

#include "calls/calls.h"

static bool read_item(object tensors, int64_t i, int64_t count, const float **data) {
    object tensor = item(tensors, i);
    return tensor && read_vector(tensor, count, data);
}

enum { WEIGHTS, SCALES, BIASES, HIDDEN_BIASES, FORMATS }; /* sequences of operands; hidden biases may be NULL */

static int64_t count_hidden_biases(object const *parts) {
    return parts[HIDDEN_BIASES] ? length_of(parts[HIDDEN_BIASES]) : 0;
}

/* Item i of the weights, in its format, with item i of the scales, whose shape tells a grouped one's group size. */
static bool read_matrix(object const *parts, int64_t i, int64_t rows, int64_t columns, struct fxq_weight *weight) {
    object matrix = item(parts[WEIGHTS], i), scale = length_of(parts[SCALES]) ? item(parts[SCALES], i) : NONE;
    object name = is_none(parts[FORMATS]) ? NULL : item(parts[FORMATS], i);
    if (!matrix || !scale || has_failed()) return false;
    const enum fxq_format format = name ? read_format(name) : FXQ_INT8;
    return read_weight(matrix, scale, columns, format, ANY_GROUP, weight) && weight->outputs == rows;
}

/* Fill in the weights of all cells of a call whose sizes are known; whether they all fit. */
static bool read_cells(object const *parts, const struct fxq_recurrent *call, int gates,
                       struct fxq_recurrent_weights *weights) {
    const int64_t cells = (int64_t)call->layers * call->directions, each = length_of(parts[WEIGHTS]) / cells;
    const bool has_bias = length_of(parts[BIASES]) > 0, has_own = count_hidden_biases(parts) > 0;
    const int64_t rows = gates * call->hidden;
    for (int64_t i = 0, at = 0; i < cells; i++, at += each) {
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
static bool are_complete(object const *parts, int64_t cells, bool is_projected) {
    const int64_t biases = length_of(parts[BIASES]), own = count_hidden_biases(parts);
    const int64_t weights = (int64_t)cells * (is_projected ? 3 : 2);
    const int64_t scales = length_of(parts[SCALES]);
    if (!is_none(parts[FORMATS]) && length_of(parts[FORMATS]) != weights) return false;
    return length_of(parts[WEIGHTS]) == weights && (scales == 0 || scales == weights) &&
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
static bool read_sequence(struct fxq_recurrent *call, object x, object batch_sizes, object h0, object c0,
                          struct tensor *state, struct tensor *cell_state, bool is_bidirectional) {
    struct tensor input, sizes;
    const bool is_packed = !is_none(batch_sizes);
    if (!read_dtype(x, FLOAT32, is_packed ? 2 : 3, &input) || !read_dtype(h0, FLOAT32, 3, state)) return false;
    *cell_state = *state;
    if (!is_none(c0) && !read_dtype(c0, FLOAT32, 3, cell_state)) return false;
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
    if (!read_dtype(batch_sizes, INT64, 1, &sizes) || !are_sizes_sound(&sizes, input.shape[0], call->batch))
        return false;
    call->steps = sizes.count;
    call->sizes = sizes.data;
    return true;
}

/* The outputs of a call as a tuple (output, h, or output, h, c), with the initial states copied where they advance. */
static object new_outputs(struct fxq_recurrent *call, object x, const struct tensor *h0, const struct tensor *c0) {
    struct tensor out, h, c;
    if (!read_tensor(x, &out)) return NULL;
    out.shape[out.dimensions - 1] = call->directions * call->outputs;
    const bool has_cells = call->mode == FXQ_LSTM;
    object made[3] = {new_tensor(out.shape, out.dimensions, &out), new_tensor(h0->shape, 3, &h),
                      has_cells ? new_tensor(c0->shape, 3, &c) : NULL};
    object outputs = new_tuple(made, has_cells ? 3 : 2);
    if (outputs == NULL) return NULL;
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
static object recurrent(struct fxq_recurrent call, int gates, object const *args, object c0, object const *parts,
                        object const *options) {
    struct tensor h, c;
    if (!may_run(args[0], args[1]) || !may_run(args[0], args[3]) || (!is_none(c0) && !may_run(args[0], c0)) ||
        !read_sequence(&call, args[1], args[2], args[3], c0, &h, &c, INTEGER(options[0]) != 0)) {
        return nothing();
    }
    const int64_t cells = h.shape[0];
    const bool is_projected = length_of(parts[WEIGHTS]) == 3 * cells;
    if (!are_complete(parts, cells, is_projected) || (!is_projected && call.hidden != call.outputs) ||
        !read_qmax(options[2], &call.qmax)) {
        return nothing();
    }
    call.per_token = INTEGER(options[1]) != 0;
    const int threads = thread_count();
    if (has_failed()) return NULL;
    struct fxq_recurrent_weights *weights = calloc((size_t)cells, sizeof *weights);
    if (weights == NULL) return no_memory();
    object outputs = read_cells(parts, &call, gates, weights) ? new_outputs(&call, args[1], &h, &c) : nothing();
    if (outputs && !is_none(outputs)) {
        call.cells = weights;
        int status;
        BEGIN_KERNEL
        status = fxq_recurrent(&call, threads);
        END_KERNEL
        outputs = finish(status, outputs);
    }
    free(weights);
    return outputs;
}

/* lstm(asks, x, batch_sizes, h0, c0, weights, scales, biases, bidirectional, per_token, qmax, formats) ->
 * (output, h, c)
 */
CALL(lstm) {
    if (count != 12) return nothing();
    object parts[] = {args[5], args[6], args[7], NULL, args[11]};
    return recurrent((struct fxq_recurrent){.mode = FXQ_LSTM}, 4, args, args[4], parts, args + 8);
}

/* rnn(asks, x, batch_sizes, h0, weights, scales, biases, hidden_biases, mode, bidirectional, per_token, qmax, formats)
 * -> (output, h) */
CALL(rnn) {
    static const char *const modes[] = {"gru", "rnn_tanh", "rnn_relu"}; /* in the order of enum fxq_mode */
    if (count != 13) return nothing();
    object parts[] = {args[4], args[5], args[6], args[7], args[12]};
    for (int i = 0; i < 3; i++) {
        if (is_text(args[8], modes[i])) {
            const struct fxq_recurrent call = {.mode = (enum fxq_mode)(FXQ_GRU + i)};
            return recurrent(call, i == 0 ? 3 : 1, args, NONE, parts, args + 9);
        }
    }
    return nothing();
}
