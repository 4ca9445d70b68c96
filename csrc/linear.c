/* y = x W^T + bias, with x quantized as it comes. */
#include "fxquant.h"

struct job {
    const struct fxq_linear *call;
    struct fxq_activations x;
    struct fxq_matmul matmul;
    struct fxq_range *ranges; /* one a thread, for one scale over all rows */
    char *scratch;
    int64_t scratch_bytes; /* a thread */
};

int64_t fxq_share(int64_t count, int64_t unit, int index, int parts) {
    const int64_t units = (count + unit - 1) / unit, at = units * index / parts * unit;
    return at < count ? at : count;
}

/* Every thread measures its share, then each has the same range. */
void fxq_set_common_rows(const struct fxq_linear *call, struct fxq_row *row, int64_t first, int64_t last,
                         struct fxq_range *ranges, int thread, int threads) {
    struct fxq_range range = {0.0f, 0.0f, false};
    const bool is_dense = call->x.dimensions == 1 && call->x.strides[0] == call->columns;
    const int64_t run = is_dense ? last - first : 1;
    for (int64_t m = first; m < last; m += run) fxq_active->measure(fxq_find_row(&call->x, m), run * call->columns, &range);
    ranges[thread] = range;
    fxq_barrier(threads);
    for (int i = 0; i < threads; i++) {
        const struct fxq_range *other = &ranges[i];
        range.low = other->low < range.low ? other->low : range.low;
        range.high = other->high > range.high ? other->high : range.high;
        range.is_nan |= other->is_nan;
    }
    for (int64_t m = first; m < last; m++) {
        if (call->kind == FXQ_KIND_INT16) fxq_set_int16_row(&row[m], &range);
        else fxq_set_row(&row[m], &range, call->qmax);
    }
}

static void work(void *arg, int thread, int threads) {
    struct job *job = arg;
    const struct fxq_linear *call = job->call;
    if (fxq_active->begin) fxq_active->begin();
    const int64_t m0 = fxq_share(call->rows, 16, thread, threads), m1 = fxq_share(call->rows, 16, thread + 1, threads);
    if (!call->per_row && call->kind != FXQ_KIND_FLOAT) fxq_set_common_rows(call, job->x.row, m0, m1, job->ranges, thread, threads);
    fxq_quantize_rows(&job->x, &call->x, m0, m1);
    fxq_barrier(threads);
    const int64_t n0 = fxq_share(call->outputs, 64, thread, threads), n1 = fxq_share(call->outputs, 64, thread + 1, threads);
    const struct fxq_target to = {call->out + n0, call->outputs, NULL, 0};
    if (n0 < n1) fxq_multiply(&job->matmul, n0, n1, &to, job->scratch + thread * job->scratch_bytes);
    if (fxq_active->end) fxq_active->end();
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

int fxq_linear(const struct fxq_linear *call, int threads) {
    if (call->rows == 0 || call->outputs == 0) return FXQ_OK;
    threads = fxq_worthwhile(call->rows * call->outputs * call->columns, (call->outputs + 63) / 64, threads);

    struct job job = {.call = call, .scratch_bytes = aligned(fxq_matmul_scratch_bytes(call->columns))};
    const int64_t packed = aligned(fxq_activation_bytes(call->kind, call->rows, call->columns));
    const int64_t rows = aligned(call->rows * (int64_t)sizeof(struct fxq_row));
    const int64_t ranges = aligned(threads * (int64_t)sizeof(struct fxq_range));
    char *memory = fxq_scratch(packed + rows + ranges + threads * job.scratch_bytes);
    if (memory == NULL) return FXQ_NO_MEMORY;
    const bool packs_weight =
        call->kind == FXQ_KIND_UINT8 && fxq_active->packs_weight && fxq_active->packs_weight(call->rows, call->columns, call->outputs);
    job.x = (struct fxq_activations){.rows = call->rows, .columns = call->columns, .depth = fxq_depth(call->columns),
        .qmax = call->qmax, .per_row = call->per_row, .kind = call->kind, .is_row_major = packs_weight,
        .row = (struct fxq_row *)(memory + packed), .packed = memory};
    job.ranges = (struct fxq_range *)(memory + packed + rows);
    job.scratch = memory + packed + rows + ranges;
    job.matmul = (struct fxq_matmul){.x = &job.x, .weight = call->weight, .int16 = call->weight, .halves = call->weight, .outputs = call->outputs,
        .scale = call->scale, .bias = call->bias, .relu = call->relu};
    fxq_run(work, &job, threads);
    fxq_trim_scratch();
    return FXQ_OK;
}
