/* Static quantization's operators that move integers: padding, interpolation, a table for each channel. Shared among
 * threads; plain C, since memory bounds them. */
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "runtime/pool.h"

struct job {
    const void *call;
    int64_t rows, pieces;
};

/* Shares rows of `bytes` bytes each; work: of all. */
static void split(fxq_pieces fn, const void *call, int64_t rows, int64_t work, int threads) {
    struct job job = {.call = call, .rows = rows};
    const struct fxq_hands hands = fxq_worthwhile(work, rows, threads);
    if (rows == 0) return;
    job.pieces = fxq_piece_count(rows, hands);
    fxq_split(fn, &job, job.pieces, hands, work);
}

static int64_t row_at(const struct job *job, int64_t piece) { return fxq_share(job->rows, 1, piece, job->pieces); }

/* One row of outputs: padding, what is there of an input row, padding. */
static void pad_row(const struct fxq_pad *c, int64_t row) {
    const int64_t i1 = row % c->out[1] - c->before[1], i0 = row / c->out[1] % c->out[0] - c->before[0],
                  image = row / c->out[1] / c->out[0], width = c->channels, size = c->out[2];
    uint8_t *y = c->y + row * size * width;
    int64_t left = c->before[2] < 0 ? 0 : c->before[2], end = c->in[2] + c->before[2];
    if (end > size) end = size;
    if (i0 < 0 || i0 >= c->in[0] || i1 < 0 || i1 >= c->in[1] || left >= end) {
        memset(y, c->zero_point, (size_t)(size * width));
        return;
    }
    const uint8_t *x = c->x + (((image * c->in[0] + i0) * c->in[1] + i1) * c->in[2] + left - c->before[2]) * width;
    memset(y, c->zero_point, (size_t)(left * width));
    memcpy(y + left * width, x, (size_t)((end - left) * width));
    memset(y + end * width, c->zero_point, (size_t)((size - end) * width));
}

static void pad(void *arg, int thread, int64_t first, int64_t last) {
    const struct job *job = arg;
    (void)thread;
    for (int64_t row = row_at(job, first), end = row_at(job, last); row < end; row++) pad_row(job->call, row);
}

void fxq_pad_value(const struct fxq_pad *call, int threads) {
    const int64_t rows = call->batch * call->out[0] * call->out[1];
    split(pad, call, rows, 4 * rows * call->out[2] * call->channels, threads);
}

/* Where an output lies between two inputs. */
struct between {
    int64_t before, after;
    float share; /* of the second */
};

static struct between between_of(const struct fxq_resize *c, int i, int64_t out) {
    const int64_t last = c->in[i] - 1;
    double place = c->aligns_corners ? (double)out * c->step[i] : ((double)out + 0.5) * c->step[i] - 0.5;
    if (place < 0.0) place = 0.0;
    const double whole = floor(place), first = whole > (double)last ? (double)last : whole;
    const int64_t before = (int64_t)first;
    return (struct between){before, before < last ? before + 1 : last, (float)(place - first)};
}

static inline float blend(float a, float b, float share) { return a * (1.0f - share) + b * share; }

/* Channels of one pixel, from eight neighbours or, where the first dimension is none, from four. */
static void blend_pixel(const uint8_t *const *near, const uint8_t *const *far, const float *shares, int64_t channels,
                        uint8_t *restrict y) {
    const uint8_t *a = near[0], *b = near[1], *c = near[2], *d = near[3];
    for (int64_t i = 0; i < channels; i++) {
        float v = blend(blend(a[i], b[i], shares[2]), blend(c[i], d[i], shares[2]), shares[1]);
        if (far) {
            const float w =
                blend(blend(far[0][i], far[1][i], shares[2]), blend(far[2][i], far[3][i], shares[2]), shares[1]);
            v = blend(v, w, shares[0]);
        }
        y[i] = (uint8_t)(int32_t)(v + 8388608.0f - 8388608.0f); /* 2^23: what is added to it is rounded half to even */
    }
}

static void resize_row(const struct fxq_resize *c, int64_t row) {
    const struct between d1 = between_of(c, 1, row % c->out[1]), d0 = between_of(c, 0, row / c->out[1] % c->out[0]);
    const int64_t image = row / c->out[1] / c->out[0], width = c->channels, line = c->in[2] * width;
    const uint8_t *x = c->x + image * c->in[0] * c->in[1] * line;
    const uint8_t *const lines[4] = {
        x + (d0.before * c->in[1] + d1.before) * line, x + (d0.before * c->in[1] + d1.after) * line,
        x + (d0.after * c->in[1] + d1.before) * line, x + (d0.after * c->in[1] + d1.after) * line};
    uint8_t *y = c->y + row * c->out[2] * width;
    const bool is_deep = c->in[0] > 1 || c->out[0] > 1;
    for (int64_t o = 0; o < c->out[2]; o++) {
        const struct between d2 = between_of(c, 2, o);
        const uint8_t *places[8];
        for (int i = 0; i < 4; i++) {
            places[2 * i] = lines[i] + d2.before * width;
            places[2 * i + 1] = lines[i] + d2.after * width;
        }
        const float shares[FXQ_SPACE] = {d0.share, d1.share, d2.share};
        blend_pixel(places, is_deep ? places + 4 : NULL, shares, width, y + o * width);
    }
}

static void resize(void *arg, int thread, int64_t first, int64_t last) {
    const struct job *job = arg;
    (void)thread;
    for (int64_t row = row_at(job, first), end = row_at(job, last); row < end; row++) resize_row(job->call, row);
}

void fxq_resize_value(const struct fxq_resize *call, int threads) {
    const int64_t rows = call->batch * call->out[0] * call->out[1];
    split(resize, call, rows, 64 * rows * call->out[2] * (call->channels + 8), threads);
}

/* Rows: of a channel's pixels each, or of a pixel's channels. */
static void look_up(void *arg, int thread, int64_t first, int64_t last) {
    const struct job *job = arg;
    const struct fxq_tables *c = job->call;
    const int64_t length = c->by_rows ? c->pixels : c->channels;
    (void)thread;
    for (int64_t row = row_at(job, first), end = row_at(job, last); row < end; row++) {
        const uint8_t *q = c->q + row * length;
        uint8_t *out = c->out + row * length;
        if (c->by_rows) fxq_active->look_up(q, length, c->tables + row % c->channels * 256, out);
        else {
            for (int64_t i = 0; i < length; i++) out[i] = c->tables[i * 256 + q[i]];
        }
    }
}

void fxq_look_up_channels(const struct fxq_tables *call, int threads) {
    const int64_t rows = call->images * (call->by_rows ? call->channels : call->pixels);
    split(look_up, call, rows, 32 * call->images * call->channels * call->pixels, threads);
}
