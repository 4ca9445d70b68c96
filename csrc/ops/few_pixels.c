/* Static products of few pixels with all that they see in one place, as those of a batch of one by a classifier's
 * weights: to pack the weights would take longer than the product. The kernels of dynamic products read weights as they
 * lie; they get the scale that is given in place of one that they measure, and end with the same floats. */
#include <string.h>

#include "kernels.h"
#include "static.h"

enum { FEW_PIXELS = 8, MOST_COLUMNS = 32768 /* of those kernels that pack after all */ };

bool fxq_has_few_pixels(const struct fxq_convolution *c) {
    int64_t places = 1, pixels = c->batch;
    bool is_plain = c->groups == 1 && !c->is_transposed && c->ending.curve == FXQ_NO_CURVE;
    for (int i = 0; i < FXQ_SPACE; i++) {
        places *= c->kernel[i];
        pixels *= c->out[i];
        is_plain &= c->stride[i] == 1 && c->in[i] == c->out[i] && c->before[i] == 0;
    }
    const bool is_dense = c->weight_strides[1] == 1 && c->weight_strides[0] == c->inputs;
    return is_plain && is_dense && places == 1 && pixels <= FEW_PIXELS && c->inputs <= MOST_COLUMNS;
}

/* A thread's scratch: activations and their rows, one row of x and the results in float, and what the product needs. */
struct parts {
    int64_t rows, x, y, product, end;
};

static struct fxq_weight weight_of(const struct fxq_convolution *c) {
    return (struct fxq_weight){.format = FXQ_INT8,
                               .data = c->weight,
                               .scale = c->ending.weight_scale,
                               .outputs = c->outputs,
                               .columns = c->inputs};
}

static struct parts plan_parts(const struct fxq_convolution *c) {
    const struct fxq_weight weight = weight_of(c);
    struct parts at = {.rows = fxq_aligned(fxq_activation_bytes(&weight, FEW_PIXELS))};
    at.x = at.rows + fxq_aligned(FEW_PIXELS * (int64_t)sizeof(struct fxq_row));
    at.y = at.x + fxq_aligned(c->inputs * (int64_t)sizeof(float));
    at.product = at.y + fxq_aligned(FEW_PIXELS * c->outputs * (int64_t)sizeof(float));
    at.end = at.product + fxq_product_scratch_bytes(&weight);
    return at;
}

int64_t fxq_few_pixels_bytes(const struct fxq_convolution *c) { return plan_parts(c).end; }

/* The integers of x as activations, by way of a scale of 1. */
static void take_integers(const struct fxq_convolution *c, struct fxq_activations *x, int64_t p0, float *row) {
    const int32_t zero_point = c->x_scale.zero_point;
    const struct fxq_range range = {(float)-zero_point, (float)(255 - zero_point), false};
    fxq_set_rows(x, 0, x->rows, &range);
    for (int64_t m = 0; m < x->rows; m++) {
        const uint8_t *from = c->x + (p0 + m) * c->inputs;
        for (int64_t i = 0; i < c->inputs; i++) row[i] = (float)((int32_t)from[i] - zero_point);
        fxq_quantize(x, m, 1, (const float *const[]){row});
    }
    for (int64_t m = 0; m < x->rows; m++) x->row[m].scale = c->x_scale.scale;
}

/* What becomes of `count` results, the first of which belongs at `at`: ending-inl.h says the same of sums. */
static void end_reals(const struct fxq_convolution *c, float *y, int64_t count, int64_t at) {
    const struct fxq_ending *to = &c->ending;
    for (int64_t i = 0; to->addend && i < count; i++) {
        y[i] += (float)((int32_t)to->addend[at + i] - to->addend_scale.zero_point) * to->addend_scale.scale;
    }
    for (int64_t i = 0; i < count; i++) {
        y[i] = y[i] < to->low ? to->low : y[i];
        y[i] = y[i] > to->high ? to->high : y[i];
    }
    if (to->is_float) memcpy((float *)c->y + at, y, (size_t)count * sizeof *y);
    else fxq_active->quantize_value(y, count, to->scale, to->qmax, (uint8_t *)c->y + at);
}

void fxq_multiply_few_pixels(const struct fxq_convolution *c, int64_t p0, int64_t p1, int64_t n0, int64_t n1,
                             void *scratch) {
    const struct parts at = plan_parts(c);
    const struct fxq_weight weight = weight_of(c);
    char *memory = scratch;
    float *y = (float *)(memory + at.y);
    struct fxq_activations x = {
        .rows = p1 - p0, .qmax = 255, .row = (struct fxq_row *)(memory + at.rows), .packed = memory};
    fxq_begin_activations(&x, &weight);
    if (fxq_active->begin) fxq_active->begin();
    take_integers(c, &x, p0, (float *)(memory + at.x));
    const struct fxq_matmul job = {.x = &x, .weight = &weight, .bias = c->ending.bias};
    const struct fxq_target to = {y, n1 - n0, NULL, 0};
    fxq_multiply(&job, n0, n1, &to, memory + at.product);
    if (fxq_active->end) fxq_active->end();
    for (int64_t m = p0; m < p1; m++) end_reals(c, y + (m - p0) * (n1 - n0), n1 - n0, m * c->outputs + n0);
}
