/* Integer values, seen from C: their scales, and how they lie. See values.c. */
#ifndef FXQUANT_PYTHON_VALUES_H
#define FXQUANT_PYTHON_VALUES_H

#include "python/tensors.h"
#include "static.h"

bool read_scale(PyObject *scale, PyObject *zero_point, struct fxq_scale *to);
float read_bound(PyObject *bound, float none); /* None: no bound */
bool read_integers(PyObject *sequence, int count, int64_t *to);
bool lies_by_pixels(const struct tensor *x, bool *says);
void set_strides(const int64_t *shape, int dimensions, bool by_pixels, int64_t *strides);
PyObject *new_output(PyObject *asks, const int64_t *shape, int dimensions, bool says, bool is_float,
                     struct tensor *made);

/* call_pools.c */
int64_t pooled_size(const struct fxq_pool *c, int i, bool rounds_up);
bool sums_fit(const struct fxq_pool *c);

#endif
