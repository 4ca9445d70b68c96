/* What the parts of the kernel library share. Pointers are raw, tensors are dense and row-major, no call keeps anything.
 *
 * Words: M rows of activations, K columns (the depth of a product), N outputs. A product is
 *   y[m][n] = float(sum_k (q[m][k] - zero_point[m]) * weight[n][k]) * (row_scale[m] * scale[n])
 * with every float operation single and in this order: fxquant/ops/ has the specification, to the bit. So
 * this code is compiled with -ffp-contract=off and uses no fused multiply-add, but for products of floats: see floats-inl.h. */
#ifndef FXQUANT_H
#define FXQUANT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/pool.h"

#define FXQ_DEPTH 64 /* activations are padded with zeros to whole steps of 64 columns */
#define FXQ_PACKED_BYTES (256 << 10) /* of a weight that a thread packs at a time: see packed-inl.h */

/* Rows of floats, each of them dense, that may lie anywhere, one over another too: those of a tensor of `dimensions` and
 * one dimension more. There are as few dimensions as the strides allow: 1 where rows lie evenly. */
enum { FXQ_DIMENSIONS = 8 };
struct fxq_rows {
    const float *data;
    int dimensions;
    int64_t sizes[FXQ_DIMENSIONS], strides[FXQ_DIMENSIONS];
};
static inline const float *fxq_find_row(const struct fxq_rows *rows, int64_t row) {
    const float *found = rows->data;
    for (int i = rows->dimensions - 1; i > 0; i--) {
        found += row % rows->sizes[i] * rows->strides[i];
        row /= rows->sizes[i];
    }
    return found + row * rows->strides[0];
}

/* How the values of one row of activations were quantized. */
struct fxq_row {
    float scale, inverse;
    int32_t zero_point;
    int32_t zero_pair; /* -zero_point and -128 * zero_point as two int16: see correct() in common-inl.h */
};

/* Least and greatest value of something, 0 included; is_nan if a NaN was among them. */
struct fxq_range {
    float low, high;
    bool is_nan;
};

/* What activations become, by the weight: uint8 for int8 and 4 bits, laid out as the instruction set's matmul wants them;
 * -32767 … 32767 without a zero point for int16, as int16-inl.h says; themselves for floats, as floats-inl.h says. */
enum fxq_kind { FXQ_KIND_UINT8, FXQ_KIND_INT16, FXQ_KIND_FLOAT };

/* Quantized activations. */
struct fxq_activations {
    int64_t rows, columns, depth; /* depth: columns rounded up to FXQ_DEPTH */
    int qmax;
    bool per_row; /* false: row[] was filled from one range for all rows */
    bool is_row_major; /* packed row by row, `depth` bytes each: for packed weights */
    enum fxq_kind kind;
    struct fxq_row *row;
    void *packed; /* fxq_activation_bytes() */
};

/* One quantized product, shared by the threads that each compute some outputs of it. */
struct fxq_matmul {
    const struct fxq_activations *x;
    const int8_t *weight; /* (outputs, x->columns) */
    const int16_t *int16; /* instead of weight, by x->kind; */
    const uint16_t *halves; /* or these, */
    const float *floats;    /* or these */
    int64_t outputs;
    const float *scale; /* (outputs,); floats have none */
    const float *bias;  /* (outputs,) or NULL */
    const int32_t *sums; /* sums of the weight's rows, or NULL: computed on the way */
    bool relu;
};

/* Where a thread's outputs [n0, n1) go: out[m * out_stride + n - n0], after adding addend[m * addend_stride + n - n0]. */
struct fxq_target {
    float *out;
    int64_t out_stride;
    const float *addend; /* or NULL */
    int64_t addend_stride;
};

/* One step of an LSTM by a thread, of units [u0, u1), with what pack_lstm made. u0 % 16 == 0. */
struct fxq_lstm_step {
    const struct fxq_activations *h; /* the last step's outputs, is_row_major */
    const void *packed;              /* of all units */
    const int32_t *pairs;
    const float *scale; /* (4 * hidden,), or what pack_lstm_int4 made */
    int64_t group, groups; /* of 4 bits */
    int64_t hidden, u0, u1;
    const float *input_part; /* (rows, 4 * hidden), input_stride apart */
    int64_t input_stride;
    float *c, *out; /* (rows, hidden); out: rows out_stride apart */
    int64_t out_stride;
};

/* A quantized embedding table: real = (value - zero_point) * scale, or the value itself where it is float16. */
struct fxq_table {
    const void *values; /* (rows, columns) int8 or uint8 or float16; 4 bits: (rows, (columns + 1) / 2), low nibble first */
    int64_t rows, columns;
    int bits; /* 4, 8 or 16 */
    bool is_signed;
    const float *scale, *zero_point; /* (rows,); zero_point may be NULL, of float16 both are */
};

/* y = x W^T + bias with 4-bit weights: a product a group of columns, each with scales of its own, added up in their order.
 * Column k of row n is the nibble k % 2 (low first) of byte k / 2, less 8; scales are bfloat16. */
struct fxq_linear_int4 {
    const uint8_t *nibbles; /* (outputs, (columns + 1) / 2) */
    const uint16_t *scale;  /* (outputs, groups) */
    int64_t group, groups;  /* columns a group: 32, 64 or 128; how many */
};

/* Activations for products with 4-bit weights: see int4.c. Few rows may have a form that nibbles are multiplied with as they
 * lie: (rows, fxq_nibble_depth(columns)) int8 and `less`; more a form for all groups in one pass; else each group of columns
 * is quantized for a product of its own. */
struct fxq_grouped {
    struct fxq_activations x; /* packed: fxq_grouped_bytes() */
    int64_t group, groups; /* 0: not grouped, for int8 weights */
    enum fxq_int4_form { FXQ_NIBBLES_FORM, FXQ_GROUPS_FORM, FXQ_SEPARATE_FORM } form;
    int64_t group_bytes; /* separate: from a group's activations to the next one's */
    int32_t *less;       /* nibbles: (rows, groups), 8 * sum(q - zero_point) */
};

/* One product with 4-bit weights, shared by the threads that each compute some outputs of it. */
struct fxq_int4_product {
    const struct fxq_grouped *x;
    const struct fxq_linear_int4 *weight;
    int64_t outputs;
    const float *bias; /* (outputs,) or NULL; with an addend NULL */
    bool relu;
    const int8_t *values; /* what fxq_unpack_groups made, or NULL: unpacked on the way */
    const float *scale;
    int64_t chunk; /* outputs unpacked at a time, in fxq_int4_scratch_bytes(): fxq_int4_chunk() */
};

/* A part of a product of two activations: (rows, depth) a by (depth, columns) b, of at most FXQ_PANEL columns. b's rows are
 * dense, and readable, whatever is there, up to a whole number of sixteen columns. */
enum { FXQ_PANEL = 64 };
struct fxq_tiles {
    const float *a, *b;
    int64_t a_row, a_column, b_row; /* strides */
    int64_t rows, depth, columns;
    float *out;
    int64_t out_row;
};

/* A row of attention's scores, which become exp(scale score + mask - their greatest), and 0 in [count, padded). */
struct fxq_scores {
    float *values;
    int64_t count, padded;
    float scale;
    const float *mask; /* or NULL; mask_stride apart */
    int64_t mask_stride;
};

/* What an instruction set provides. */
struct fxq_kernels {
    const char *name;
    int value_bytes; /* of a packed activation: 1 for uint8, 2 for int16 that the zero point is already taken from */
    void (*begin)(void), (*end)(void); /* around a thread's work; may be NULL */
    void (*measure)(const float *x, int64_t count, struct fxq_range *range); /* widens *range */
    /* Quantize rows [first, first + count) of x, found at rows[0..count). first % 16 == 0, count <= 16. */
    void (*quantize)(const struct fxq_activations *x, int64_t first, int count, const float *const *rows);
    void (*row_sums)(const int8_t *weight, int64_t outputs, int64_t columns, int64_t n0, int64_t n1, int32_t *sums,
                     void *scratch); /* NULL where value_bytes is 2 */
    /* Whether a product of these sizes repays a packed copy of the weights: then x must be row by row. NULL: never. */
    bool (*packs_weight)(int64_t rows, int64_t columns, int64_t outputs);
    void (*matmul)(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch);
    /* The same with int16 weights and activations, without packing or scratch. */
    void (*quantize_int16)(const struct fxq_activations *x, int64_t first, int count, const float *const *rows);
    void (*matmul_int16)(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to);
    void (*matmul_floats)(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch);
    /* Products of two activations, and a softmax between two of them: products-inl.h. */
    void (*multiply_tiles)(const struct fxq_tiles *tiles);
    float (*softmax_row)(const struct fxq_scores *row);
    /* gates: 4 runs of `units` floats, gate_stride apart; h may be any buffer of `units`. */
    void (*lstm_cell)(const float *gates, int64_t gate_stride, int64_t units, float *c, float *h);
    /* gates: r, z and the hidden part of n; x_n: the input's part of n; before: the last h. */
    void (*gru_cell)(const float *gates, int64_t gate_stride, int64_t units, const float *x_n, const float *before,
                     float *h);
    void (*rnn_cell)(const float *gates, int64_t units, bool is_relu, float *h);
    /* For sequences: weight (4 * hidden, columns) packed once, then whole steps. NULL: matmul and lstm_cell do it.
     * packed: 4 * hidden rows of fxq_depth(columns) bytes, pairs: 4 * hidden, with hidden rounded up to 16. */
    void (*pack_lstm)(const int8_t *weight, int64_t hidden, int64_t columns, int64_t u0, int64_t u1, void *packed,
                      int32_t *pairs);
    void (*lstm_step)(const struct fxq_lstm_step *step);
    /* The same of 4 bits. pairs and scale: so many for each group. scratch: fxq_matmul_scratch_bytes(columns) */
    void (*pack_lstm_int4)(const struct fxq_linear_int4 *weight, int64_t hidden, int64_t columns, int64_t u0, int64_t u1,
                           void *packed, int32_t *pairs, float *scale, void *scratch);
    void (*lstm_step_int4)(const struct fxq_lstm_step *step);
    /* 4-bit weights: rows of nibbles, `stride` bytes apart, less 8. values: (rows, columns) */
    void (*unpack)(const uint8_t *nibbles, int64_t stride, int64_t rows, int64_t columns, int8_t *values);
    int64_t most_nibble_rows; /* so many rows go through the next two; 0: none */
    void (*quantize_nibbles)(const struct fxq_grouped *x, int64_t first, int count, const float *const *rows);
    void (*matmul_nibbles)(const struct fxq_int4_product *job, int64_t n0, int64_t n1, const struct fxq_target *to);
    /* More rows, all groups in one pass; scratch: fxq_int4_scratch_bytes. NULL: a product a group. */
    void (*quantize_groups)(const struct fxq_grouped *x, int64_t first, int count, const float *const *rows);
    void (*matmul_groups)(const struct fxq_int4_product *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch);
    void (*put_row)(const struct fxq_table *table, int64_t row, float *out);
    /* out += the rows, one after another, each times its weight; weights NULL: all 1 */
    void (*add_rows)(const struct fxq_table *table, const int64_t *rows, const float *weights, int64_t count, float *out);
    void (*take_greater)(float *out, const float *x, int64_t count); /* out[i] = the greater of the two */
};

extern const struct fxq_kernels *fxq_active; /* set by fxq_select_isa */

/* cpu.c: why the named instruction set cannot be used ("" if it can), and its kernels. */
int fxq_isa_count(void);
const char *fxq_isa_name(int index); /* best first */
const char *fxq_isa_obstacle(int index);
bool fxq_select_isa(int index); /* -1: the best one */

/* scratch.c: this thread's reusable memory, at least `bytes`, aligned to 64, or NULL. One block: a later call moves it. */
void *fxq_scratch(int64_t bytes);
void fxq_trim_scratch(void); /* gives back an unusually large block */

/* activations.c */
int64_t fxq_depth(int64_t columns);
int64_t fxq_nibble_depth(int64_t columns); /* whole steps of 128 columns */
int64_t fxq_activation_bytes(enum fxq_kind kind, int64_t rows, int64_t columns);
int64_t fxq_matmul_scratch_bytes(int64_t columns); /* one thread's scratch in a product and in row_sums */
void fxq_set_row(struct fxq_row *row, const struct fxq_range *range, int qmax);
void fxq_set_int16_row(struct fxq_row *row, const struct fxq_range *range);
/* fxq_kernels.quantize and matmul, of each kind. */
void fxq_quantize(const struct fxq_activations *x, int64_t first, int count, const float *const *rows);
void fxq_multiply(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch);
void fxq_quantize_rows(const struct fxq_activations *x, const struct fxq_rows *source, int64_t first, int64_t last);

/* int4.c */
int64_t fxq_grouped_bytes(int64_t rows, int64_t columns, int64_t group); /* enough for fewer rows or larger groups too */
/* Choose the form of x->x.rows rows for weights of such groups. Then quantize as fxq_kernels.quantize does, and multiply. */
void fxq_begin_grouped(struct fxq_grouped *x, int64_t group);
void fxq_quantize_grouped(const struct fxq_grouped *x, int64_t first, int count, const float *const *rows);
int64_t fxq_int4_chunk(int64_t rows);
int64_t fxq_int4_scratch_bytes(int64_t chunk, int64_t columns);
void fxq_multiply_int4(const struct fxq_int4_product *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch);
/* Rows [n0, n1) to int8, a group's (outputs, its width) after another's, and to (groups, outputs) scales. */
void fxq_unpack_groups(const struct fxq_linear_int4 *weight, int64_t outputs, int64_t columns, int64_t n0, int64_t n1,
                       int8_t *values, float *scale);

/* The operators. They return 0, FXQ_NO_MEMORY or FXQ_BAD_INDEX. */
enum { FXQ_OK = 0, FXQ_NO_MEMORY = -1, FXQ_BAD_INDEX = -2, FXQ_BAD_OFFSETS = -3 };

struct fxq_linear {
    struct fxq_rows x;
    int64_t rows, columns;
    enum fxq_kind kind;
    const void *weight; /* int8, int16 or float16, by the kind; NULL with int4, and its scale too */
    int64_t outputs;
    const float *scale, *bias;
    float *out;
    bool relu, per_row;
    int qmax;
    struct fxq_linear_int4 int4;
};
int fxq_linear(const struct fxq_linear *call, int threads);
int fxq_linear_int4(const struct fxq_linear *call, int threads);

/* transpose.c: (matrices, rows, columns) to (matrices, columns, rows) */
void fxq_transpose(const float *x, int64_t matrices, int64_t rows, int64_t columns, float *out, int threads);

/* panels.c: how many floats columns take in whole panels, and `columns` columns of a matrix (depth, columns) of any strides
 * as panels, one after another: (depth, FXQ_PANEL) each, the last one (depth, a whole number of sixteen). */
int64_t fxq_panel_columns(int64_t columns);
void fxq_pack_panels(const float *b, int64_t row, int64_t column, int64_t depth, int64_t columns, float *panels);

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
    struct fxq_batches batches; /* (batch, heads) of q, k, v and the mask */
    struct fxq_operand q, k, v, mask; /* (rows, depth), (keys, depth), (keys, outputs), (rows, keys) */
    int64_t rows, keys, depth, outputs;
    float scale;
    bool is_causal; /* query i sees keys 0 to i */
    float *out;
};
int fxq_attention(const struct fxq_attention *call, int threads);

/* Where the index-th of `parts` shares of `count` things begins, in whole units. */
static inline int64_t fxq_share(int64_t count, int64_t unit, int64_t index, int64_t parts) {
    const int64_t units = (count + unit - 1) / unit, at = units * index / parts * unit;
    return at < count ? at : count;
}
/* linear.c: the ranges of a call's rows, by rows [first, last), and then one for all of them. */
void fxq_measure_rows(const struct fxq_linear *call, int64_t first, int64_t last, struct fxq_range *range);
void fxq_set_rows(const struct fxq_linear *call, struct fxq_row *row, int64_t first, int64_t last,
                  const struct fxq_range *ranges, int64_t count);
struct fxq_range fxq_join_ranges(const struct fxq_range *ranges, int64_t count);

/* G gates a hidden unit, rows of the weights by gate: LSTM i f g o, GRU r z n, plain RNN one. */
enum fxq_mode { FXQ_LSTM, FXQ_GRU, FXQ_RNN_TANH, FXQ_RNN_RELU };
/* int8 `values` or `int16` with a scale a row, or 4 bits, or `halves` or `floats` without one; or none. */
struct fxq_matrix {
    const int8_t *values;
    const int16_t *int16;
    const uint16_t *halves;
    const float *floats;
    const float *scale;
    struct fxq_linear_int4 int4; /* nibbles: NULL where it is not 4 bits */
};
struct fxq_recurrent_weights {
    struct fxq_matrix ih, hh, hr; /* (G * H, I), (G * H, P), an LSTM's projection (P, H) or none */
    const float *bias;        /* (G * H,) or NULL */
    const float *hidden_bias; /* a GRU's b_hn, (H,), or NULL */
};
struct fxq_recurrent {
    enum fxq_mode mode;
    const float *x; /* (rows, inputs), steps one after another */
    int64_t steps, batch, inputs, hidden, outputs; /* outputs: P, which is H without a projection */
    const int64_t *sizes; /* (steps,) rows a step, or NULL: batch in each */
    int layers, directions;
    const struct fxq_recurrent_weights *cells; /* layers * directions */
    const float *h0;                           /* (cells, batch, outputs) */
    float *h, *c;                              /* h: written; an LSTM's c: (cells, batch, hidden), advanced in place */
    float *out;                                /* (rows, directions * outputs) */
    bool per_row;
    int qmax;
};
int fxq_recurrent(const struct fxq_recurrent *call, int threads);

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

#endif
