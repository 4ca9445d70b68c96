/* Static quantization's operators on single values and on pools' windows, shared among threads. */
#include "kernels.h"
#include "runtime/pool.h"

enum { CHUNK = 4096 }; /* values that a thread takes at a time */

/* One of the operators on single values. */
struct job {
    const void *x;
    void *y;
    int64_t count, pieces;
    struct fxq_scale scale;
    int qmax;
    const uint8_t *table;
};

static int64_t value_at(const struct job *job, int64_t piece) { return fxq_share(job->count, 64, piece, job->pieces); }

static void quantize(void *arg, int thread, int64_t first, int64_t last) {
    const struct job *job = arg;
    const int64_t from = value_at(job, first), to = value_at(job, last);
    (void)thread;
    fxq_active->quantize_value((const float *)job->x + from, to - from, job->scale, job->qmax,
                               (uint8_t *)job->y + from);
}

static void dequantize(void *arg, int thread, int64_t first, int64_t last) {
    const struct job *job = arg;
    const int64_t from = value_at(job, first), to = value_at(job, last);
    (void)thread;
    fxq_active->dequantize_value((const uint8_t *)job->x + from, to - from, job->scale, (float *)job->y + from);
}

static void look_up(void *arg, int thread, int64_t first, int64_t last) {
    const struct job *job = arg;
    const int64_t from = value_at(job, first), to = value_at(job, last);
    (void)thread;
    fxq_active->look_up((const uint8_t *)job->x + from, to - from, job->table, (uint8_t *)job->y + from);
}

/* A value takes about as long as a few multiplications of a product. */
static void split(fxq_pieces fn, struct job *job, int64_t work, int threads) {
    const int64_t parts = (job->count + CHUNK - 1) / CHUNK;
    const struct fxq_hands hands = fxq_worthwhile(work, parts, threads);
    job->pieces = fxq_piece_count(parts, hands);
    if (job->count) fxq_split(fn, job, job->pieces, hands, work);
}

void fxq_quantize_value(const float *x, int64_t count, struct fxq_scale scale, int qmax, uint8_t *q, int threads) {
    struct job job = {.x = x, .y = q, .count = count, .scale = scale, .qmax = qmax};
    split(quantize, &job, 16 * count, threads);
}

void fxq_dequantize_value(const uint8_t *q, int64_t count, struct fxq_scale scale, float *x, int threads) {
    struct job job = {.x = q, .y = x, .count = count, .scale = scale};
    split(dequantize, &job, 16 * count, threads);
}

void fxq_look_up(const uint8_t *q, int64_t count, const uint8_t *table, uint8_t *out, int threads) {
    struct job job = {.x = q, .y = out, .count = count, .table = table};
    split(look_up, &job, 32 * count, threads);
}

/* A pair, by rows: all values, or a pixel's channels each. */
struct pair_job {
    const struct fxq_pair *call;
    int64_t pieces, rows, length;
};

static void combine(void *arg, int thread, int64_t first, int64_t last) {
    const struct pair_job *job = arg;
    const struct fxq_pair *c = job->call;
    (void)thread;
    const int64_t begin = fxq_share(job->rows, job->length > 1 ? 1 : 64, first, job->pieces),
                  end = fxq_share(job->rows, job->length > 1 ? 1 : 64, last, job->pieces);
    if (!c->is_shared) {
        fxq_active->combine(c, c->a + begin, c->b + begin, end - begin, c->out + begin);
        return;
    }
    for (int64_t p = begin; p < end; p++) {
        const int64_t at = p * c->channels;
        fxq_active->combine(c, c->a + at, c->b + p / c->pixels * c->channels, c->channels, c->out + at);
    }
}

void fxq_combine(const struct fxq_pair *call, int threads) {
    const int64_t count = call->images * call->pixels * call->channels, work = 24 * count;
    struct pair_job job = {.call = call, .length = call->is_shared ? call->channels : 1};
    if (count == 0) return;
    job.rows = count / job.length;
    const int64_t parts = (count + CHUNK - 1) / CHUNK < job.rows ? (count + CHUNK - 1) / CHUNK : job.rows;
    const struct fxq_hands hands = fxq_worthwhile(work, parts, threads);
    job.pieces = fxq_piece_count(parts, hands);
    fxq_split(combine, &job, job.pieces, hands, work);
}

struct pool_job {
    const struct fxq_pool *call;
    int64_t pixels, pieces;
};

static void pool(void *arg, int thread, int64_t first, int64_t last) {
    const struct pool_job *job = arg;
    (void)thread;
    fxq_active->pool_pixels(job->call, fxq_share(job->pixels, 1, first, job->pieces),
                            fxq_share(job->pixels, 1, last, job->pieces));
}

int fxq_pool_windows(const struct fxq_pool *call, int threads) {
    const int64_t window = call->kernel[0] * call->kernel[1] * call->kernel[2];
    struct pool_job job = {.call = call, .pixels = call->batch * call->out[0] * call->out[1] * call->out[2]};
    if (job.pixels == 0 || call->channels == 0) return FXQ_OK;
    const int64_t work = 4 * job.pixels * call->channels * (window + 4);
    const struct fxq_hands hands = fxq_worthwhile(work, job.pixels, threads);
    job.pieces = fxq_piece_count(job.pixels, hands);
    fxq_split(pool, &job, job.pieces, hands, work);
    return FXQ_OK;
}
