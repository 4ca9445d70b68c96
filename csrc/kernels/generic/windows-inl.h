/* Where the windows of a convolution's pixels lie in its input.
 *
 * A window is `taps` runs of `run` values that lie together: a kernel's row with all channels, where it is not dilated
 * and has one group, or one place of the kernel. Pixels of one output row, some at a time (a segment), have their runs
 * `step` values apart. Where a window passes the border, or values are not taken as they lie, the segment's input rows
 * are copied, with the zero point beyond the border; and so are the last ones of the tensor, since up to 64 values may
 * be read beyond a run.
 *
 * Expects: CONV_VALUE, how values are multiplied: uint8_t as they lie, or int16_t. */
#include "static.h"

enum { COPIED_BYTES = 128 << 10, MOST_SEGMENT = 240, SLACK = 64 };

struct windows {
    const struct fxq_convolution *call;
    int64_t taps, run, step;
    int64_t per_row;         /* taps a row of the kernel */
    int64_t most;            /* pixels a segment */
    int64_t line;            /* values of an input row's copy */
    const CONV_VALUE **at;   /* where the first pixel's runs begin */
    CONV_VALUE *lines;       /* copies, a row of the kernel each */
    CONV_VALUE *border;      /* a row of zero points */
    int64_t bytes;           /* of all of this */
};

/* Pixels beside each other. */
struct segment {
    int64_t pixel, count; /* of all pixels of the output */
};

static bool is_depthwise(const struct fxq_convolution *c) {
    return c->groups > 1 && c->groups == c->inputs && c->groups == c->outputs;
}

/* Whether each output's weights lie in the order of its window. */
static bool has_dense_windows(const struct fxq_convolution *c) {
    const int64_t inputs = c->inputs / c->groups, *stride = c->weight_strides, *kernel = c->kernel;
    const int64_t width = inputs * kernel[2], plane = width * kernel[1];
    return (inputs == 1 || stride[1] == 1) && (kernel[2] == 1 || stride[4] == inputs) &&
           (kernel[1] == 1 || stride[3] == width) && (kernel[0] == 1 || stride[2] == plane) &&
           (c->outputs == 1 || stride[0] == plane * kernel[0]);
}

/* scratch: `bytes` of it; NULL: to know how many. */
static struct windows plan_windows(const struct fxq_convolution *c, void *scratch) {
    const bool is_joined = c->groups == 1 && (c->dilation[2] == 1 || c->kernel[2] == 1);
    const int64_t rows = c->kernel[0] * c->kernel[1];
    struct windows v = {.call = c, .per_row = is_joined ? 1 : c->kernel[2], .step = c->stride[2] * c->inputs};
    v.taps = rows * v.per_row;
    v.run = c->inputs / c->groups * (is_joined ? c->kernel[2] : 1);
    const int64_t row_bytes = rows * v.step * (int64_t)sizeof(CONV_VALUE);
    v.most = fxq_clamp(row_bytes ? COPIED_BYTES / row_bytes : 1, 12, MOST_SEGMENT);
    v.line = ((v.most - 1) * c->stride[2] + (c->kernel[2] - 1) * c->dilation[2] + 1) * c->inputs + SLACK;
    const int64_t pointers = fxq_aligned(v.taps * (int64_t)sizeof *v.at);
    const int64_t line_bytes = fxq_aligned(v.line * (int64_t)sizeof(CONV_VALUE));
    v.line = line_bytes / (int64_t)sizeof(CONV_VALUE);
    v.bytes = pointers + (rows + 1) * line_bytes;
    if (scratch == NULL) return v;
    v.at = scratch;
    v.border = (CONV_VALUE *)((char *)scratch + pointers);
    v.lines = v.border + v.line;
    for (int64_t i = 0; i < v.line; i++) v.border[i] = (CONV_VALUE)c->x_scale.zero_point;
    return v;
}

static struct segment next_segment(const struct windows *v, const struct segment *s, int64_t end) {
    const int64_t width = v->call->out[2], pixel = s->pixel + s->count;
    if (pixel >= end) return (struct segment){pixel, 0};
    const int64_t row_end = (pixel / width + 1) * width, left = (row_end < end ? row_end : end) - pixel;
    const int64_t parts = (left + v->most - 1) / v->most;
    return (struct segment){pixel, (left + parts - 1) / parts};
}

static struct segment first_segment(const struct windows *v, int64_t begin, int64_t end) {
    const struct segment before = {begin, 0};
    return next_segment(v, &before, end);
}

/* Columns [first, first + count) of an input row. */
static void copy_columns(const struct fxq_convolution *c, const uint8_t *row, int64_t first, int64_t count,
                         CONV_VALUE *to) {
    const int64_t begin = fxq_clamp(first, 0, c->in[2]), end = fxq_clamp(first + count, begin, c->in[2]);
    const int64_t before = (begin - first < count ? begin - first : count) * c->inputs, real = (end - begin) * c->inputs;
    const CONV_VALUE zero = (CONV_VALUE)c->x_scale.zero_point;
    const uint8_t *from = row + begin * c->inputs;
    for (int64_t i = 0; i < before; i++) to[i] = zero;
    for (int64_t i = 0; i < real; i++) to[before + i] = from[i];
    for (int64_t i = before + real; i < count * c->inputs; i++) to[i] = zero;
}

/* The windows of a segment, of a group's channels. */
static void find_windows(const struct windows *v, const struct segment *s, int64_t group) {
    const struct fxq_convolution *c = v->call;
    const int64_t row = s->pixel / c->out[2], plane = row / c->out[1], image = plane / c->out[0];
    const int64_t first = s->pixel % c->out[2] * c->stride[2] - c->before[2];
    const int64_t columns = (s->count - 1) * c->stride[2] + (c->kernel[2] - 1) * c->dilation[2] + 1;
    const bool copies = sizeof(CONV_VALUE) > 1 || first < 0 || first + columns > c->in[2];
    const uint8_t *end = c->x + c->batch * c->in[0] * c->in[1] * c->in[2] * c->inputs;
    const int64_t apart = c->dilation[2] * c->inputs, channel = group * (c->inputs / c->groups);
    const CONV_VALUE **at = v->at;
    for (int64_t i = 0; i < c->kernel[0] * c->kernel[1]; i++) {
        const int64_t d = plane % c->out[0] * c->stride[0] - c->before[0] + i / c->kernel[1] * c->dilation[0];
        const int64_t h = row % c->out[1] * c->stride[1] - c->before[1] + i % c->kernel[1] * c->dilation[1];
        const CONV_VALUE *line = v->border;
        if (d >= 0 && d < c->in[0] && h >= 0 && h < c->in[1]) {
            const uint8_t *from = c->x + ((image * c->in[0] + d) * c->in[1] + h) * c->in[2] * c->inputs;
            if (copies || end - from < (first + columns) * c->inputs + SLACK) {
                line = v->lines + i * v->line;
                copy_columns(c, from, first, columns, v->lines + i * v->line);
            } else {
                line = (const CONV_VALUE *)(from + first * c->inputs);
            }
        }
        for (int64_t j = 0; j < v->per_row; j++) *at++ = line + j * apart + channel;
    }
}
