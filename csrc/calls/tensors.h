/* Tensors as calls read them: see tensors.c, and the tensors of each door. */
#ifndef FXQUANT_TENSORS_H
#define FXQUANT_TENSORS_H

#include <stdbool.h>
#include <stdint.h>

#include "calls/door.h"

enum { MOST_DIMENSIONS = 8 };
enum dtype { FLOAT32, INT8, UINT8, INT32, INT64, BFLOAT16, INT16, FLOAT16, DTYPES };

/* A tensor in main memory: dense and row-major, but for read_strided's. */
struct tensor {
    void *data;
    enum dtype dtype;
    int dimensions;
    int64_t shape[MOST_DIMENSIONS], strides[MOST_DIMENSIONS], count;
};

/* Whether this is a tensor as above; if not, the call has not failed. Its memory lives while the object does. */
bool read_strided(object tensor, struct tensor *to); /* of the door */
bool read_tensor(object tensor, struct tensor *to);
bool read_dtype(object tensor, enum dtype dtype, int dimensions, struct tensor *to);
bool read_vector(object tensor, int64_t count, const float **data);          /* float32, (count,) */
bool read_optional_vector(object tensor, int64_t count, const float **data); /* none: NULL */
bool lies_by_pixels(const struct tensor *x, bool *says);                     /* layout.c */

/* Of the door, all of them. Whether a compiler, a tracer, a mode, a function transform or a gradient wants to see what
 * happens to this tensor: then it must go through torch's dispatcher. Also true when torch cannot be asked. */
bool is_watched(object tensor);
bool is_trained(object tensor); /* whether a gradient of it is wanted */
bool is_float32(object dtype);

/* A new float32 tensor, not initialized. NULL: the call has failed. */
object new_tensor(const int64_t *shape, int dimensions, struct tensor *tensor);
object new_strided(const int64_t *shape, const int64_t *strides, int dimensions, enum dtype dtype,
                   struct tensor *tensor); /* of float32 or uint8 */
int thread_count(void);                    /* torch's; -1: the call has failed, perhaps before this */

#endif
