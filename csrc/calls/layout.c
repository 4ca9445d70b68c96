/* Integer values, seen from C: their scales, and how they lie. */
#include "calls/layout.h"

/* A value's scale and zero point: a float32 and an int32, of a single element each. */
bool read_scale(object scale, object zero_point, struct fxq_scale *to) {
    struct tensor s, z;
    if (!read_strided(scale, &s) || s.dtype != FLOAT32 || s.count != 1 || !read_strided(zero_point, &z) ||
        z.dtype != INT32 || z.count != 1) {
        return false;
    }
    *to = (struct fxq_scale){*(const float *)s.data, *(const int32_t *)z.data};
    return to->zero_point >= 0 && to->zero_point <= 255;
}

float read_bound(object bound, float none) { return is_none(bound) ? none : (float)NUMBER(bound); }

/* `count` integers, to the last places of three; whether there are so many. */
bool read_integers(object sequence, int count, int64_t *to) {
    if (length_of(sequence) != count) return false;
    for (int i = 0; i < count; i++) {
        to[FXQ_SPACE - count + i] = integer_at(sequence, i);
    }
    return true;
}

/* Whether a tensor whose channels are its second dimension lies pixel by pixel; says: and can be seen to, which of one
 * with one channel or one pixel it cannot. */
bool lies_by_pixels(const struct tensor *x, bool *says) {
    int64_t dense = 1, row_dense = 1;
    bool by_pixels = true, by_rows = true;
    for (int i = 0; i < x->dimensions; i++) {
        const int d = i == 0 ? 1 : i == x->dimensions - 1 ? 0 : x->dimensions - i, row = x->dimensions - 1 - i;
        by_pixels = by_pixels && (x->shape[d] == 1 || x->strides[d] == dense);
        by_rows = by_rows && (x->shape[row] == 1 || x->strides[row] == row_dense);
        dense *= x->shape[d];
        row_dense *= x->shape[row];
    }
    *says = by_pixels && !by_rows && x->dimensions > 3;
    return by_pixels;
}

/* The strides of a tensor that lies so, or row by row. */
void set_strides(const int64_t *shape, int dimensions, bool by_pixels, int64_t *strides) {
    int64_t dense = 1;
    for (int i = 0; i < dimensions; i++) {
        const int d = !by_pixels ? dimensions - 1 - i : i == 0 ? 1 : i == dimensions - 1 ? 0 : dimensions - i;
        strides[d] = dense;
        dense *= shape[d];
    }
}

/* An output of these sizes, which lies as the input does; NULL: it would have to lie otherwise than it is computed. */
object new_output(object asks, const int64_t *shape, int dimensions, bool says, bool is_float, struct tensor *made) {
    int64_t strides[MOST_DIMENSIONS], pixels = 1;
    for (int i = 2; i < dimensions; i++) pixels *= shape[i];
    if (!says && pixels != 1 && shape[1] != 1 && is_yes(asks)) return NULL;
    set_strides(shape, dimensions, says || !is_yes(asks), strides);
    return new_strided(shape, strides, dimensions, is_float ? FLOAT32 : UINT8, made);
}
