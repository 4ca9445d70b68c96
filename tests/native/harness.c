/* The kernels without Python: random cases on every instruction set, hashed. One line an instruction set; the hashes
 * are equal on all of them, and on all processors. argv: cases, threads. Used by test_harness.py. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "runtime/pool.h"

static uint64_t state, hash;

static uint32_t next(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

static int64_t below(int64_t n) { return next() % n; }

static void *take(int64_t bytes) {
    void *memory = malloc((size_t)bytes + 1);
    if (memory == NULL) abort();
    return memory;
}

/* No byte more, for sanitizers. */
static void *take_exactly(int64_t bytes) {
    void *memory = malloc((size_t)bytes);
    if (memory == NULL && bytes > 0) abort();
    return memory;
}

static int8_t *int8s(int64_t count) {
    int8_t *w = take(count);
    for (int64_t i = 0; i < count; i++) w[i] = (int8_t)below(256);
    return w;
}

static int16_t *int16s(int64_t count) {
    int16_t *w = take(count * 2);
    for (int64_t i = 0; i < count; i++) w[i] = (int16_t)(below(65536) - 32768);
    return w;
}

/* float16 of both signs, subnormal ones too, no infinity, no NaN. */
static uint16_t *halves(int64_t count) {
    uint16_t *w = take(count * 2);
    for (int64_t i = 0; i < count; i++) w[i] = (uint16_t)(below(2) << 15 | below(0x4800));
    return w;
}

static float *floats(int64_t count, float scale, bool is_signed) {
    float *x = take(count * 4);
    for (int64_t i = 0; i < count; i++) x[i] = (float)(below(20001) - (is_signed ? 10000 : 0)) * scale;
    return x;
}

static void mix(const float *x, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], 4);
        if (isnan(x[i])) bits = 0x7fc00000; /* any NaN is as good as another */
        hash = (hash ^ bits) * 1099511628211u;
    }
}

/* Of one of the first `formats` formats: any bytes, and finite scales of little size. */
static struct fxq_weight weight(int64_t outputs, int64_t columns, int formats) {
    static const enum fxq_format all[] = {FXQ_INT8, FXQ_INT16, FXQ_FLOAT16, FXQ_INT4, FXQ_INT3, FXQ_FLOAT32};
    struct fxq_weight w = {.format = all[below(formats)], .outputs = outputs, .columns = columns};
    const int64_t count = outputs * columns, group = 32 << below(3);
    switch (w.format) {
        case FXQ_INT8: w.data = int8s(count), w.scale = floats(outputs, 1e-6f, false); break;
        case FXQ_INT16: w.data = int16s(count), w.scale = floats(outputs, 1e-8f, false); break;
        case FXQ_FLOAT16: w.data = halves(count); break;
        case FXQ_FLOAT32: w.data = floats(count, 1e-4f, true); break;
        default: w.group = group, w.groups = (columns + group - 1) / group;
    }
    if (w.group == 0) return w;
    uint16_t *scale = take(outputs * w.groups * 2);
    for (int64_t i = 0; i < outputs * w.groups; i++) scale[i] = (uint16_t)(below(2) << 15 | (0x3b00 + below(256)));
    w.data = int8s(outputs * fxq_row_bytes(w.format, columns)), w.scale = scale;
    return w;
}

static void release(const struct fxq_weight *w) { free((void *)w->data), free((void *)w->scale); }

/* Large ones are packed, and if their outputs are many streamed. */
static void linear_case(int threads, bool is_large) {
    const int64_t columns = below(is_large ? 50 : 200), outputs = is_large && below(2) ? 8 << 10 : below(150);
    const int64_t inner = is_large ? 260 : 1 + below(9), outer = is_large ? 1 : below(9), rows = inner * outer;
    const int64_t stride = below(2) ? columns : below(columns + 3),
                  outer_stride = below(2) ? inner * stride : below(300);
    const int64_t count = rows ? (inner - 1) * stride + (outer - 1) * outer_stride + columns : 0;
    float *x = floats(count, 1e-3f, true), *bias = floats(outputs, 1e-4f, true);
    float *out = take(rows * outputs * 4);
    const struct fxq_weight w = weight(outputs, columns, columns ? 5 : 3); /* groups have columns */
    if (below(10) == 0 && count > 0) x[below(count)] = NAN;
    if (below(10) == 0 && count > 0) x[below(count)] = -INFINITY;
    const struct fxq_linear call = {
        .x = {.data = x, .dimensions = 2, .sizes = {outer, inner}, .strides = {outer_stride, stride}},
        .rows = rows,
        .weight = w,
        .bias = below(3) ? bias : NULL,
        .out = out,
        .relu = below(3) == 0,
        .per_token = below(3) > 0,
        .qmax = below(3) ? 255 : 127};
    if (fxq_linear(&call, threads) != FXQ_OK) abort();
    mix(out, rows * outputs);
    free(x), free(bias), free(out), release(&w);
}

static void product_case(int threads) {
    const int64_t batch = 1 + below(4), rows = below(40), depth = below(70), columns = below(150);
    const bool is_turned = below(2), is_shared = below(2); /* b lies as (columns, depth); one b for all */
    float *a = floats(batch * rows * depth, 1e-3f, true), *b = floats(batch * depth * columns, 1e-3f, true);
    float *out = take(batch * rows * columns * 4);
    if (below(10) == 0 && rows * depth > 0) a[below(rows * depth)] = NAN;
    const struct fxq_product call = {.batches = {.dimensions = 1,
                                                 .count = batch,
                                                 .sizes = {batch},
                                                 .strides = {{rows * depth}, {is_shared ? 0 : depth * columns}}},
                                     .a = a,
                                     .b = b,
                                     .a_row = depth,
                                     .a_column = 1,
                                     .b_row = is_turned ? 1 : columns,
                                     .b_column = is_turned ? depth : 1,
                                     .rows = rows,
                                     .depth = depth,
                                     .columns = columns,
                                     .out = out};
    if (fxq_product(&call, threads) != FXQ_OK) abort();
    mix(out, batch * rows * columns);
    free(a), free(b), free(out);
}

static void attention_case(int threads) {
    const int64_t batch = 1 + below(3), heads = 1 + below(3), rows = below(40), keys = below(150), depth = below(40),
                  outputs = below(80);
    const int64_t all = batch * heads;
    float *q = floats(all * rows * depth, 1e-4f, true), *k = floats(all * keys * depth, 1e-4f, true);
    float *v = floats(all * keys * outputs, 1e-4f, true), *mask = floats(rows * keys, 1e-3f, true),
          *out = take(all * rows * outputs * 4);
    for (int64_t i = 0; i < rows * keys; i++) mask[i] = below(4) ? mask[i] : -INFINITY;
    if (below(10) == 0 && rows * depth > 0) q[below(rows * depth)] = NAN;
    const struct fxq_attention call = {.batches = {.dimensions = 2,
                                                   .count = all,
                                                   .sizes = {batch, heads},
                                                   .strides = {{heads * rows * depth, rows * depth},
                                                               {heads * keys * depth, keys * depth},
                                                               {heads * keys * outputs, keys * outputs},
                                                               {0, 0}}},
                                       .q = {q, depth, 1},
                                       .k = {k, depth, 1},
                                       .v = {v, outputs, 1},
                                       .mask = {below(2) ? mask : NULL, keys, 1},
                                       .rows = rows,
                                       .keys = keys,
                                       .depth = depth,
                                       .outputs = outputs,
                                       .scale = 0.3f,
                                       .is_causal = below(2),
                                       .out = out};
    if (fxq_attention(&call, threads) != FXQ_OK) abort();
    mix(out, all * rows * outputs);
    free(q), free(k), free(v), free(mask), free(out);
}

static void recurrent_case(int threads) {
    const int64_t steps = 1 + below(6), batch = 1 + below(20), inputs = 1 + below(80), hidden = 1 + below(90);
    const enum fxq_mode mode = (enum fxq_mode)below(4);
    const int64_t outputs = mode == FXQ_LSTM && below(3) == 0 ? 1 + below(40) : hidden;
    const int64_t gates = (mode == FXQ_LSTM ? 4 : mode == FXQ_GRU ? 3 : 1) * hidden;
    const int directions = 1 + (int)below(2);
    struct fxq_recurrent_weights cells[2] = {0};
    for (int i = 0; i < directions; i++) {
        cells[i] = (struct fxq_recurrent_weights){.ih = weight(gates, inputs, 6),
                                                  .hh = weight(gates, outputs, 6),
                                                  .bias = floats(gates, 1e-4f, true),
                                                  .hidden_bias = mode == FXQ_GRU ? floats(hidden, 1e-4f, true) : NULL};
        if (outputs != hidden) cells[i].hr = weight(outputs, hidden, 6);
    }
    float *x = floats(steps * batch * inputs, 1e-3f, true), *h0 = floats(directions * batch * outputs, 1e-4f, true);
    float *h = take(directions * batch * outputs * 4), *c = floats(directions * batch * hidden, 1e-4f, true);
    float *out = take(steps * batch * directions * outputs * 4);
    const struct fxq_recurrent call = {.mode = mode,
                                       .x = x,
                                       .steps = steps,
                                       .batch = batch,
                                       .inputs = inputs,
                                       .hidden = hidden,
                                       .outputs = outputs,
                                       .layers = 1,
                                       .directions = directions,
                                       .cells = cells,
                                       .h0 = h0,
                                       .h = h,
                                       .c = c,
                                       .out = out,
                                       .per_token = below(3) > 0,
                                       .qmax = 255};
    if (fxq_recurrent(&call, threads) != FXQ_OK) abort();
    mix(out, steps * batch * directions * outputs);
    mix(h, directions * batch * outputs);
    mix(c, directions * batch * hidden);
    for (int i = 0; i < directions; i++) {
        release(&cells[i].ih), release(&cells[i].hh), release(&cells[i].hr), free((void *)cells[i].bias),
            free((void *)cells[i].hidden_bias);
    }
    free(x), free(h0), free(h), free(c), free(out);
}

#include "harness_static.h"

int main(int count, char **arguments) {
    const int cases = count > 1 ? atoi(arguments[1]) : 300, threads = count > 2 ? atoi(arguments[2]) : 2;
    fxq_least_share = 1;
    fxq_only_way = FXQ_WAKING;
    for (int isa = 0; isa < fxq_isa_count(); isa++) {
        if (!fxq_select_isa(isa)) {
            printf("%s: %s\n", fxq_isa_name(isa), fxq_isa_obstacle(isa));
            continue;
        }
        state = 1;
        hash = 14695981039346656037u;
        for (int i = 0; i < cases; i++) {
            linear_case(threads, i % 32 == 0);
            if (i % 4 == 0) recurrent_case(threads);
            if (i % 2 == 0) product_case(threads);
            if (i % 8 == 0) attention_case(threads);
            convolution_case(threads);
            if (i % 2 == 0) pool_case(threads);
            if (i % 4 == 0) values_case(threads);
            if (i % 4 == 2) move_case(threads);
        }
        printf("%s: %016llx\n", fxq_isa_name(isa), (unsigned long long)hash);
    }
    return 0;
}
