/* Integer values, seen from C: their scales, and how they lie. See values.c. */
#ifndef FXQUANT_PYTHON_VALUES_H
#define FXQUANT_PYTHON_VALUES_H

#include "calls/tensors.h"
#include "static.h"

bool read_scale(object scale, object zero_point, struct fxq_scale *to);
float read_bound(object bound, float none); /* None: no bound */
bool read_integers(object sequence, int count, int64_t *to);
void set_strides(const int64_t *shape, int dimensions, bool by_pixels, int64_t *strides);
object new_output(object asks, const int64_t *shape, int dimensions, bool says, bool is_float, struct tensor *made);

/* pools.c */
int64_t pooled_size(const struct fxq_pool *c, int i, bool rounds_up);
bool sums_fit(const struct fxq_pool *c);

/* moves.c */
int64_t padded_size(int64_t size, int64_t before, int64_t after);
bool resized(struct fxq_resize *c, int i, int64_t size, double factor);

#endif
