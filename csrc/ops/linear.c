/* y = x W^T + bias, with x quantized as it comes. */
#include "fxquant.h"

struct job {
    const struct fxq_linear *call;
    struct fxq_activations x;
    struct fxq_matmul matmul;
    struct fxq_range *ranges; /* one a piece, for one scale over all rows; NULL: a scale a row */
    int64_t row_pieces, output_pieces;
    char *scratch;
    int64_t scratch_bytes; /* a thread */
};

void fxq_measure_rows(const struct fxq_linear *call, int64_t first, int64_t last, struct fxq_range *range) {
    const bool is_dense = call->x.dimensions == 1 && call->x.strides[0] == call->columns;
    const int64_t run = is_dense ? last - first : 1;
    *range = (struct fxq_range){0.0f, 0.0f, false};
    for (int64_t m = first; m < last; m += run) fxq_active->measure(fxq_find_row(&call->x, m), run * call->columns, range);
}

struct fxq_range fxq_join_ranges(const struct fxq_range *ranges, int64_t count) {
    struct fxq_range range = {0.0f, 0.0f, false};
    for (int64_t i = 0; i < count; i++) {
        range.low = ranges[i].low < range.low ? ranges[i].low : range.low;
        range.high = ranges[i].high > range.high ? ranges[i].high : range.high;
        range.is_nan |= ranges[i].is_nan;
    }
    return range;
}

void fxq_set_rows(const struct fxq_linear *call, struct fxq_row *row, int64_t first, int64_t last,
                  const struct fxq_range *ranges, int64_t count) {
    const struct fxq_range range = fxq_join_ranges(ranges, count);
    for (int64_t m = first; m < last; m++) {
        if (call->kind == FXQ_KIND_INT16) fxq_set_int16_row(&row[m], &range);
        else fxq_set_row(&row[m], &range, call->qmax);
    }
}

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
    if (job->ranges) fxq_set_rows(job->call, job->x.row, m0, m1, job->ranges, job->row_pieces);
    fxq_quantize_rows(&job->x, &job->call->x, m0, m1);
}

static void multiply(void *arg, int thread, int64_t first, int64_t last) {
    struct job *job = arg;
    const int64_t outputs = job->call->outputs;
    const int64_t n0 = fxq_share(outputs, 64, first, job->output_pieces), n1 = fxq_share(outputs, 64, last, job->output_pieces);
    const struct fxq_target to = {job->call->out + n0, outputs, NULL, 0};
    if (n0 < n1) fxq_multiply(&job->matmul, n0, n1, &to, job->scratch + thread * job->scratch_bytes);
}

static void run(void *arg, struct fxq_team *team) {
    struct job *job = arg;
    if (fxq_active->begin) fxq_active->begin();
    if (job->ranges) fxq_round(team, job->row_pieces, measure, job);
    fxq_round(team, job->row_pieces, quantize, job);
    fxq_round(team, job->output_pieces, multiply, job);
    if (fxq_active->end) fxq_active->end();
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

int fxq_linear(const struct fxq_linear *call, int threads) {
    if (call->rows == 0 || call->outputs == 0) return FXQ_OK;
    const int64_t work = call->rows * call->outputs * call->columns, strips = (call->outputs + 63) / 64;
    const struct fxq_hands hands = fxq_worthwhile(work, strips, threads);

    struct job job = {.call = call, .scratch_bytes = aligned(fxq_matmul_scratch_bytes(call->columns)),
        .row_pieces = fxq_piece_count((call->rows + 15) / 16, hands), .output_pieces = fxq_piece_count(strips, hands)};
    const int64_t packed = aligned(fxq_activation_bytes(call->kind, call->rows, call->columns));
    const int64_t rows = aligned(call->rows * (int64_t)sizeof(struct fxq_row));
    const int64_t ranges = aligned(job.row_pieces * (int64_t)sizeof(struct fxq_range));
    char *memory = fxq_scratch(packed + rows + ranges + hands.threads * job.scratch_bytes);
    if (memory == NULL) return FXQ_NO_MEMORY;
    const bool packs_weight =
        call->kind == FXQ_KIND_UINT8 && fxq_active->packs_weight && fxq_active->packs_weight(call->rows, call->columns, call->outputs);
    job.x = (struct fxq_activations){.rows = call->rows, .columns = call->columns, .depth = fxq_depth(call->columns),
        .qmax = call->qmax, .per_row = call->per_row, .kind = call->kind, .is_row_major = packs_weight,
        .row = (struct fxq_row *)(memory + packed), .packed = memory};
    const bool shares_range = !call->per_row && call->kind != FXQ_KIND_FLOAT;
    job.ranges = shares_range ? (struct fxq_range *)(memory + packed + rows) : NULL;
    job.scratch = memory + packed + rows + ranges;
    job.matmul = (struct fxq_matmul){.x = &job.x, .weight = call->weight, .int16 = call->weight, .halves = call->weight, .outputs = call->outputs,
        .scale = call->scale, .bias = call->bias, .relu = call->relu};
    fxq_run(run, &job, hands, work);
    fxq_trim_scratch();
    return FXQ_OK;
}
