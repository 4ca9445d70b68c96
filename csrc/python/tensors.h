/* torch's tensors, seen from C without torch's headers: see tensors.c. */
#ifndef FXQUANT_TENSORS_H
#define FXQUANT_TENSORS_H

#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>

enum { MOST_DIMENSIONS = 8 };
enum kind { FLOAT32, INT8, UINT8, INT32, INT64, BFLOAT16, INT16, FLOAT16, KINDS };

/* A tensor in main memory: dense and row-major, but for read_strided's. */
struct tensor {
    void *data;
    enum kind kind;
    int dimensions;
    int64_t shape[MOST_DIMENSIONS], strides[MOST_DIMENSIONS], count;
};

/* set_torch: see tensors.c. Before it, no tensor can be read. */
PyObject *set_torch(PyObject *self, PyObject *const *args, Py_ssize_t count);

bool is_float32(PyObject *dtype);

/* Whether this is a tensor as above; if not, no exception is set. Its memory lives while the object does. */
bool read_tensor(PyObject *object, struct tensor *tensor);
bool read_strided(PyObject *object, struct tensor *tensor);
bool read_kind(PyObject *object, enum kind kind, int dimensions, struct tensor *tensor);
bool read_vector(PyObject *object, int64_t count, const float **data);          /* float32, (count,) */
bool read_optional_vector(PyObject *object, int64_t count, const float **data); /* None: NULL */

/* Whether a compiler, a tracer, a mode, a function transform or a gradient wants to see what happens to this tensor:
 * then it must go through torch's dispatcher. Also true, with an exception set, when torch cannot be asked. */
bool is_watched(PyObject *object);

/* Whether a gradient of a tensor is wanted. */
bool is_trained(PyObject *object);

/* A new float32 tensor, not initialized. NULL: an exception is set. */
PyObject *new_tensor(const int64_t *shape, int dimensions, struct tensor *tensor);
PyObject *new_strided(const int64_t *shape, const int64_t *strides, int dimensions, enum kind kind,
                      struct tensor *tensor); /* of float32 or uint8 */
int thread_count(void);                       /* torch's; -1: an exception is set, perhaps before the call */

#endif
