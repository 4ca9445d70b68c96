/* Random cases of static quantization's operators, for harness.c, which includes this. Their tensors end with their
 * memory, so that sanitizers see what is read beyond. */
#include "static.h"

static uint8_t *bytes(int64_t count) {
    uint8_t *q = take_exactly(count);
    const bool is_one = below(8) == 0, is_end = below(2);
    for (int64_t i = 0; i < count; i++) q[i] = is_one ? (is_end ? 255 : 0) : (uint8_t)below(256);
    return q;
}

static void mix_bytes(const uint8_t *q, int64_t count) {
    for (int64_t i = 0; i < count; i++) hash = (hash ^ q[i]) * 1099511628211u;
}

static struct fxq_scale any_scale(float scale) {
    const int64_t kind = below(4);
    return (struct fxq_scale){scale * (float)(1 + below(100)) * 0.01f, kind == 0 ? 0 : kind == 1 ? 255 : below(256)};
}

static int any_qmax(void) { return below(3) ? 255 : 15; }

static int64_t any_channels(void) {
    static const int64_t all[] = {1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 130};
    return all[below(18)];
}

/* Sizes of windows in each dimension; a rank below 3 leaves the first ones 1. */
static void set_windows(int rank, int64_t *in, int64_t *kernel, int64_t *stride, int64_t *dilation, int64_t *before,
                        int64_t *after) {
    for (int i = 0; i < FXQ_SPACE; i++) {
        const bool is_used = i >= FXQ_SPACE - rank;
        kernel[i] = is_used ? 1 + below(rank == 3 ? 3 : 5) : 1;
        stride[i] = is_used ? 1 + below(3) : 1;
        dilation[i] = is_used ? 1 + below(4) / 3 : 1;
        before[i] = is_used ? below(kernel[i] / 2 + 1) : 0;
        after[i] = is_used ? below(kernel[i] / 2 + 1) : 0;
        const int64_t least = dilation[i] * (kernel[i] - 1) + 1 - before[i] - after[i];
        in[i] = is_used ? (least > 1 ? least : 1) + below(rank == 1 ? 60 : 6) : 1;
    }
}

static void set_outputs(const int64_t *in, const int64_t *kernel, const int64_t *stride, const int64_t *dilation,
                        const int64_t *before, const int64_t *after, int64_t *out) {
    for (int i = 0; i < FXQ_SPACE; i++) {
        out[i] = (in[i] + before[i] + after[i] - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1;
    }
}

static int64_t product_of(const int64_t *sizes) { return sizes[0] * sizes[1] * sizes[2]; }

/* Weights' strides: the window by channels and places, or by places and channels. */
static void set_strides(struct fxq_convolution *c) {
    const int64_t inputs = c->inputs / c->groups, taps = product_of(c->kernel);
    const bool by_places = below(2);
    c->weight_strides[0] = inputs * taps;
    c->weight_strides[1] = by_places ? 1 : taps;
    c->weight_strides[4] = by_places ? inputs : 1;
    c->weight_strides[3] = c->weight_strides[4] * c->kernel[2];
    c->weight_strides[2] = c->weight_strides[3] * c->kernel[1];
    if (inputs == 1 && below(2)) { /* depthwise: all channels of a place */
        c->weight_strides[0] = 1;
        for (int i = 0; i < FXQ_SPACE; i++) c->weight_strides[2 + i] *= c->outputs;
    }
}

static void convolution_case(int threads) {
    struct fxq_convolution c = {.x_scale = any_scale(0.05f), .batch = 1 + below(6) / 5, .groups = 1};
    int64_t after[FXQ_SPACE];
    c.inputs = any_channels(), c.outputs = any_channels();
    const int64_t kind = below(4);
    if (kind == 0) c.groups = c.inputs = c.outputs;
    if (kind == 1)
        c.groups = 2 + below(2), c.inputs = c.groups * (1 + below(20)), c.outputs = c.groups * (1 + below(20));
    set_windows(1 + (int)below(3), c.in, c.kernel, c.stride, c.dilation, c.before, after);
    set_outputs(c.in, c.kernel, c.stride, c.dilation, c.before, after, c.out);
    c.is_transposed = below(4) == 0;
    for (int i = 0; i < FXQ_SPACE && c.is_transposed; i++) {
        const int64_t reach = c.dilation[i] * (c.kernel[i] - 1) + 1 - 2 * c.before[i];
        c.out[i] = (c.in[i] - 1) * c.stride[i] + (reach > 1 ? reach : 1) + below(c.stride[i]);
    }
    set_strides(&c);
    const int64_t count = c.batch * product_of(c.out) * c.outputs;
    uint8_t *x = bytes(c.batch * product_of(c.in) * c.inputs), *addend = below(3) ? NULL : bytes(count);
    int8_t *weight = (int8_t *)bytes(c.outputs * c.inputs / c.groups * product_of(c.kernel));
    float *scale = floats(c.outputs, 1e-6f, false), *bias = below(3) ? floats(c.outputs, 1e-4f, true) : NULL;
    const bool is_float = below(4) == 0, is_clamped = below(3) == 0, is_curved = !is_clamped && below(2);
    c.ending = (struct fxq_ending){.weight_scale = scale,
                                   .bias = bias,
                                   .addend = addend,
                                   .addend_scale = any_scale(0.05f),
                                   .low = is_clamped ? 0.0f : -INFINITY,
                                   .high = is_clamped ? 6.0f : INFINITY,
                                   .curve = is_curved ? (enum fxq_curve)(1 + below(3)) : FXQ_NO_CURVE,
                                   .slope = 0.1f,
                                   .is_float = is_float,
                                   .scale = any_scale(0.1f),
                                   .qmax = any_qmax()};
    c.x = x, c.weight = weight, c.y = take_exactly(count * (is_float ? 4 : 1));
    if (fxq_convolve(&c, threads) != FXQ_OK) abort();
    if (is_float) mix(c.y, count);
    else mix_bytes(c.y, count);
    free(x), free(weight), free(addend), free(scale), free(bias), free(c.y);
}

static void pool_case(int threads) {
    struct fxq_pool c = {.batch = 1 + below(2), .channels = any_channels(), .is_average = below(2)};
    set_windows(1 + (int)below(3), c.in, c.kernel, c.stride, c.dilation, c.before, c.after);
    if (c.is_average) {
        for (int i = 0; i < FXQ_SPACE; i++) c.dilation[i] = 1;
    }
    memcpy(c.after, c.before, sizeof c.after);
    set_outputs(c.in, c.kernel, c.stride, c.dilation, c.before, c.after, c.out);
    c.x_scale = any_scale(0.05f), c.scale = any_scale(0.05f), c.qmax = any_qmax();
    c.counts_padding = below(2), c.divisor = below(3) ? 0 : 1 + below(9);
    for (int i = 0; i < FXQ_SPACE; i++) {
        if (c.out[i] < 1) return;
    }
    const int64_t count = c.batch * product_of(c.out) * c.channels;
    uint8_t *x = bytes(c.batch * product_of(c.in) * c.channels);
    c.x = x, c.y = take_exactly(count);
    if (fxq_pool_windows(&c, threads) != FXQ_OK) abort();
    mix_bytes(c.y, count);
    free(x), free(c.y);
}

static void pair_case(int threads) {
    struct fxq_pair c = {.images = 1 + below(3), .pixels = 1 + below(9), .channels = any_channels()};
    const int64_t count = c.images * c.pixels * c.channels;
    c.is_shared = below(2), c.multiplies = below(2), c.subtracts = !c.multiplies && below(2);
    uint8_t *a = bytes(count), *b = bytes(c.is_shared ? c.images * c.channels : count);
    c.a = a, c.b = b, c.out = take_exactly(count);
    c.a_scale = any_scale(0.05f), c.b_scale = any_scale(0.05f), c.scale = any_scale(0.1f), c.qmax = any_qmax();
    c.low = below(2) ? 0.0f : -INFINITY, c.high = below(2) ? 1.0f : INFINITY;
    fxq_combine(&c, threads);
    mix_bytes(c.out, count);
    free(a), free(b), free(c.out);
}

static void pad_case(int threads) {
    struct fxq_pad c = {.batch = 1 + below(2), .channels = any_channels(), .zero_point = (uint8_t)below(256)};
    for (int i = 0; i < FXQ_SPACE; i++) {
        c.in[i] = 1 + below(6), c.before[i] = below(6) - 2;
        c.out[i] = c.in[i] + c.before[i] + below(6) - 2;
        if (c.out[i] < 1) return;
    }
    const int64_t count = c.batch * product_of(c.out) * c.channels;
    uint8_t *x = bytes(c.batch * product_of(c.in) * c.channels);
    c.x = x, c.y = take_exactly(count);
    fxq_pad_value(&c, threads);
    mix_bytes(c.y, count);
    free(x), free(c.y);
}

/* Steps as they may be: of factors, not of sizes, the last outputs lie beyond the input. */
static void resize_case(int threads) {
    struct fxq_resize c = {.batch = 1 + below(2), .channels = any_channels(), .aligns_corners = below(2)};
    for (int i = 0; i < FXQ_SPACE; i++) {
        c.in[i] = i || below(2) ? 1 + below(6) : 1, c.out[i] = i || c.in[0] > 1 ? 1 + below(7) : 1;
        c.step[i] = below(2) ? (double)c.in[i] / (double)c.out[i] : 0.3 * (double)below(7);
    }
    const int64_t count = c.batch * product_of(c.out) * c.channels;
    uint8_t *x = bytes(c.batch * product_of(c.in) * c.channels);
    c.x = x, c.y = take_exactly(count);
    fxq_resize_value(&c, threads);
    mix_bytes(c.y, count);
    free(x), free(c.y);
}

static void tables_case(int threads) {
    struct fxq_tables c = {
        .images = 1 + below(3), .channels = any_channels(), .pixels = 1 + below(40), .by_rows = below(2)};
    const int64_t count = c.images * c.channels * c.pixels;
    uint8_t *q = bytes(count), *tables = bytes(256 * c.channels);
    c.q = q, c.tables = tables, c.out = take_exactly(count);
    fxq_look_up_channels(&c, threads);
    mix_bytes(c.out, count);
    free(q), free(tables), free(c.out);
}

static void move_case(int threads) {
    pad_case(threads);
    resize_case(threads);
    tables_case(threads);
}

/* A pair, and single values there and back. */
static void values_case(int threads) {
    const int64_t count = below(4) ? below(300) : 4000 + below(9000);
    const struct fxq_scale scale = any_scale(0.1f);
    float *x = floats(count, 1e-3f, true);
    uint8_t *table = bytes(256), *q = take_exactly(count), *out = take_exactly(count);
    if (count) x[below(count)] = below(2) ? NAN : -INFINITY;
    pair_case(threads);
    fxq_quantize_value(x, count, scale, any_qmax(), q, threads);
    mix_bytes(q, count);
    fxq_look_up(q, count, table, out, threads);
    mix_bytes(out, count);
    fxq_dequantize_value(out, count, scale, x, threads);
    mix(x, count);
    free(x), free(table), free(q), free(out);
}
