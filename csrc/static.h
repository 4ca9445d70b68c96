/* The operators of static quantization. A value is uint8: real = (q - zero_point) * scale, with one scale for all of
 * it. Pixels lie one after another, each with all of its channels; fxquant/ops/static.py, values.py and pools.py have
 * the specification, to the bit. */
#ifndef FXQUANT_STATIC_H
#define FXQUANT_STATIC_H

#include "fxquant.h"

#pragma GCC visibility push(default)

struct fxq_scale {
    float scale;
    int32_t zero_point;
};

/* What a product may end with, in place of bounds: fxquant/ops/elementwise.py. */
enum fxq_curve { FXQ_NO_CURVE, FXQ_LEAKY_RELU, FXQ_HARDSWISH, FXQ_SILU };

/* What becomes of a product's sums: y = float(sum) * (x's scale * weight_scale) + bias + addend, a curve of it or
 * clamped; and, but where it stays float, quantized. */
struct fxq_ending {
    const float *weight_scale, *bias; /* (outputs,); bias may be NULL */
    const uint8_t *addend;            /* as the output, or NULL */
    struct fxq_scale addend_scale;
    float low, high; /* infinite: no bound */
    enum fxq_curve curve;
    float slope; /* of the leaky ReLU */
    bool is_float;
    struct fxq_scale scale;
    int qmax;
};

/* convolution.c: three dimensions, of which some may be 1. */
enum { FXQ_SPACE = 3 };
struct fxq_convolution {
    const uint8_t *x; /* (batch, in..., inputs) */
    struct fxq_scale x_scale;
    const int8_t *weight;                  /* (outputs, inputs / groups, kernel...) */
    int64_t weight_strides[2 + FXQ_SPACE]; /* any */
    int64_t batch, inputs, outputs, groups;
    int64_t in[FXQ_SPACE], out[FXQ_SPACE], kernel[FXQ_SPACE], stride[FXQ_SPACE], dilation[FXQ_SPACE];
    int64_t before[FXQ_SPACE]; /* padding, with x's zero point; that after follows from out */
    /* Each input pixel goes to a window of outputs, not the other way round; before: outputs that are left out. */
    bool is_transposed;
    int64_t weight_skip; /* from one group to the next, beyond the outputs' stride */
    struct fxq_ending ending;
    void *y; /* (batch, out..., outputs): uint8, or float32 */
};
int fxq_convolve(const struct fxq_convolution *call, int threads);
/* The same with scratch memory of the caller's, so much a thread; multiplications; and how much. */
void fxq_convolve_in(const struct fxq_convolution *call, int threads, void *scratch, int64_t scratch_bytes);
int64_t fxq_convolution_work(const struct fxq_convolution *call);
int64_t fxq_convolution_bytes(const struct fxq_convolution *call);

/* few_pixels.c: whether there is another way, with so much scratch, of pixels [p0, p1) and outputs [n0, n1). */
bool fxq_has_few_pixels(const struct fxq_convolution *call);
int64_t fxq_few_pixels_bytes(const struct fxq_convolution *call);
void fxq_multiply_few_pixels(const struct fxq_convolution *call, int64_t p0, int64_t p1, int64_t n0, int64_t n1,
                             void *scratch);

/* transposed_convolution.c: of one that is transposed, as fxq_convolve and fxq_convolve_in; `shared` has
 * output + addend bytes. */
struct fxq_transposed_bytes {
    int64_t thread, output, addend;
};
struct fxq_transposed_bytes fxq_transposed_bytes(const struct fxq_convolution *call);
void fxq_convolve_transposed(const struct fxq_convolution *call, int threads, char *scratch,
                             const struct fxq_transposed_bytes *bytes, char *shared);
int fxq_convolve_phases(const struct fxq_convolution *call, int threads);

/* transpose.c: as fxq_transpose, of bytes */
void fxq_turn_bytes(const uint8_t *x, int64_t matrices, int64_t rows, int64_t columns, uint8_t *out, int threads);

/* values.c: single values. */
void fxq_quantize_value(const float *x, int64_t count, struct fxq_scale scale, int qmax, uint8_t *q, int threads);
void fxq_dequantize_value(const uint8_t *q, int64_t count, struct fxq_scale scale, float *x, int threads);
void fxq_look_up(const uint8_t *q, int64_t count, const uint8_t *table, uint8_t *out, int threads);

/* Two values, of which b may be one value a channel of each image: a is (images, pixels, channels). */
struct fxq_pair {
    const uint8_t *a, *b;
    struct fxq_scale a_scale, b_scale, scale;
    int64_t images, pixels, channels;
    bool is_shared; /* b is (images, channels) */
    bool multiplies, subtracts;
    float low, high;
    int qmax;
    uint8_t *out;
};
void fxq_combine(const struct fxq_pair *call, int threads);

/* pools.c: windows of (batch, in..., channels). */
struct fxq_pool {
    const uint8_t *x;
    int64_t batch, channels;
    int64_t in[FXQ_SPACE], out[FXQ_SPACE], kernel[FXQ_SPACE], stride[FXQ_SPACE], dilation[FXQ_SPACE], before[FXQ_SPACE];
    bool is_average; /* else the greatest */
    struct fxq_scale x_scale, scale;
    int qmax;
    int64_t divisor;     /* of a window's sum; 0: the pixels that count */
    bool counts_padding; /* as far as the padding goes: `after` beyond the end */
    int64_t after[FXQ_SPACE];
    uint8_t *y;
};
int fxq_pool_windows(const struct fxq_pool *call, int threads);

/* moves.c. By rows, each channel is an image of its own with one. */
struct fxq_pad {
    const uint8_t *x;                                                          /* (batch, in..., channels) */
    int64_t batch, channels, in[FXQ_SPACE], out[FXQ_SPACE], before[FXQ_SPACE]; /* before: negative: cut off */
    uint8_t zero_point;
    uint8_t *y;
};
void fxq_pad_value(const struct fxq_pad *call, int threads);

/* Linear interpolation. step: from one output to the next, in inputs. */
struct fxq_resize {
    const uint8_t *x;
    int64_t batch, channels, in[FXQ_SPACE], out[FXQ_SPACE];
    double step[FXQ_SPACE];
    bool aligns_corners;
    uint8_t *y;
};
void fxq_resize_value(const struct fxq_resize *call, int threads);

/* A table of 256 integers for each channel. by_rows: q is (images, channels, pixels), else (images, pixels, channels).
 */
struct fxq_tables {
    const uint8_t *q, *tables;
    int64_t images, channels, pixels;
    bool by_rows;
    uint8_t *out;
};
void fxq_look_up_channels(const struct fxq_tables *call, int threads);

/* run.c: operators one after another, in one call. Values are known by their number; those with channels lie pixel by
 * pixel. */
enum { FXQ_RANK = 2 + FXQ_SPACE, FXQ_STEP_INPUTS = 16, FXQ_MOST_VALUES = 512 };
enum fxq_operator {
    FXQ_IMPORT, /* integers from outside */
    FXQ_QUANTIZE,
    FXQ_DEQUANTIZE,
    FXQ_CONVOLVE,
    FXQ_COMBINE,
    FXQ_POOL,
    FXQ_LOOK_UP,
    FXQ_FLATTEN,
    FXQ_JOIN, /* channels of one value after those of another */
    FXQ_PAD,
    FXQ_RESIZE,
    FXQ_LOOK_UP_CHANNELS,
    FXQ_STEPS
};

struct fxq_value {
    int dimensions; /* (batch, channels, ...), or fewer */
    int64_t shape[FXQ_RANK];
    bool is_float, by_rows; /* by_rows: from or for outside, its channels one after another, each with all pixels */
    bool is_turned;         /* lies by rows already */
    void *data;             /* NULL before it is given a place in the arena */
    void *leaves;           /* where it is wanted by rows as well, or NULL */
};

struct fxq_step {
    enum fxq_operator operator;
    int inputs[FXQ_STEP_INPUTS], input_count, output;
    int last_use; /* of its output: the index of a step */
    union {
        struct fxq_convolution convolution;
        struct fxq_pair pair;
        struct fxq_pool pool;
        struct fxq_pad pad;
        struct fxq_resize resize;
        struct fxq_tables tables;
        struct {
            struct fxq_scale scale;
            int qmax;
            const uint8_t *table;
        } single;
    } call;
};

static inline int64_t fxq_pixels(const struct fxq_value *value) {
    int64_t pixels = 1;
    for (int i = 2; i < value->dimensions; i++) pixels *= value->shape[i];
    return pixels;
}
static inline int64_t fxq_bytes(const struct fxq_value *value) {
    int64_t bytes = value->is_float ? (int64_t)sizeof(float) : 1;
    for (int i = 0; i < value->dimensions; i++) bytes *= value->shape[i];
    return bytes;
}

/* Runs steps whose values have their shapes, and those from or for outside their data. */
int fxq_run_steps(struct fxq_step *steps, int count, struct fxq_value *values, int threads);

#pragma GCC visibility pop

#endif
