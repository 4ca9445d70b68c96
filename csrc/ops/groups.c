/* Products with weights that have a scale for each group of columns: y = ((start + p_0) + p_1) + ..., where p_g is the
 * product of group g's columns, with the rows' scales and the group's, and start is the bias or an addend.
 *
 * Where an instruction set has no form of its own for all groups in one pass (fxq_kernels), each group is a product of
 * its own, with an addend: its weights are unpacked to int8, some outputs at a time, and the int8 kernels do the rest.
 */
#include <string.h>

#include "kernels.h"

enum {
    CHUNK_BYTES = 512 << 10, /* of outputs and unpacked weights, which stay in the L2 cache from group to group */
    LEAST_CHUNK = 64,
    MOST_CHUNK = 1024
};

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t width_of(int64_t columns, int64_t group, int64_t index) {
    const int64_t left = columns - index * group;
    return left < group ? left : group;
}

/* From a group's activations to the next one's: 16 more rows, as of all int8 activations. */
static int64_t separate_bytes(int64_t rows, int64_t group) {
    return fxq_aligned((rows + 16) * fxq_depth(group) * fxq_active->value_bytes);
}

int64_t fxq_group_activation_bytes(const struct fxq_weight *weight, int64_t rows) {
    const int64_t columns = weight->columns,
                  few = rows < fxq_active->most_nibble_rows ? rows : fxq_active->most_nibble_rows;
    const int64_t nibbles = few * (fxq_nibble_depth(columns) + weight->groups * (int64_t)sizeof(int32_t));
    if (rows <= few) return nibbles;
    if (fxq_active->matmul_groups)
        return most(nibbles, (rows + 15) / 16 * 16 * fxq_depth(columns) * (int64_t)sizeof(uint16_t));
    return most(nibbles, weight->groups * separate_bytes(rows, weight->group));
}

void fxq_begin_groups(struct fxq_activations *x, const struct fxq_weight *weight) {
    x->group = weight->group;
    x->groups = weight->groups;
    x->group_bytes = separate_bytes(x->rows, x->group);
    x->less = (int32_t *)((char *)x->packed + x->rows * fxq_nibble_depth(x->columns));
    if (x->rows <= fxq_active->most_nibble_rows) x->form = FXQ_NIBBLE_GEMV;
    else x->form = fxq_active->matmul_groups ? FXQ_GROUPS : FXQ_SEPARATE_GROUPS;
}

static struct fxq_activations activations_of(const struct fxq_activations *x, int64_t index) {
    struct fxq_activations part = *x;
    part.form = FXQ_BYTES;
    part.columns = width_of(x->columns, x->group, index);
    part.depth = fxq_depth(part.columns);
    part.per_token = false;                               /* the scales of whole tokens are there */
    part.is_row_major = fxq_active->packs_weight != NULL; /* many small sums leave without being transposed */
    part.packed = (char *)x->packed + index * x->group_bytes;
    return part;
}

void fxq_quantize_groups(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    for (int i = 0; x->per_token && i < count; i++) {
        struct fxq_range range = {0.0f, 0.0f, false}; /* real 0 must be exact */
        fxq_active->measure(rows[i], x->columns, &range);
        fxq_set_row(&x->row[first + i], &range, x->qmax);
    }
    if (x->form != FXQ_SEPARATE_GROUPS) {
        (x->form == FXQ_NIBBLE_GEMV ? fxq_active->quantize_nibbles : fxq_active->quantize_groups)(x, first, count,
                                                                                                  rows);
        return;
    }
    for (int64_t group = 0; group < x->groups; group++) {
        const struct fxq_activations part = activations_of(x, group);
        const float *parts[16];
        for (int i = 0; i < count; i++) parts[i] = rows[i] + group * x->group;
        fxq_active->quantize(&part, first, count, parts);
    }
}

/* Rows [n, n + count) of a group of columns and its scales. */
static void unpack(const struct fxq_weight *weight, int64_t n, int64_t count, int64_t group, int8_t *values,
                   float *scale) {
    const uint16_t *bfloat16 = (const uint16_t *)weight->scale + n * weight->groups + group;
    fxq_active->unpack(weight, n, count, group * weight->group, width_of(weight->columns, weight->group, group),
                       values);
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = (uint32_t)bfloat16[i * weight->groups] << 16;
        memcpy(&scale[i], &bits, sizeof bits);
    }
}

void fxq_unpack_groups(const struct fxq_weight *weight, int64_t n0, int64_t n1, const struct fxq_unpacked *to) {
    for (int64_t group = 0; group < weight->groups; group++) {
        int8_t *values =
            to->values + group * weight->group * weight->outputs + n0 * width_of(weight->columns, weight->group, group);
        unpack(weight, n0, n1 - n0, group, values, to->scale + group * weight->outputs + n0);
    }
}

int64_t fxq_group_scratch_bytes(const struct fxq_weight *weight) {
    if (fxq_active->matmul_groups) { /* 64 outputs' unpacked weights, at most 2 bytes each, and their scales */
        return most(FXQ_PACKED_BYTES, 64 * fxq_depth(weight->columns) * 2 * 17 / 16);
    }
    const struct fxq_weight part = {.columns = FXQ_MOST_GROUP};
    return MOST_CHUNK * (FXQ_MOST_GROUP + (int64_t)sizeof(float)) + fxq_product_scratch_bytes(&part);
}

/* One group's product with outputs [n0, n1) of what is unpacked of it, into `to`, or for later groups added to what is
 * there. */
static void multiply_group(const struct fxq_matmul *job, int64_t group, const struct fxq_weight *unpacked,
                           const float *bias, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch) {
    const struct fxq_activations x = activations_of(job->x, group);
    const struct fxq_matmul product = {.x = &x,
                                       .weight = unpacked,
                                       .bias = group == 0 ? bias : NULL,
                                       .relu = job->relu && group + 1 == job->x->groups};
    const struct fxq_target sum = {to->out, to->out_stride, to->out, to->out_stride};
    fxq_active->matmul(&product, n0, n1, group ? &sum : to, scratch);
}

/* `outputs` rows of a group as a weight of its own. */
static struct fxq_weight group_of(const struct fxq_matmul *job, int64_t group, int64_t outputs, const int8_t *values,
                                  const float *scale) {
    return (struct fxq_weight){.format = FXQ_INT8,
                               .data = values,
                               .scale = scale,
                               .outputs = outputs,
                               .columns = width_of(job->x->columns, job->x->group, group)};
}

static void multiply_separately(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                                void *scratch) {
    const int64_t groups = job->x->groups, outputs = job->weight->outputs,
                  row_bytes = job->x->rows * (int64_t)sizeof(float);
    const int64_t fits = CHUNK_BYTES / (row_bytes + FXQ_MOST_GROUP) / LEAST_CHUNK * LEAST_CHUNK;
    const int64_t chunk = fxq_clamp(fits, LEAST_CHUNK, MOST_CHUNK);
    int8_t *values = scratch;
    float *scale = (float *)(values + MOST_CHUNK * FXQ_MOST_GROUP);
    const struct fxq_unpacked *all = job->unpacked && job->unpacked->values ? job->unpacked : NULL;
    for (int64_t group = 0; all && group < groups; group++) {
        const struct fxq_weight weight =
            group_of(job, group, outputs, all->values + group * job->x->group * outputs, all->scale + group * outputs);
        multiply_group(job, group, &weight, job->bias, n0, n1, to, scale + MOST_CHUNK);
    }
    for (int64_t n = n0; !all && n < n1; n += chunk) {
        const int64_t count = n1 - n < chunk ? n1 - n : chunk;
        const struct fxq_target part = fxq_target_at(to, 0, n - n0);
        for (int64_t group = 0; group < groups; group++) {
            const struct fxq_weight weight = group_of(job, group, count, values, scale);
            unpack(job->weight, n, count, group, values, scale);
            multiply_group(job, group, &weight, job->bias ? job->bias + n : NULL, 0, count, &part, scale + MOST_CHUNK);
        }
    }
}

void fxq_multiply_groups(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to,
                         void *scratch) {
    if (job->x->form == FXQ_NIBBLE_GEMV) fxq_active->matmul_nibbles(job, n0, n1, to);
    else if (job->x->form == FXQ_GROUPS) fxq_active->matmul_groups(job, n0, n1, to, scratch);
    else multiply_separately(job, n0, n1, to, scratch);
}
