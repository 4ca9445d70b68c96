/* What an instruction set provides (struct fxq_kernels), what its kernels are given, and what ops/ makes of them. */
#ifndef FXQUANT_KERNELS_H
#define FXQUANT_KERNELS_H

#include "fxquant.h"
#include "static.h"

#define FXQ_DEPTH 64                 /* activations are padded with zeros to whole steps of 64 columns */
#define FXQ_PACKED_BYTES (256 << 10) /* of a weight that a thread packs at a time: see amx_packed-inl.h */

/* How the values of one token were quantized. */
struct fxq_row {
    float scale, inverse;
    int32_t zero_point;
    int32_t zero_pair; /* -zero_point and -128 * zero_point as two 16-bit numbers: see correct() in common-inl.h */
};

/* Least and greatest value of something, 0 included; is_nan if a NaN was among them. */
struct fxq_range {
    float low, high;
    bool is_nan;
};

/* How activations lie, by the weight's format and the number of tokens. Those for grouped weights: see groups.c. */
enum fxq_form {
    FXQ_BYTES,          /* as the instruction set's matmul wants them */
    FXQ_LOW_HIGH,       /* as low_high-inl.h says */
    FXQ_FLOATS,         /* as floats-inl.h says */
    FXQ_NIBBLE_GEMV,    /* few rows, for weights as they lie: (rows, fxq_nibble_depth(columns)) int8, and `less` */
    FXQ_GROUPS,         /* more rows, for all groups in one pass */
    FXQ_SEPARATE_GROUPS /* a group's activations after another's, each as FXQ_BYTES */
};

/* The forms of a product with int8 weights: docs/kernels.md. */
enum fxq_method { FXQ_GEMV, FXQ_TILED, FXQ_PACKED, FXQ_METHODS };

/* Which form is the fastest, by the number of rows: the gemv for at most so many; a packed copy of the weight from so
 * many on, where the outputs stay in the caches and where they are streamed. 0: never. benchmarks/thresholds.py finds
 * them. */
struct fxq_thresholds {
    int64_t most_gemv, least_packed, least_streamed;
};

/* Quantized activations. */
struct fxq_activations {
    int64_t rows, columns, depth; /* depth: columns rounded up to FXQ_DEPTH */
    int qmax;
    bool per_token;    /* false: row[] was filled from one range for all tokens */
    bool is_row_major; /* bytes packed row by row, `depth` each: for packed weights */
    enum fxq_form form;
    struct fxq_row *row;
    void *packed;          /* fxq_activation_bytes() */
    int64_t group, groups; /* of the weight */
    int64_t group_bytes;   /* separate: from a group's activations to the next one's */
    int32_t *less;         /* nibbles: (rows, groups), sum(q - zero_point) */
};

/* A grouped weight as int8: a group's (outputs, its width) after another's, and its scales, (groups, outputs). */
struct fxq_unpacked {
    int8_t *values; /* NULL: unpacked on the way */
    float *scale;
};

/* One product, shared by the threads that each compute some outputs of it. */
struct fxq_matmul {
    const struct fxq_activations *x;
    const struct fxq_weight *weight;
    const float *bias;                   /* (outputs,) or NULL; of a grouped weight NULL where there is an addend */
    const int32_t *sums;                 /* sums of an int8 weight's rows, or NULL: computed on the way */
    const struct fxq_unpacked *unpacked; /* of a grouped weight, or NULL */
    bool relu;
};

/* Where a thread's outputs [n0, n1) go: out[m * out_stride + n - n0], after adding addend[m * addend_stride + n - n0].
 */
struct fxq_target {
    float *out;
    int64_t out_stride;
    const float *addend; /* or NULL */
    int64_t addend_stride;
};

/* Targets of the same rows from another row and output on. */
static inline struct fxq_target fxq_target_at(const struct fxq_target *to, int64_t m, int64_t n) {
    const float *addend = to->addend ? to->addend + m * to->addend_stride + n : NULL;
    return (struct fxq_target){to->out + m * to->out_stride + n, to->out_stride, addend, to->addend_stride};
}

/* One step of an LSTM by a thread, of units [u0, u1), with what pack_lstm made. u0 % 16 == 0. */
struct fxq_lstm_step {
    const struct fxq_activations *h; /* the last step's outputs, is_row_major */
    const struct fxq_weight *weight; /* (4 * hidden, columns) */
    const void *packed;              /* of all units */
    const int32_t *pairs;
    const float *scale; /* of a grouped weight */
    int64_t hidden, u0, u1;
    const float *input_part; /* (rows, 4 * hidden), input_stride apart */
    int64_t input_stride;
    float *c, *out; /* (rows, hidden); out: rows out_stride apart */
    int64_t out_stride;
};

/* A part of a product of two activations: (rows, depth) a by (depth, columns) b, of at most FXQ_PANEL columns. b's rows
 * are dense, and readable, whatever is there, up to a whole number of sixteen columns. */
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

/* What an instruction set provides. n0, n1: the outputs to compute. scratch: fxq_product_scratch_bytes() of the weight.
 */
struct fxq_kernels {
    const char *name;
    int value_bytes; /* of a packed activation: 1 for uint8; 2 where the zero point is subtracted already */
    struct fxq_thresholds thresholds;
    void (*begin)(void), (*end)(void);                                       /* around a thread's work; may be NULL */
    void (*measure)(const float *x, int64_t count, struct fxq_range *range); /* widens *range */

    /* int8. Quantize rows [first, first + count) of x, found at rows[0..count). first % 16 == 0, count <= 16. */
    void (*quantize)(const struct fxq_activations *x, int64_t first, int count, const float *const *rows);
    /* NULL where value_bytes is 2: no sums are needed then, pack_lstm's pairs neither */
    void (*row_sums)(const struct fxq_weight *weight, int64_t n0, int64_t n1, int32_t *sums, void *scratch);
    /* Whether a product of these sizes repays a packed copy of the weights: then x must be row by row. NULL: never. */
    bool (*packs_weight)(int64_t rows, int64_t columns, int64_t outputs);
    void (*matmul)(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch);

    /* FXQ_LOW_HIGH, without packing or scratch; and floats. */
    void (*quantize_int16)(const struct fxq_activations *x, int64_t first, int count, const float *const *rows);
    void (*matmul_int16)(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to);
    void (*matmul_floats)(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                          void *scratch);

    /* Grouped weights. Rows [n, n + count) of columns [k, k + columns) to int8, (count, columns). */
    void (*unpack)(const struct fxq_weight *weight, int64_t n, int64_t count, int64_t k, int64_t columns,
                   int8_t *values);
    int64_t most_nibble_rows; /* so many rows go through the next two; 0: none */
    void (*quantize_nibbles)(const struct fxq_activations *x, int64_t first, int count, const float *const *rows);
    void (*matmul_nibbles)(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to);
    /* More rows, all groups in one pass. NULL: a product a group. */
    void (*quantize_groups)(const struct fxq_activations *x, int64_t first, int count, const float *const *rows);
    void (*matmul_groups)(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                          void *scratch);

    /* Products of two activations, and a softmax between two of them: products-inl.h. */
    void (*multiply_tiles)(const struct fxq_tiles *tiles);
    float (*softmax_row)(const struct fxq_scores *row);

    /* gates: 4 runs of `units` floats, gate_stride apart; h may be any buffer of `units`. */
    void (*lstm_cell)(const float *gates, int64_t gate_stride, int64_t units, float *c, float *h);
    /* gates: r, z and the hidden part of n; x_n: the input's part of n; before: the last h. */
    void (*gru_cell)(const float *gates, int64_t gate_stride, int64_t units, const float *x_n, const float *before,
                     float *h);
    void (*rnn_cell)(const float *gates, int64_t units, bool is_relu, float *h);
    /* For sequences: an int8 or grouped weight (4 * hidden, columns) packed once, then whole steps. NULL: matmul and
     * lstm_cell do it. packed: 4 * hidden rows of fxq_depth(columns) bytes, pairs: 4 * hidden, with hidden rounded up
     * to 16; of a grouped weight so many pairs, and scales, for each group. */
    void (*pack_lstm)(const struct fxq_weight *weight, int64_t u0, int64_t u1, void *packed, int32_t *pairs,
                      float *scale, void *scratch);
    void (*lstm_step)(const struct fxq_lstm_step *step);

    /* Pixels [p0, p1) of all output's, and outputs [n0, n1), n0 a multiple of 64, with so much scratch. */
    int64_t (*convolution_bytes)(const struct fxq_convolution *call);
    void (*convolve)(const struct fxq_convolution *call, int64_t p0, int64_t p1, int64_t n0, int64_t n1, void *scratch);

    /* Static quantization: so many values; and a pool's output pixels [p0, p1). */
    void (*quantize_value)(const float *x, int64_t count, struct fxq_scale scale, int qmax, uint8_t *q);
    void (*dequantize_value)(const uint8_t *q, int64_t count, struct fxq_scale scale, float *x);
    void (*look_up)(const uint8_t *q, int64_t count, const uint8_t *table, uint8_t *out);
    void (*combine)(const struct fxq_pair *call, const uint8_t *a, const uint8_t *b, int64_t count, uint8_t *out);
    void (*pool_pixels)(const struct fxq_pool *call, int64_t p0, int64_t p1);

    void (*put_row)(const struct fxq_table *table, int64_t row, float *out);
    /* out += the rows, one after another, each times its weight; weights NULL: all 1 */
    void (*add_rows)(const struct fxq_table *table, const int64_t *rows, const float *weights, int64_t count,
                     float *out);
    void (*take_greater)(float *out, const float *x, int64_t count); /* out[i] = the greater of the two */
};

#pragma GCC visibility push(default)
extern const struct fxq_kernels *fxq_active; /* set by fxq_select_isa */

/* For tests and benchmarks: one form for all int8 products that have it (FXQ_METHODS: the one that pays). */
extern enum fxq_method fxq_only_method;
#pragma GCC visibility pop

static inline bool fxq_uses(enum fxq_method method, bool pays) {
    return fxq_only_method == FXQ_METHODS ? pays : fxq_only_method == method;
}

/* scratch.c: this thread's reusable memory, at least `bytes`, aligned to 64, or NULL. One block: a later call moves it.
 */
void *fxq_scratch(int64_t bytes);
void fxq_trim_scratch(void);    /* gives back an unusually large block */
void *fxq_arena(int64_t bytes); /* the same, of another block: a run's values */
#pragma GCC visibility push(default)
void fxq_trim_arena(void);
#pragma GCC visibility pop

/* Bytes in whole cache lines. */
static inline int64_t fxq_aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

static inline int64_t fxq_clamp(int64_t value, int64_t least, int64_t most) {
    return value < least ? least : value > most ? most : value;
}

/* Where the index-th of `parts` shares of `count` things begins, in whole units. */
static inline int64_t fxq_share(int64_t count, int64_t unit, int64_t index, int64_t parts) {
    const int64_t units = (count + unit - 1) / unit, at = units * index / parts * unit;
    return at < count ? at : count;
}

/* activations.c */
int64_t fxq_depth(int64_t columns);
int64_t fxq_nibble_depth(int64_t columns); /* whole steps of 128 columns */
void fxq_set_row(struct fxq_row *row, const struct fxq_range *range, int qmax);
void fxq_set_int16_row(struct fxq_row *row, const struct fxq_range *range);
struct fxq_range fxq_join_ranges(const struct fxq_range *ranges, int64_t count);

/* Activations for products with a weight: the memory of so many rows (or fewer); then, with x's rows and what the
 * caller chooses filled in, the choice of their form; then one range for rows [first, last), where they share it; then
 * as fxq_kernels.quantize. */
int64_t fxq_activation_bytes(const struct fxq_weight *weight, int64_t rows);
void fxq_begin_activations(struct fxq_activations *x, const struct fxq_weight *weight);
void fxq_set_rows(const struct fxq_activations *x, int64_t first, int64_t last, const struct fxq_range *range);
void fxq_quantize(const struct fxq_activations *x, int64_t first, int count, const float *const *rows);
void fxq_quantize_rows(const struct fxq_activations *x, const struct fxq_rows *source, int64_t first, int64_t last);
const float *fxq_find_row(const struct fxq_rows *rows, int64_t row);

/* The product of x with the weight that it was begun for, as fxq_kernels.matmul; one thread's scratch in it, and in
 * row_sums. */
void fxq_multiply(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch);
int64_t fxq_product_scratch_bytes(const struct fxq_weight *weight);

/* groups.c: the same of grouped weights; and rows [n0, n1) of one unpacked. */
int64_t fxq_group_activation_bytes(const struct fxq_weight *weight, int64_t rows);
void fxq_begin_groups(struct fxq_activations *x, const struct fxq_weight *weight);
void fxq_quantize_groups(const struct fxq_activations *x, int64_t first, int count, const float *const *rows);
void fxq_multiply_groups(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                         void *scratch);
int64_t fxq_group_scratch_bytes(const struct fxq_weight *weight);
void fxq_unpack_groups(const struct fxq_weight *weight, int64_t n0, int64_t n1, const struct fxq_unpacked *to);

/* panels.c: how many floats columns take in whole panels, and `columns` columns of a matrix (depth, columns) of any
 * strides as panels, one after another: (depth, FXQ_PANEL) each, the last one (depth, a whole number of sixteen). */
int64_t fxq_panel_columns(int64_t columns);
void fxq_pack_panels(const float *b, int64_t row, int64_t column, int64_t depth, int64_t columns, float *panels);

#endif
