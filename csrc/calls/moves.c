/* The module's calls of static quantization's operators that move integers, and of a table for each channel. */
#include "calls/calls.h"
#include "calls/layout.h"

/* An input whose channels are its second dimension, and how it lies: pixel by pixel, or else row by row, each channel
 * as an image of its own. */
struct image {
    struct tensor x;
    bool by_pixels;
    int rank;
    int64_t batch, channels, in[FXQ_SPACE];
};

static bool read_image(object value, struct image *image) {
    struct tensor *x = &image->x;
    if (!read_strided(value, x) || x->dtype != UINT8 || x->dimensions < 3 || x->dimensions > 2 + FXQ_SPACE ||
        x->count == 0) {
        return false;
    }
    lies_by_pixels(x, &image->by_pixels);
    if (!image->by_pixels && !read_tensor(value, x)) return false;
    image->rank = x->dimensions - 2;
    image->batch = image->by_pixels ? x->shape[0] : x->shape[0] * x->shape[1];
    image->channels = image->by_pixels ? x->shape[1] : 1;
    for (int i = 0; i < FXQ_SPACE; i++) image->in[i] = 1;
    for (int i = 2; i < x->dimensions; i++) image->in[FXQ_SPACE - x->dimensions + i] = x->shape[i];
    return true;
}

/* An output of so many pixels, which lies as the input does. */
static object new_image(const struct image *image, const int64_t *out, struct tensor *made) {
    int64_t shape[MOST_DIMENSIONS] = {image->x.shape[0], image->x.shape[1]}, strides[MOST_DIMENSIONS];
    for (int i = 0; i < image->rank; i++) shape[2 + i] = out[FXQ_SPACE - image->rank + i];
    set_strides(shape, image->x.dimensions, image->by_pixels, strides);
    return has_failed() ? NULL : new_strided(shape, strides, image->x.dimensions, UINT8, made);
}

/* The size of a padded dimension; 0: torch would refuse to cut off so much, or nothing is left. */
int64_t padded_size(int64_t size, int64_t before, int64_t after) {
    const int64_t kept = size + (before < 0 ? before : 0) + (after < 0 ? after : 0), out = size + before + after;
    return kept < 0 || out < 0 ? 0 : out;
}

/* pad_value(asks, x, zero_point, pad): of dimensions after the second */
CALL(pad_value) {
    struct image image;
    struct tensor zero_point, made;
    if (count != 4 || !may_run(args[0], args[1]) || !read_image(args[1], &image) ||
        !read_strided(args[2], &zero_point) || zero_point.dtype != INT32 || zero_point.count != 1) {
        return nothing();
    }
    const int64_t fill = *(const int32_t *)zero_point.data, sides = length_of(args[3]);
    struct fxq_pad call = {
        .x = image.x.data, .batch = image.batch, .channels = image.channels, .zero_point = (uint8_t)fill};
    if (fill < 0 || fill > 255 || sides % 2 || sides > 2 * image.rank) return nothing();
    for (int i = 0; i < FXQ_SPACE; i++) {
        const int64_t at = 2 * (FXQ_SPACE - 1 - i); /* the last dimension comes first */
        call.in[i] = image.in[i];
        call.before[i] = at < sides ? integer_at(args[3], at) : 0;
        call.out[i] = padded_size(call.in[i], call.before[i], at < sides ? integer_at(args[3], at + 1) : 0);
        if (call.out[i] < 1 || has_failed()) return nothing();
    }
    object output = new_image(&image, call.out, &made);
    if (output == NULL) return NULL;
    call.y = made.data;
    RUN(output, (fxq_pad_value(&call, threads), FXQ_OK));
}

/* resize_value(asks, x, size, factors, align_corners) */
CALL(resize_value) {
    struct image image;
    struct tensor made;
    if (count != 5 || !may_run(args[0], args[1]) || !read_image(args[1], &image)) return nothing();
    const bool has_size = !is_none(args[2]), has_factors = !is_none(args[3]);
    struct fxq_resize call = {
        .x = image.x.data, .batch = image.batch, .channels = image.channels, .aligns_corners = is_true(args[4])};
    if (!(has_size || has_factors) || (has_size && length_of(args[2]) != image.rank) ||
        (has_factors && length_of(args[3]) != image.rank)) {
        return nothing();
    }
    for (int i = 0; i < FXQ_SPACE; i++) {
        const int at = i - (FXQ_SPACE - image.rank);
        const double factor = at >= 0 && has_factors ? NUMBER(item(args[3], at)) : 0.0;
        const int64_t size = at < 0 ? 1 : has_size ? integer_at(args[2], at) : 0;
        call.in[i] = image.in[i];
        if (has_failed() || !resized(&call, i, size, factor)) return nothing();
    }
    object output = new_image(&image, call.out, &made);
    if (output == NULL) return NULL;
    call.y = made.data;
    RUN(output, (fxq_resize_value(&call, threads), FXQ_OK));
}

/* One dimension's output size and step; whether there are both. size, factor: 0 where it is not given. */
bool resized(struct fxq_resize *c, int i, int64_t size, double factor) {
    const double length = (double)c->in[i];
    if (size < 0 || factor < 0.0 || !(factor * length < 1e9)) return false;
    const int64_t out = c->out[i] = size > 0 ? size : (int64_t)(length * factor);
    if (out < 1) return false;
    c->step[i] = c->aligns_corners ? (length - 1.0) / (double)(out > 1 ? out - 1 : 1)
                 : factor > 0.0    ? 1.0 / factor
                                   : length / (double)out;
    return true;
}

/* lookup_channels(asks, q, table) */
CALL(lookup_channels) {
    struct image image;
    struct tensor table, made;
    if (count != 3 || !may_run(args[0], args[1]) || !read_image(args[1], &image) ||
        !read_dtype(args[2], UINT8, 2, &table) || table.shape[0] != image.x.shape[1] || table.shape[1] != 256) {
        return nothing();
    }
    object output = new_image(&image, image.in, &made);
    if (output == NULL) return NULL;
    const struct fxq_tables call = {.q = image.x.data,
                                    .images = image.x.shape[0],
                                    .channels = image.x.shape[1],
                                    .pixels = image.in[0] * image.in[1] * image.in[2],
                                    .by_rows = !image.by_pixels,
                                    .tables = table.data,
                                    .out = made.data};
    RUN(output, (fxq_look_up_channels(&call, threads), FXQ_OK));
}
