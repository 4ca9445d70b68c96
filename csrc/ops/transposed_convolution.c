/* Transposed static convolutions, of the kernels of ordinary ones.
 *
 * With a stride of s, every s-th output meets the same places of the kernel. So the outputs that begin at one of the
 * first s are an ordinary convolution of stride 1, of the part of the kernel that they meet, turned round: a phase.
 * Each phase is computed by itself, and its pixels then go to their places. */
#include <string.h>

#include "kernels.h"
#include "runtime/pool.h"

/* The first of so many outputs, in one dimension, and the places of the kernel that they meet: from `tap` on, so many,
 * `step` from one to the next. */
struct meeting {
    int64_t outputs, tap, count, step;
};

static struct meeting meet(const struct fxq_convolution *c, int i, int64_t first) {
    const int64_t stride = c->stride[i], dilation = c->dilation[i];
    struct meeting m = {.outputs = (c->out[i] - first + stride - 1) / stride, .step = 1};
    while (m.step * dilation % stride) m.step++;
    while (m.tap < m.step && (m.tap * dilation - first - c->before[i]) % stride) m.tap++;
    m.count = m.tap < m.step && m.tap < c->kernel[i] ? (c->kernel[i] - m.tap + m.step - 1) / m.step : 0;
    return m;
}

/* The convolution of the outputs from `first` on; where they meet nothing, of pixels that are all padding. */
static struct fxq_convolution phase_of(const struct fxq_convolution *call, const int64_t *first) {
    struct fxq_convolution c = *call;
    c.is_transposed = false;
    for (int i = 0; i < FXQ_SPACE; i++) {
        const struct meeting m = meet(call, i, first[i]);
        c.stride[i] = 1;
        c.out[i] = m.outputs > 0 ? m.outputs : 0;
        c.kernel[i] = m.count ? m.count : 1;
        c.dilation[i] = m.count ? m.step * call->dilation[i] / call->stride[i] : 1;
        c.weight_strides[2 + i] = -m.step * call->weight_strides[2 + i];
        c.before[i] = c.in[i] + c.out[i];
        if (m.count == 0) continue;
        c.weight += (m.tap + m.step * (m.count - 1)) * call->weight_strides[2 + i];
        const int64_t at = (first[i] + call->before[i] - m.tap * call->dilation[i]) / call->stride[i];
        c.before[i] = c.dilation[i] * (m.count - 1) - at;
    }
    return c;
}

static int64_t pixels_of(const struct fxq_convolution *c) { return c->batch * c->out[0] * c->out[1] * c->out[2]; }

static bool next_phase(const struct fxq_convolution *c, int64_t *first) {
    for (int i = FXQ_SPACE - 1; i >= 0; i--) {
        if (++first[i] < c->stride[i]) return true;
        first[i] = 0;
    }
    return false;
}

struct fxq_transposed_bytes fxq_transposed_bytes(const struct fxq_convolution *call) {
    struct fxq_transposed_bytes bytes = {0, 0, 0};
    int64_t first[FXQ_SPACE] = {0};
    do {
        const struct fxq_convolution c = phase_of(call, first);
        const int64_t own = fxq_convolution_bytes(&c), values = fxq_aligned(pixels_of(&c) * c.outputs);
        if (own > bytes.thread) bytes.thread = own;
        if (values > bytes.addend) bytes.addend = values;
    } while (next_phase(call, first));
    bytes.output = bytes.addend * (call->ending.is_float ? (int64_t)sizeof(float) : 1);
    return bytes;
}

/* Pixels of a phase, and where they belong. */
struct move {
    const struct fxq_convolution *call, *phase;
    const int64_t *first;
    char *whole, *part;
    int64_t bytes, rows, pieces; /* bytes: a pixel */
    bool takes;                  /* from the whole to the part */
};

static void move_rows(void *arg, int thread, int64_t first, int64_t last) {
    const struct move *m = arg;
    const int64_t *out = m->call->out, *stride = m->call->stride, *part = m->phase->out;
    const int64_t end = fxq_share(m->rows, 1, last, m->pieces);
    (void)thread;
    for (int64_t row = fxq_share(m->rows, 1, first, m->pieces); row < end; row++) {
        const int64_t plane = row / part[1], image = plane / part[0];
        const int64_t depth = plane % part[0] * stride[0] + m->first[0], h = row % part[1] * stride[1] + m->first[1];
        char *whole = m->whole + (((image * out[0] + depth) * out[1] + h) * out[2] + m->first[2]) * m->bytes;
        char *own = m->part + row * part[2] * m->bytes;
        for (int64_t w = 0; w < part[2]; w++, whole += stride[2] * m->bytes, own += m->bytes) {
            if (m->takes) memcpy(own, whole, (size_t)m->bytes);
            else memcpy(whole, own, (size_t)m->bytes);
        }
    }
}

static void move(struct move m, int threads) {
    m.rows = m.phase->batch * m.phase->out[0] * m.phase->out[1];
    const int64_t work = 4 * m.rows * m.phase->out[2] * m.bytes;
    const struct fxq_hands hands = fxq_worthwhile(work, m.rows, threads);
    m.pieces = fxq_piece_count(m.rows, hands);
    fxq_split(move_rows, &m, m.pieces, hands, work);
}

void fxq_convolve_transposed(const struct fxq_convolution *call, int threads, char *scratch,
                             const struct fxq_transposed_bytes *bytes, char *shared) {
    int64_t first[FXQ_SPACE] = {0};
    const int64_t size = call->outputs * (call->ending.is_float ? (int64_t)sizeof(float) : 1);
    char *addend = shared + bytes->output;
    do {
        struct fxq_convolution c = phase_of(call, first);
        if (pixels_of(&c) == 0) continue;
        struct move m = {.call = call, .phase = &c, .first = first, .part = addend, .bytes = call->outputs};
        if (call->ending.addend) {
            m.takes = true;
            m.whole = (char *)(uintptr_t)call->ending.addend;
            move(m, threads);
            c.ending.addend = (const uint8_t *)addend;
        }
        c.y = shared;
        fxq_convolve_in(&c, threads, scratch, bytes->thread);
        m.takes = false, m.whole = call->y, m.part = shared, m.bytes = size;
        move(m, threads);
    } while (next_phase(call, first));
}

struct job {
    const struct fxq_convolution *call;
    struct fxq_transposed_bytes bytes;
    char *scratch, *shared;
};

static void run(void *arg, struct fxq_team *team) {
    const struct job *job = arg;
    fxq_split_within(team);
    fxq_convolve_transposed(job->call, team->threads, job->scratch, &job->bytes, job->shared);
    fxq_split_within(NULL);
}

int fxq_convolve_phases(const struct fxq_convolution *call, int threads) {
    struct job job = {.call = call, .bytes = fxq_transposed_bytes(call)};
    const int64_t work = fxq_convolution_work(call);
    if (pixels_of(call) == 0 || call->outputs == 0) return FXQ_OK;
    const struct fxq_hands hands = fxq_worthwhile(work, FXQ_MOST_THREADS, threads);
    job.scratch = fxq_scratch(hands.threads * job.bytes.thread + job.bytes.output + job.bytes.addend);
    if (job.scratch == NULL) return FXQ_NO_MEMORY;
    job.shared = job.scratch + hands.threads * job.bytes.thread;
    fxq_run(run, &job, hands, work);
    fxq_trim_scratch();
    return FXQ_OK;
}
