/* What the two files of the recurrent layers share: recurrent_cell.c runs one cell through time, recurrent.c a stack.
 *
 * A cell (one direction of one layer) takes its input in chunks of steps: quantize the chunk's rows, multiply them with
 * weight_ih all at once, then step through time. Hidden units are shared out, with their gates and states: a round of
 * the threads' team for each step, in which every thread keeps to its own units as long as all of them come along. A
 * share needs the others' units only as the quantized h of the step before, which each thread makes for itself from the
 * output rows: they are never written twice, so one round a step is enough. */
#ifndef FXQUANT_RECURRENT_H
#define FXQUANT_RECURRENT_H

#include "kernels.h"
#include "runtime/pool.h"

/* A call's shared memory. */
struct stack {
    const struct fxq_recurrent *call;
    int64_t gates; /* G: rows of the weights for each hidden unit */
    int64_t rows, chunk_rows;
    const int64_t *starts;                                                    /* (steps + 1,) first row of each step */
    int64_t x_bytes, h_bytes, raw_bytes, scratch_bytes, hh_groups, hr_groups; /* the most of any cell */
    struct fxq_activations x;                                                 /* of a chunk */
    struct fxq_range *ranges;                                                 /* a share */
    float *input_part;    /* (chunk_rows, input_stride >= G * H): the input's part of the gates, with the bias */
    int64_t input_stride; /* 16 more: rows a power of two apart would share few sets of the L1 cache */
    float *layer[2];      /* outputs of the layers between */
    float *hidden;        /* (batch, H), before a projection */
    int32_t *hh_sums, *hr_sums;
    bool
        packs; /* an LSTM's weight_hh is packed for its steps: see packs(); then that writes hh_sums and packed_scale */
    void *packed;
    float *packed_scale; /* of grouped weights */
    struct fxq_unpacked hh_unpacked, hr_unpacked;
    char *own; /* each thread's memory */
    int64_t own_bytes;
};

/* Rows of a cell's input whose part of the gates is made at once. */
struct chunk {
    int64_t first_row, rows;
};

/* The rows of the step before: in a packed batch some come from its outputs, and those that begin now from h0. */
struct previous {
    const float *outputs, *h0;
    int64_t outputs_stride, h0_stride, known;
};

struct step {
    int64_t index, live; /* rows that take part */
    struct previous previous;
    bool has_state, has_raw; /* whether this thread has quantized what it multiplies */
    const float *input_part; /* of its rows */
    float *hidden, *out;     /* where hidden rows go, which are the outputs where there is no projection */
    int64_t hidden_stride;
};

/* One cell, as one thread sees it. */
struct cell {
    struct stack *stack;
    const struct fxq_recurrent_weights *weights;
    const float *input, *h0;
    int64_t inputs;
    float *out, *c, *last; /* out: (rows, out_stride), its first column this direction's; last: (batch, outputs) */
    int64_t out_stride;
    bool is_backward;
    struct fxq_team *team;
    int64_t shares; /* of the hidden units and of whatever else is shared out */
    struct chunk chunk;
    struct step step;
    struct fxq_range range;     /* of all input tokens, where they have one scale */
    struct fxq_activations x;   /* the chunk's rows */
    struct fxq_activations h;   /* the last step's outputs */
    struct fxq_activations raw; /* hidden before the projection */
    int64_t units;              /* hidden units at a time */
    float *pre;                 /* (batch, G, units) gates before their nonlinearities */
    void *scratch;
};

/* Where a share of `count` things begins: shares are whole blocks of 16. */
static inline int64_t share(int64_t count, int64_t index, int64_t parts) { return fxq_share(count, 16, index, parts); }

/* Whether each step takes the weight packed: others than int8 and grouped ones are multiplied as they lie. */
static inline bool packs(const struct stack *s, const struct fxq_weight *hh) {
    return s->packs && fxq_formats[hh->format].takes == FXQ_TO_UINT8;
}

static inline int64_t live_rows(const struct stack *s, int64_t step) { return s->starts[step + 1] - s->starts[step]; }

void fxq_run_cell(struct cell *cell);

#endif
