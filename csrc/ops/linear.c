/* y = x W^T + bias, with x quantized as it comes. */
#include "kernels.h"
#include "runtime/pool.h"

struct job {
    const struct fxq_linear *call;
    struct fxq_activations x;
    struct fxq_matmul matmul;
    struct fxq_range *ranges; /* one a piece, for one scale over all of x; NULL: a scale a token */
    int64_t row_pieces, output_pieces;
    char *scratch;
    int64_t scratch_bytes; /* a thread */
};

static int64_t row_at(const struct job *job, int64_t piece) {
    return fxq_share(job->call->rows, 16, piece, job->row_pieces);
}

static void measure_rows(const struct fxq_linear *call, int64_t first, int64_t last, struct fxq_range *range) {
    const int64_t columns = call->weight.columns;
    const int64_t run = call->x.dimensions == 1 && call->x.strides[0] == columns ? last - first : 1;
    *range = (struct fxq_range){0.0f, 0.0f, false};
    for (int64_t m = first; m < last; m += run) fxq_active->measure(fxq_find_row(&call->x, m), run * columns, range);
}

static void measure(void *arg, int thread, int64_t first, int64_t last) {
    struct job *job = arg;
    (void)thread;
    for (int64_t i = first; i < last; i++) measure_rows(job->call, row_at(job, i), row_at(job, i + 1), &job->ranges[i]);
}

static void quantize(void *arg, int thread, int64_t first, int64_t last) {
    struct job *job = arg;
    const int64_t m0 = row_at(job, first), m1 = row_at(job, last);
    (void)thread;
    if (job->ranges) {
        const struct fxq_range range = fxq_join_ranges(job->ranges, job->row_pieces);
        fxq_set_rows(&job->x, m0, m1, &range);
    }
    fxq_quantize_rows(&job->x, &job->call->x, m0, m1);
}

static void multiply(void *arg, int thread, int64_t first, int64_t last) {
    struct job *job = arg;
    const int64_t outputs = job->call->weight.outputs;
    const int64_t n0 = fxq_share(outputs, 64, first, job->output_pieces),
                  n1 = fxq_share(outputs, 64, last, job->output_pieces);
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

int fxq_linear(const struct fxq_linear *call, int threads) {
    const struct fxq_weight *weight = &call->weight;
    const int64_t outputs = weight->outputs, columns = weight->columns, strips = (outputs + 63) / 64;
    if (call->rows == 0 || outputs == 0) return FXQ_OK;
    const int64_t work = call->rows * outputs * columns;
    const struct fxq_hands hands = fxq_worthwhile(work, strips, threads);

    struct job job = {.call = call,
                      .scratch_bytes = fxq_product_scratch_bytes(weight),
                      .row_pieces = fxq_piece_count((call->rows + 15) / 16, hands),
                      .output_pieces = fxq_piece_count(strips, hands)};
    const int64_t packed = fxq_aligned(fxq_activation_bytes(weight, call->rows));
    const int64_t rows = fxq_aligned(call->rows * (int64_t)sizeof(struct fxq_row));
    const int64_t ranges = fxq_aligned(job.row_pieces * (int64_t)sizeof(struct fxq_range));
    char *memory = fxq_scratch(packed + rows + ranges + hands.threads * job.scratch_bytes);
    if (memory == NULL) return FXQ_NO_MEMORY;
    job.x = (struct fxq_activations){.rows = call->rows,
                                     .qmax = call->qmax,
                                     .per_token = call->per_token,
                                     .row = (struct fxq_row *)(memory + packed),
                                     .packed = memory};
    fxq_begin_activations(&job.x, weight);
    if (job.x.form == FXQ_BYTES && fxq_active->packs_weight)
        job.x.is_row_major = fxq_active->packs_weight(call->rows, columns, outputs);
    if (!call->per_token && job.x.form != FXQ_FLOATS) job.ranges = (struct fxq_range *)(memory + packed + rows);
    job.scratch = memory + packed + rows + ranges;
    job.matmul = (struct fxq_matmul){.x = &job.x, .weight = weight, .bias = call->bias, .relu = call->relu};
    fxq_run(run, &job, hands, work);
    fxq_trim_scratch();
    return FXQ_OK;
}
