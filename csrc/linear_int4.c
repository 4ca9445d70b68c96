/* y = x W^T + bias with 4-bit weights: see int4.c. */
#include "fxquant.h"

struct job {
    const struct fxq_linear *call;
    struct fxq_grouped x;
    struct fxq_int4_product product;
    struct fxq_range *ranges; /* one a thread, for one scale over all rows */
    char *own;                /* each thread's scratch */
    int64_t own_bytes;
};

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

static void work(void *arg, int thread, int threads) {
    struct job *job = arg;
    const struct fxq_linear *call = job->call;
    if (fxq_active->begin) fxq_active->begin();
    const int64_t m0 = fxq_share(call->rows, 16, thread, threads), m1 = fxq_share(call->rows, 16, thread + 1, threads);
    if (!call->per_row) fxq_set_common_rows(call, job->x.x.row, m0, m1, job->ranges, thread, threads);
    for (int64_t m = m0; m < m1; m += 16) {
        const float *rows[16];
        const int count = m1 - m < 16 ? (int)(m1 - m) : 16;
        for (int i = 0; i < count; i++) rows[i] = fxq_find_row(&call->x, m + i);
        fxq_quantize_grouped(&job->x, m, count, rows);
    }
    fxq_barrier(threads);
    const int64_t n0 = fxq_share(call->outputs, 64, thread, threads), n1 = fxq_share(call->outputs, 64, thread + 1, threads);
    const struct fxq_target to = {call->out + n0, call->outputs, NULL, 0};
    if (n0 < n1) fxq_multiply_int4(&job->product, n0, n1, &to, job->own + thread * job->own_bytes);
    if (fxq_active->end) fxq_active->end();
}

int fxq_linear_int4(const struct fxq_linear *call, int threads) {
    if (call->rows == 0 || call->outputs == 0) return FXQ_OK;
    threads = fxq_worthwhile(call->rows * call->outputs * call->columns, (call->outputs + 63) / 64, threads);

    struct job job = {.call = call};
    const int64_t chunk = fxq_int4_chunk(call->rows);
    const int64_t packed = aligned(fxq_grouped_bytes(call->rows, call->columns, call->int4.group));
    const int64_t rows = aligned(call->rows * (int64_t)sizeof(struct fxq_row));
    const int64_t ranges = aligned(threads * (int64_t)sizeof(struct fxq_range));
    job.own_bytes = call->rows <= fxq_active->most_nibble_rows ? 0 : aligned(fxq_int4_scratch_bytes(chunk, call->columns));
    char *memory = fxq_scratch(packed + rows + ranges + threads * job.own_bytes);
    if (memory == NULL) return FXQ_NO_MEMORY;
    job.x.x = (struct fxq_activations){.rows = call->rows, .columns = call->columns, .qmax = call->qmax,
        .per_row = call->per_row, .row = (struct fxq_row *)(memory + packed), .packed = memory};
    fxq_begin_grouped(&job.x, call->int4.group);
    job.product = (struct fxq_int4_product){.x = &job.x, .weight = &call->int4, .outputs = call->outputs,
        .bias = call->bias, .relu = call->relu, .chunk = chunk};
    job.ranges = (struct fxq_range *)(memory + packed + rows);
    job.own = memory + packed + rows + ranges;
    fxq_run(work, &job, threads);
    fxq_trim_scratch();
    return FXQ_OK;
}
