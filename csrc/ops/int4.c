/* Products with 4-bit weights, in groups of columns: y = ((start + p_0) + p_1) + ..., where p_g is the product of group g's
 * columns, with the rows' scales and the group's, and start is the bias or an addend.
 *
 * Where an instruction set has no form of its own for all groups in one pass (fxq_kernels), each group is a product of its
 * own, with an addend: its weights are unpacked to int8, some outputs at a time, and the int8 kernels do the rest. */
#include <string.h>

#include "fxquant.h"

enum {
    CHUNK_BYTES = 512 << 10, /* of outputs and unpacked weights, which stay in the L2 cache from group to group */
    LEAST_CHUNK = 64,
    MOST_CHUNK = 1024,
    MOST_GROUP = 128
};

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t groups_of(int64_t columns, int64_t group) { return (columns + group - 1) / group; }

static int64_t width_of(int64_t columns, int64_t group, int64_t index) {
    const int64_t left = columns - index * group;
    return left < group ? left : group;
}

static enum fxq_int4_form form_of(int64_t rows) {
    if (rows <= fxq_active->most_nibble_rows) return FXQ_NIBBLES_FORM;
    return fxq_active->matmul_groups ? FXQ_GROUPS_FORM : FXQ_SEPARATE_FORM;
}

int64_t fxq_grouped_bytes(int64_t rows, int64_t columns, int64_t group) {
    const int64_t groups = groups_of(columns, group), few = rows < fxq_active->most_nibble_rows ? rows : fxq_active->most_nibble_rows;
    const int64_t nibbles = few * (fxq_nibble_depth(columns) + groups * (int64_t)sizeof(int32_t));
    if (rows <= few) return nibbles;
    if (fxq_active->matmul_groups) return most(nibbles, (rows + 15) / 16 * 16 * fxq_depth(columns) * (int64_t)sizeof(uint16_t));
    return most(nibbles, groups * aligned(fxq_activation_bytes(FXQ_KIND_UINT8, rows, group)));
}

void fxq_begin_grouped(struct fxq_grouped *x, int64_t group) {
    x->group = group;
    x->groups = groups_of(x->x.columns, group);
    x->form = form_of(x->x.rows);
    x->group_bytes = aligned(fxq_activation_bytes(FXQ_KIND_UINT8, x->x.rows, group));
    x->less = (int32_t *)((char *)x->x.packed + x->x.rows * fxq_nibble_depth(x->x.columns));
}

static struct fxq_activations activations_of(const struct fxq_grouped *x, int64_t index) {
    struct fxq_activations part = x->x;
    part.columns = width_of(x->x.columns, x->group, index);
    part.depth = fxq_depth(part.columns);
    part.per_row = false; /* the scales of whole rows are there */
    part.is_row_major = fxq_active->packs_weight != NULL; /* many small sums leave without being transposed */
    part.packed = (char *)x->x.packed + index * x->group_bytes;
    return part;
}

void fxq_quantize_grouped(const struct fxq_grouped *x, int64_t first, int count, const float *const *rows) {
    for (int i = 0; x->x.per_row && i < count; i++) {
        struct fxq_range range = {0.0f, 0.0f, false}; /* real 0 must be exact */
        fxq_active->measure(rows[i], x->x.columns, &range);
        fxq_set_row(&x->x.row[first + i], &range, x->x.qmax);
    }
    if (x->form != FXQ_SEPARATE_FORM) {
        (x->form == FXQ_NIBBLES_FORM ? fxq_active->quantize_nibbles : fxq_active->quantize_groups)(x, first, count, rows);
        return;
    }
    for (int64_t group = 0; group < x->groups; group++) {
        const struct fxq_activations part = activations_of(x, group);
        const float *parts[16];
        for (int i = 0; i < count; i++) parts[i] = rows[i] + group * x->group;
        fxq_active->quantize(&part, first, count, parts);
    }
}

static float scale_of(uint16_t bfloat16) {
    const uint32_t bits = (uint32_t)bfloat16 << 16;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

/* Outputs [n, n + count): unpack a group of columns and its scales. */
static void unpack(const struct fxq_linear_int4 *weight, int64_t columns, int64_t n, int64_t count, int64_t group,
                   int8_t *values, float *scale) {
    const int64_t row_bytes = (columns + 1) / 2;
    const uint8_t *nibbles = weight->nibbles + n * row_bytes + group * weight->group / 2;
    fxq_active->unpack(nibbles, row_bytes, count, width_of(columns, weight->group, group), values);
    for (int64_t i = 0; i < count; i++) scale[i] = scale_of(weight->scale[(n + i) * weight->groups + group]);
}

void fxq_unpack_groups(const struct fxq_linear_int4 *weight, int64_t outputs, int64_t columns, int64_t n0, int64_t n1,
                       int8_t *values, float *scale) {
    for (int64_t group = 0; group < weight->groups; group++) {
        int8_t *to = values + group * weight->group * outputs + n0 * width_of(columns, weight->group, group);
        unpack(weight, columns, n0, n1 - n0, group, to, scale + group * outputs + n0);
    }
}

int64_t fxq_int4_chunk(int64_t rows) {
    const int64_t fits = CHUNK_BYTES / (rows * (int64_t)sizeof(float) + MOST_GROUP) / LEAST_CHUNK * LEAST_CHUNK;
    return fits < LEAST_CHUNK ? LEAST_CHUNK : fits > MOST_CHUNK ? MOST_CHUNK : fits;
}

int64_t fxq_int4_scratch_bytes(int64_t chunk, int64_t columns) {
    if (fxq_active->matmul_groups) { /* 64 outputs' unpacked weights, at most 2 bytes each, and their scales */
        return most(FXQ_PACKED_BYTES, 64 * fxq_depth(columns) * 2 * 17 / 16);
    }
    return chunk * (MOST_GROUP + (int64_t)sizeof(float)) + aligned(fxq_matmul_scratch_bytes(MOST_GROUP));
}

/* One group's product: rows [n0, n1) of `values` into out, after adding what `to` has, or for later groups out itself. */
static void multiply_group(const struct fxq_int4_product *job, int64_t group, const int8_t *values, const float *scale,
                           int64_t outputs, int64_t n0, int64_t n1, const float *bias, const struct fxq_target *to,
                           void *scratch) {
    const struct fxq_activations x = activations_of(job->x, group);
    const bool is_last = group + 1 == job->x->groups;
    const struct fxq_matmul product = {.x = &x, .weight = values, .outputs = outputs, .scale = scale,
        .bias = group == 0 ? bias : NULL, .relu = job->relu && is_last};
    const struct fxq_target sum = {to->out, to->out_stride, to->out, to->out_stride};
    fxq_active->matmul(&product, n0, n1, group ? &sum : to, scratch);
}

void fxq_multiply_int4(const struct fxq_int4_product *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                       void *scratch) {
    const struct fxq_grouped *x = job->x;
    if (x->form == FXQ_NIBBLES_FORM) {
        fxq_active->matmul_nibbles(job, n0, n1, to);
        return;
    }
    if (x->form == FXQ_GROUPS_FORM) {
        fxq_active->matmul_groups(job, n0, n1, to, scratch);
        return;
    }
    int8_t *values = scratch;
    float *scale = (float *)(values + job->chunk * MOST_GROUP);
    if (job->values) {
        for (int64_t group = 0; group < x->groups; group++) {
            multiply_group(job, group, job->values + group * x->group * job->outputs, job->scale + group * job->outputs,
                           job->outputs, n0, n1, job->bias, to, scale + job->chunk);
        }
        return;
    }
    for (int64_t n = n0; n < n1; n += job->chunk) {
        const int64_t count = n1 - n < job->chunk ? n1 - n : job->chunk;
        const struct fxq_target part = {to->out + n - n0, to->out_stride, to->addend ? to->addend + n - n0 : NULL,
                                        to->addend_stride};
        for (int64_t group = 0; group < x->groups; group++) {
            unpack(job->weight, x->x.columns, n, count, group, values, scale);
            multiply_group(job, group, values, scale, count, 0, count, job->bias ? job->bias + n : NULL, &part,
                           scale + job->chunk);
        }
    }
}
