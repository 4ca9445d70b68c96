/* Where the windows of a convolution's pixels lie in its input.
 *
 * A window is `taps` runs of `run` values that lie together: a kernel's row with all channels, where it is not dilated
 * and has one group, or one place of the kernel. Pixels are taken a segment at a time: a part of an output row, or some
 * whole rows of a plane. Where a window of theirs passes the border, or values are not taken as they lie, the part of
 * the input that they see is copied, with the zero point beyond the border; and so is the end of the tensor, since up
 * to 64 values may be read beyond a run.
 *
 * Expects: CONV_VALUE, how values are multiplied: uint8_t as they lie, or int16_t. */
#include "static.h"

enum { COPIED_BYTES = 128 << 10, MOST_SEGMENT = 480, SLACK = 64 };

struct windows {
    const struct fxq_convolution *call;
    int64_t taps, run;
    int64_t per_row;         /* taps a row of the kernel */
    int64_t most_rows, most; /* of a segment: rows, and pixels of a part of a row */
    int64_t bytes;           /* of scratch */
    const CONV_VALUE **at;   /* where the first pixel's runs begin */
    CONV_VALUE *copy;        /* of what a segment sees */
    int64_t pitch;           /* of the rows that a segment sees, in values */
};

/* Pixels of the output, of one row or of whole rows. */
struct segment {
    int64_t pixel, count, columns; /* columns: pixels a row */
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
           (c->outputs == 1 || stride[0] == plane * kernel[0]) && (c->groups == 1 || c->weight_skip == 0);
}

/* How much of the input so many outputs beside each other see, in dimension i. */
static int64_t seen(const struct fxq_convolution *c, int i, int64_t outputs) {
    return (outputs - 1) * c->stride[i] + (c->kernel[i] - 1) * c->dilation[i] + 1;
}

static int64_t copied_values(const struct fxq_convolution *c, int64_t rows, int64_t columns) {
    return c->kernel[0] * seen(c, 1, rows) * seen(c, 2, columns) * c->inputs;
}

/* scratch: `bytes` of it; NULL: to know how many. */
static struct windows plan_windows(const struct fxq_convolution *c, void *scratch) {
    const bool is_joined = c->groups == 1 && (c->dilation[2] == 1 || c->kernel[2] == 1);
    const int64_t most_values = COPIED_BYTES / (int64_t)sizeof(CONV_VALUE);
    struct windows v = {.call = c, .per_row = is_joined ? 1 : c->kernel[2], .most = MOST_SEGMENT, .most_rows = 1};
    v.taps = c->kernel[0] * c->kernel[1] * v.per_row;
    v.run = c->inputs / c->groups * (is_joined ? c->kernel[2] : 1);
    while (v.most > 12 && copied_values(c, 1, v.most) > most_values) v.most = (v.most + 1) / 2;
    const int64_t width = c->out[2] < v.most ? c->out[2] : v.most;
    while (v.most_rows < c->out[1] && (v.most_rows + 1) * width <= MOST_SEGMENT &&
           copied_values(c, v.most_rows + 1, width) <= most_values) {
        v.most_rows++;
    }
    const int64_t pointers = fxq_aligned(v.taps * (int64_t)sizeof *v.at);
    v.bytes = pointers + fxq_aligned((copied_values(c, v.most_rows, width) + SLACK) * (int64_t)sizeof(CONV_VALUE));
    if (scratch == NULL) return v;
    v.at = scratch;
    v.copy = (CONV_VALUE *)((char *)scratch + pointers);
    return v;
}

static struct segment next_segment(const struct windows *v, const struct segment *s, int64_t end) {
    const int64_t width = v->call->out[2], pixel = s->pixel + s->count, left = end - pixel;
    if (left <= 0) return (struct segment){pixel, 0, 1};
    const int64_t column = pixel % width, of_plane = v->call->out[1] - pixel / width % v->call->out[1];
    if (column == 0 && left >= width && width <= v->most) {
        int64_t rows = left / width < of_plane ? left / width : of_plane;
        const int64_t parts = (rows + v->most_rows - 1) / v->most_rows;
        rows = (rows + parts - 1) / parts;
        return (struct segment){pixel, rows * width, width};
    }
    const int64_t of_row = width - column < left ? width - column : left, parts = (of_row + v->most - 1) / v->most;
    const int64_t count = (of_row + parts - 1) / parts;
    return (struct segment){pixel, count, count};
}

static struct segment first_segment(const struct windows *v, int64_t begin, int64_t end) {
    const struct segment before = {begin, 0, 1};
    return next_segment(v, &before, end);
}

/* A part of an input plane: rows and columns from a place on, which may lie outside. */
struct region {
    int64_t row, rows, column, columns;
};

static void fill(CONV_VALUE *to, int64_t count, CONV_VALUE value) {
    if (sizeof value == 1) memset(to, value, (size_t)count);
    else
        for (int64_t i = 0; i < count; i++) to[i] = value;
}

/* plane NULL: it lies outside. */
static void copy_region(const struct fxq_convolution *c, const uint8_t *plane, const struct region *r, CONV_VALUE *to) {
    const int64_t begin = fxq_clamp(r->column, 0, c->in[2]), end = fxq_clamp(r->column + r->columns, begin, c->in[2]);
    const int64_t width = r->columns * c->inputs, real = (end - begin) * c->inputs,
                  before = real ? (begin - r->column) * c->inputs : width;
    const CONV_VALUE zero = (CONV_VALUE)c->x_scale.zero_point;
    for (int64_t i = 0; i < r->rows; i++, to += width) {
        const int64_t row = r->row + i;
        if (plane == NULL || row < 0 || row >= c->in[1]) {
            fill(to, width, zero);
            continue;
        }
        const uint8_t *from = plane + (row * c->in[2] + begin) * c->inputs;
        fill(to, before, zero);
        for (int64_t j = 0; j < real; j++) to[before + j] = from[j];
        fill(to + before + real, width - before - real, zero);
    }
}

static bool lies_inside(const struct fxq_convolution *c, int64_t depth, const struct region *r) {
    return depth >= 0 && depth + (c->kernel[0] - 1) * c->dilation[0] < c->in[0] && r->row >= 0 &&
           r->row + r->rows <= c->in[1] && r->column >= 0 && r->column + r->columns <= c->in[2];
}

/* The windows of a segment, of a group's channels. */
static void find_windows(struct windows *v, const struct segment *s, int64_t group) {
    const struct fxq_convolution *c = v->call;
    const int64_t row = s->pixel / c->out[2], plane = row / c->out[1], image = plane / c->out[0];
    const int64_t depth = plane % c->out[0] * c->stride[0] - c->before[0], in_plane = c->in[1] * c->in[2] * c->inputs;
    const struct region r = {row % c->out[1] * c->stride[1] - c->before[1], seen(c, 1, s->count / s->columns),
                             s->pixel % c->out[2] * c->stride[2] - c->before[2], seen(c, 2, s->columns)};
    const uint8_t *x = c->x + image * c->in[0] * in_plane, *end = c->x + c->batch * c->in[0] * in_plane;
    const int64_t last = depth + (c->kernel[0] - 1) * c->dilation[0];
    const bool copies =
        sizeof(CONV_VALUE) > 1 || !lies_inside(c, depth, &r) ||
        end - x < last * in_plane + ((r.row + r.rows - 1) * c->in[2] + r.column + r.columns) * c->inputs + SLACK;
    v->pitch = (copies ? r.columns : c->in[2]) * c->inputs;
    const CONV_VALUE **at = v->at;
    for (int64_t d = 0; d < c->kernel[0]; d++) {
        const int64_t in = depth + d * c->dilation[0];
        const CONV_VALUE *from = v->copy + d * r.rows * v->pitch;
        if (copies) {
            copy_region(c, in >= 0 && in < c->in[0] ? x + in * in_plane : NULL, &r, v->copy + d * r.rows * v->pitch);
        } else {
            from = (const CONV_VALUE *)(x + in * in_plane + (r.row * c->in[2] + r.column) * c->inputs);
        }
        from += group * (c->inputs / c->groups);
        for (int64_t h = 0; h < c->kernel[1]; h++) {
            for (int64_t w = 0; w < v->per_row; w++) {
                *at++ = from + h * c->dilation[1] * v->pitch + w * c->dilation[2] * c->inputs;
            }
        }
    }
}

/* Goes through a segment's pixels. offset: from the first one's windows to this one's, in values. */
struct cursor {
    int64_t offset, left, columns, step, turn; /* left: of the row; turn: from a row's last one to the next row */
};

static inline struct cursor begin_cursor(const struct windows *v, const struct segment *s) {
    const int64_t step = v->call->stride[2] * v->call->inputs;
    return (struct cursor){0, s->columns, s->columns, step, v->call->stride[1] * v->pitch - (s->columns - 1) * step};
}

static inline void advance(struct cursor *at) {
    const bool turns = --at->left == 0;
    at->offset += turns ? at->turn : at->step;
    if (turns) at->left = at->columns;
}
