/* The kernel library's operators, and what is passed to them. Pointers are raw, tensors are dense and row-major, no
 * call keeps anything.
 *
 * Words: M tokens (rows of activations), K columns (the depth of a product), N outputs. A product is
 *   y[m][n] = float(sum_k (q[m][k] - zero_point[m]) * weight[n][k]) * (row_scale[m] * scale[n])
 * with every float operation single and in this order: fxquant/ops/ has the specification, to the bit. So
 * this code is compiled with -ffp-contract=off and uses no fused multiply-add, but for products of floats: see
 * floats-inl.h. */
#ifndef FXQUANT_H
#define FXQUANT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#pragma GCC visibility push(default) /* the doors to the operators may be libraries of their own */

/* How a matrix's values are stored. Of less than 8 bits: in rows of whole blocks. 4 bits: two values a byte, the low
 * nibble first; INT4 holds a value plus 8. INT3 holds a value plus 4, two of them a pair of 6 bits, the low half first;
 * byte i of a block, 0 to 2, has pair i + 1 in its upper bits, and in the lowest two bits 2 i and 2 i + 1 of pair 0. */
enum fxq_format {
    FXQ_NONE,
    FXQ_INT8,
    FXQ_INT16,
    FXQ_INT4,
    FXQ_INT3,
    FXQ_FLOAT16,
    FXQ_FLOAT32,
    FXQ_UINT8, /* this one and the next in tables only */
    FXQ_UINT4,
    FXQ_FORMATS
};

/* What activations become for a weight's products: uint8 with a zero point a token; -32767 … 32767 without one, in the
 * form FXQ_LOW_HIGH; or themselves. */
enum fxq_activation { FXQ_TO_UINT8, FXQ_TO_INT16, FXQ_TO_FLOAT };

/* What a format is: activations.c. */
struct fxq_format_entry {
    int block_values, block_bytes; /* so many values of a row are stored in so many bytes */
    bool is_grouped;               /* a scale for each group of a row's columns, not for the row */
    enum fxq_activation takes;
};
extern const struct fxq_format_entry fxq_formats[FXQ_FORMATS];

static inline int64_t fxq_row_bytes(enum fxq_format format, int64_t columns) {
    const struct fxq_format_entry *entry = &fxq_formats[format];
    return (columns + entry->block_values - 1) / entry->block_values * entry->block_bytes;
}

enum { FXQ_LEAST_GROUP = 32, FXQ_MOST_GROUP = 128 }; /* columns that share a scale, or 64 */

/* A matrix of weights: (outputs, columns). */
struct fxq_weight {
    enum fxq_format format;
    const void *data;
    const void *scale;     /* float32 (outputs,); grouped: bfloat16 (outputs, groups); of floats NULL */
    int64_t group, groups; /* grouped: columns a group, and how many groups; else 0 */
    int64_t outputs, columns;
};

/* The operators return one of these. */
enum { FXQ_OK = 0, FXQ_NO_MEMORY = -1, FXQ_BAD_INDEX = -2, FXQ_BAD_OFFSETS = -3 };

/* Rows of floats, each of them dense, that may lie anywhere, one over another too: those of a tensor of `dimensions`
 * and one dimension more. There are as few dimensions as the strides allow: 1 where rows lie evenly. */
enum { FXQ_DIMENSIONS = 8 };
struct fxq_rows {
    const float *data;
    int dimensions;
    int64_t sizes[FXQ_DIMENSIONS], strides[FXQ_DIMENSIONS];
};

/* linear.c: y = x W^T + bias */
struct fxq_linear {
    struct fxq_rows x;
    int64_t rows;
    struct fxq_weight weight;
    const float *bias; /* (outputs,) or NULL */
    float *out;
    bool relu, per_token; /* per_token: a scale a token, not one for all of x */
    int qmax;
};
int fxq_linear(const struct fxq_linear *call, int threads);

/* histogram.c: how many x[i] * inverse + offset have each whole part from 0 to 2047; others are not counted. count: at
 * most 2^24, so that float32 holds each number. */
enum { FXQ_HISTOGRAM_BINS = 2048 };
void fxq_histogram(const float *x, int64_t count, float inverse, float offset, float *out);

/* transpose.c: (matrices, rows, columns) to (matrices, columns, rows) */
void fxq_transpose(const float *x, int64_t matrices, int64_t rows, int64_t columns, float *out, int threads);

/* Two activations and an output with common dimensions before the last two; strides may be 0. */
struct fxq_batches {
    int dimensions;
    int64_t count, sizes[FXQ_DIMENSIONS], strides[4][FXQ_DIMENSIONS]; /* of the operands in their order */
};
static inline int64_t fxq_batch_offset(const struct fxq_batches *batches, int operand, int64_t batch) {
    int64_t offset = 0;
    for (int i = batches->dimensions - 1; i >= 0; batch /= batches->sizes[i--]) {
        offset += batch % batches->sizes[i] * batches->strides[operand][i];
    }
    return offset;
}

/* matmul.c: out (batches, rows, columns) = a (rows, depth) b (depth, columns) of each batch */
struct fxq_product {
    struct fxq_batches batches; /* of a and b */
    const float *a, *b;
    int64_t a_row, a_column, b_row, b_column; /* strides */
    int64_t rows, depth, columns;
    float *out;
};
int fxq_product(const struct fxq_product *call, int threads);

/* attention.c: out (batch, rows, heads, outputs) = softmax(scale q k^T + mask) v */
struct fxq_operand {
    const float *data; /* a mask's may be NULL */
    int64_t row, column;
};
struct fxq_attention {
    struct fxq_batches batches;       /* (batch, heads) of q, k, v and the mask */
    struct fxq_operand q, k, v, mask; /* (rows, depth), (keys, depth), (keys, outputs), (rows, keys) */
    int64_t rows, keys, depth, outputs;
    float scale;
    bool is_causal; /* query i sees keys 0 to i */
    float *out;
};
int fxq_attention(const struct fxq_attention *call, int threads);

/* recurrent.c. G gates a hidden unit, rows of the weights by gate: LSTM i f g o, GRU r z n, plain RNN one. */
enum fxq_mode { FXQ_LSTM, FXQ_GRU, FXQ_RNN_TANH, FXQ_RNN_RELU };
struct fxq_recurrent_weights {
    struct fxq_weight ih, hh, hr; /* (G * H, I), (G * H, P), an LSTM's projection (P, H) or FXQ_NONE */
    const float *bias;            /* (G * H,) or NULL */
    const float *hidden_bias;     /* a GRU's b_hn, (H,), or NULL */
};
struct fxq_recurrent {
    enum fxq_mode mode;
    const float *x;                                /* (rows, inputs), steps one after another */
    int64_t steps, batch, inputs, hidden, outputs; /* outputs: P, which is H without a projection */
    const int64_t *sizes;                          /* (steps,) rows a step, or NULL: batch in each */
    int layers, directions;
    const struct fxq_recurrent_weights *cells; /* layers * directions */
    const float *h0;                           /* (cells, batch, outputs) */
    float *h, *c;                              /* h: written; an LSTM's c: (cells, batch, hidden), advanced in place */
    float *out;                                /* (rows, directions * outputs) */
    bool per_token;
    int qmax;
};
int fxq_recurrent(const struct fxq_recurrent *call, int threads);

/* An embedding table: real = (value - zero_point) * scale, or the value itself where it is float16. */
struct fxq_table {
    enum fxq_format format; /* INT8, UINT8, UINT4 or FLOAT16 */
    const void *values;
    int64_t rows, columns;
    const float *scale, *zero_point; /* (rows,); zero_point may be NULL, of float16 both are */
};
struct fxq_indices {
    const void *values;
    int64_t count;
    bool is_wide; /* int64, not int32 */
};
int fxq_embedding(const struct fxq_table *table, const struct fxq_indices *indices, float *out, int threads);

enum { FXQ_SUM = 0, FXQ_MEAN = 1, FXQ_MAX = 2 };
struct fxq_bags {
    const int64_t *offsets; /* (count,), with has_end (count + 1,); NULL: bags of `width` indices each */
    int64_t count, width;
    bool has_end;
    int mode;
    const float *weights; /* like the indices, or NULL */
    int64_t padding;      /* index to leave out, or -1 */
};
int fxq_embedding_bag(const struct fxq_table *table, const struct fxq_indices *indices, const struct fxq_bags *bags,
                      float *out, int threads);

/* cpu.c: why the named instruction set cannot be used ("" if it can), and the choice of one. */
int fxq_isa_count(void);
const char *fxq_isa_name(int index); /* best first */
const char *fxq_isa_obstacle(int index);
bool fxq_select_isa(int index); /* -1: the best one */

/* Makes the library ready, where that has not been done: true then. Every door calls it. */
bool fxq_begin(void);
extern bool fxq_is_registered; /* whether torch knows the operators in this process */

#pragma GCC visibility pop

#endif
