/* y = x W^T + bias with 4-bit weights: see int4.c. */
#include "fxquant.h"

struct job {
    const struct fxq_linear *call;
    struct fxq_grouped x;
    struct fxq_int4_product product;
    struct fxq_range *ranges; /* one a piece, for one scale over all rows; NULL: a scale a row */
    int64_t row_pieces, output_pieces;
    char *own;                /* each thread's scratch */
    int64_t own_bytes;
};

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

static int64_t row_at(const struct job *job, int64_t piece) { return fxq_share(job->call->rows, 16, piece, job->row_pieces); }

static void measure(void *arg, int thread, int64_t first, int64_t last) {
    struct job *job = arg;
    (void)thread;
    for (int64_t i = first; i < last; i++) fxq_measure_rows(job->call, row_at(job, i), row_at(job, i + 1), &job->ranges[i]);
}

static void quantize(void *arg, int thread, int64_t first, int64_t last) {
    struct job *job = arg;
    const int64_t m0 = row_at(job, first), m1 = row_at(job, last);
    (void)thread;
    if (job->ranges) fxq_set_rows(job->call, job->x.x.row, m0, m1, job->ranges, job->row_pieces);
    for (int64_t m = m0; m < m1; m += 16) {
        const float *rows[16];
        const int count = m1 - m < 16 ? (int)(m1 - m) : 16;
        for (int i = 0; i < count; i++) rows[i] = fxq_find_row(&job->call->x, m + i);
        fxq_quantize_grouped(&job->x, m, count, rows);
    }
}

static void multiply(void *arg, int thread, int64_t first, int64_t last) {
    struct job *job = arg;
    const int64_t outputs = job->call->outputs;
    const int64_t n0 = fxq_share(outputs, 64, first, job->output_pieces), n1 = fxq_share(outputs, 64, last, job->output_pieces);
    const struct fxq_target to = {job->call->out + n0, outputs, NULL, 0};
    if (n0 < n1) fxq_multiply_int4(&job->product, n0, n1, &to, job->own + thread * job->own_bytes);
}

static void run(void *arg, struct fxq_team *team) {
    struct job *job = arg;
    if (fxq_active->begin) fxq_active->begin();
    if (job->ranges) fxq_round(team, job->row_pieces, measure, job);
    fxq_round(team, job->row_pieces, quantize, job);
    fxq_round(team, job->output_pieces, multiply, job);
    if (fxq_active->end) fxq_active->end();
}

int fxq_linear_int4(const struct fxq_linear *call, int threads) {
    if (call->rows == 0 || call->outputs == 0) return FXQ_OK;
    const int64_t work = call->rows * call->outputs * call->columns, strips = (call->outputs + 63) / 64;
    const struct fxq_hands hands = fxq_worthwhile(work, strips, threads);

    struct job job = {.call = call, .row_pieces = fxq_piece_count((call->rows + 15) / 16, hands),
        .output_pieces = fxq_piece_count(strips, hands)};
    const int64_t chunk = fxq_int4_chunk(call->rows);
    const int64_t packed = aligned(fxq_grouped_bytes(call->rows, call->columns, call->int4.group));
    const int64_t rows = aligned(call->rows * (int64_t)sizeof(struct fxq_row));
    const int64_t ranges = aligned(job.row_pieces * (int64_t)sizeof(struct fxq_range));
    job.own_bytes = call->rows <= fxq_active->most_nibble_rows ? 0 : aligned(fxq_int4_scratch_bytes(chunk, call->columns));
    char *memory = fxq_scratch(packed + rows + ranges + hands.threads * job.own_bytes);
    if (memory == NULL) return FXQ_NO_MEMORY;
    job.x.x = (struct fxq_activations){.rows = call->rows, .columns = call->columns, .qmax = call->qmax,
        .per_row = call->per_row, .row = (struct fxq_row *)(memory + packed), .packed = memory};
    fxq_begin_grouped(&job.x, call->int4.group);
    job.product = (struct fxq_int4_product){.x = &job.x, .weight = &call->int4, .outputs = call->outputs,
        .bias = call->bias, .relu = call->relu, .chunk = chunk};
    job.ranges = call->per_row ? NULL : (struct fxq_range *)(memory + packed + rows);
    job.own = memory + packed + rows + ranges;
    fxq_run(run, &job, hands, work);
    fxq_trim_scratch();
    return FXQ_OK;
}
