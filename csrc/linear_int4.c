/* y = x W^T + bias with 4-bit weights, in groups of columns: y = ((bias + p_0) + p_1) + ..., where p_g is the product of
 * group g's columns, with the rows' scales and the group's.
 *
 * So each group is a product of its own, with an addend. Where an instruction set has no better way, its weights are
 * unpacked to int8, some outputs at a time, and the int8 kernels do the rest. */
#include <string.h>

#include "fxquant.h"

enum {
    CHUNK_BYTES = 512 << 10, /* of outputs and unpacked weights, which stay in the L2 cache from group to group */
    LEAST_CHUNK = 64,
    MOST_CHUNK = 1024
};

struct job {
    const struct fxq_linear *call;
    struct fxq_row *row;
    struct fxq_range *ranges; /* one a thread, for one scale over all rows */
    struct fxq_nibble_product nibbles;
    char *packed; /* a group's activations after another's */
    int64_t packed_bytes, chunk;
    char *own; /* each thread's: unpacked weights, their scales, the matmul's scratch */
    int64_t own_bytes;
};

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

static int64_t width_of(const struct fxq_linear *call, int64_t group) {
    const int64_t left = call->columns - group * call->int4.group;
    return left < call->int4.group ? left : call->int4.group;
}

static struct fxq_activations activations_of(const struct job *job, int64_t group) {
    const int64_t columns = width_of(job->call, group);
    return (struct fxq_activations){.rows = job->call->rows, .columns = columns, .depth = fxq_depth(columns),
        .qmax = job->call->qmax, .per_row = false,
        .is_row_major = fxq_active->packs_weight != NULL, /* many small sums leave without being transposed */
        .row = job->row, .packed = job->packed + group * job->packed_bytes};
}

static void set_rows(const struct job *job, int64_t first, int64_t last, int thread, int threads) {
    const struct fxq_linear *call = job->call;
    if (!call->per_row) {
        fxq_set_common_rows(call, job->row, first, last, job->ranges, thread, threads);
        return;
    }
    for (int64_t m = first; m < last; m++) {
        struct fxq_range range = {0.0f, 0.0f, false}; /* real 0 must be exact */
        fxq_active->measure(call->x + m * call->columns, call->columns, &range);
        fxq_set_row(&job->row[m], &range, call->qmax);
    }
}

static float scale_of(uint16_t bfloat16) {
    const uint32_t bits = (uint32_t)bfloat16 << 16;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

/* Outputs [n, n + count): unpack a group of columns and its scales. */
static void unpack(const struct fxq_linear *call, int64_t n, int64_t count, int64_t group, int8_t *weight, float *scale) {
    const int64_t columns = width_of(call, group), row_bytes = (call->columns + 1) / 2;
    const uint8_t *nibbles = call->int4.nibbles + n * row_bytes + group * call->int4.group / 2;
    fxq_active->unpack(nibbles, row_bytes, count, columns, weight);
    for (int64_t i = 0; i < count; i++) scale[i] = scale_of(call->int4.scale[(n + i) * call->int4.groups + group]);
}

static void multiply_groups(const struct job *job, int64_t n0, int64_t n1, char *own) {
    const struct fxq_linear *call = job->call;
    int8_t *weight = (int8_t *)own;
    float *scale = (float *)(own + job->chunk * call->int4.group);
    for (int64_t n = n0; n < n1; n += job->chunk) {
        const int64_t count = n1 - n < job->chunk ? n1 - n : job->chunk;
        for (int64_t group = 0; group < call->int4.groups; group++) {
            unpack(call, n, count, group, weight, scale);
            const struct fxq_activations x = activations_of(job, group);
            const struct fxq_matmul product = {.x = &x, .weight = weight, .outputs = count, .scale = scale,
                .bias = group == 0 && call->bias ? call->bias + n : NULL,
                .relu = call->relu && group + 1 == call->int4.groups};
            const struct fxq_target to = {call->out + n, call->outputs, group ? call->out + n : NULL, call->outputs};
            fxq_active->matmul(&product, 0, count, &to, scale + job->chunk);
        }
    }
}

static bool is_nibble_form(const struct fxq_linear *call) { return call->rows <= fxq_active->most_nibble_rows; }

static void work(void *arg, int thread, int threads) {
    struct job *job = arg;
    const struct fxq_linear *call = job->call;
    if (fxq_active->begin) fxq_active->begin();
    const int64_t m0 = fxq_share(call->rows, 16, thread, threads), m1 = fxq_share(call->rows, 16, thread + 1, threads);
    set_rows(job, m0, m1, thread, threads);
    if (is_nibble_form(call)) fxq_active->quantize_nibbles(&job->nibbles, m0, m1);
    for (int64_t group = 0; group < call->int4.groups && !is_nibble_form(call); group++) {
        const struct fxq_activations x = activations_of(job, group);
        fxq_quantize_rows(&x, call->x + group * call->int4.group, call->columns, m0, m1);
    }
    fxq_barrier(threads);
    const int64_t n0 = fxq_share(call->outputs, 64, thread, threads), n1 = fxq_share(call->outputs, 64, thread + 1, threads);
    if (n0 < n1 && is_nibble_form(call)) fxq_active->matmul_nibbles(&job->nibbles, n0, n1);
    else if (n0 < n1) multiply_groups(job, n0, n1, job->own + thread * job->own_bytes);
    if (fxq_active->end) fxq_active->end();
}

static int64_t choose_chunk(const struct fxq_linear *call) {
    const int64_t each = call->rows * (int64_t)sizeof(float) + call->int4.group;
    const int64_t fits = CHUNK_BYTES / each / LEAST_CHUNK * LEAST_CHUNK;
    return fits < LEAST_CHUNK ? LEAST_CHUNK : fits > MOST_CHUNK ? MOST_CHUNK : fits;
}

int fxq_linear_int4(const struct fxq_linear *call, int threads) {
    if (call->rows == 0 || call->outputs == 0) return FXQ_OK;
    threads = fxq_worthwhile(call->rows * call->outputs * call->columns, (call->outputs + 63) / 64, threads);

    struct job job = {.call = call, .chunk = choose_chunk(call)};
    const int64_t group = call->int4.group, groups = call->int4.groups, depth = fxq_nibble_depth(call->columns);
    const bool is_nibbles = is_nibble_form(call);
    job.packed_bytes = aligned(fxq_packed_bytes(call->rows, group));
    const int64_t packed = is_nibbles ? call->rows * depth : groups * job.packed_bytes;
    const int64_t less = is_nibbles ? aligned(call->rows * groups * (int64_t)sizeof(int32_t)) : 0;
    const int64_t rows = aligned(call->rows * (int64_t)sizeof(struct fxq_row));
    const int64_t ranges = aligned(threads * (int64_t)sizeof(struct fxq_range));
    job.own_bytes = is_nibbles ? 0 : job.chunk * (group + (int64_t)sizeof(float)) + aligned(fxq_matmul_scratch_bytes(group));
    char *memory = fxq_scratch(packed + less + rows + ranges + threads * job.own_bytes);
    if (memory == NULL) return FXQ_NO_MEMORY;
    job.packed = memory;
    job.row = (struct fxq_row *)(memory + packed + less);
    job.nibbles = (struct fxq_nibble_product){call, job.row, (int8_t *)memory, (int32_t *)(memory + packed)};
    job.ranges = (struct fxq_range *)(memory + packed + less + rows);
    job.own = memory + packed + less + rows + ranges;
    fxq_run(work, &job, threads);
    fxq_trim_scratch();
    return FXQ_OK;
}
