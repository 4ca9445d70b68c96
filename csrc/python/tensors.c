/* torch's tensors, seen from C without torch's headers.
 *
 * A model's Python code runs on cold caches, between kernels that fill them: each line of it costs several times what
 * it does in a loop. So tensors are taken apart here, with one call each: DLPack's exchange interface, a table of C
 * functions that the tensor type carries (https://dmlc.github.io/dlpack/latest/c_api.html). Where torch is older than
 * that, their Python methods are called. */
#include "python/tensors.h"

/* What dlpack.h (version 1.3) says of the parts used here. */
struct dl_type {
    uint8_t code, bits;
    uint16_t lanes;
};
struct dl_tensor {
    void *data;
    int32_t device_type, device_index;
    int32_t dimensions;
    struct dl_type type;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct dl_exchange {
    uint32_t major, minor;
    void *earlier;
    void *allocate, *from_object, *to_object;
    int (*view)(void *object, struct dl_tensor *out); /* -1: an exception is set */
};
enum { DL_CPU = 1, DL_MAJOR = 1 };
static const struct dl_type dl_types[DTYPES] = {[FLOAT32] = {2, 32, 1}, [INT8] = {0, 8, 1},    [UINT8] = {1, 8, 1},
                                                [INT32] = {0, 32, 1},   [INT64] = {0, 64, 1},  [BFLOAT16] = {4, 16, 1},
                                                [INT16] = {0, 16, 1},   [FLOAT16] = {2, 16, 1}};

enum { WATCHERS = 4 };

/* Of torch: set once, before any kernel. */
static struct {
    PyObject *tensor, *parameter; /* types */
    PyObject *dtypes[DTYPES];
    PyObject *empty, *float32_on_cpu;       /* torch.empty and its keywords */
    PyObject *empty_strided, *uint8_on_cpu; /* torch.empty_strided, and its keywords for the other dtype */
    PyObject *new_large, *get_num_threads, *is_grad_enabled;
    PyObject *watchers[WATCHERS]; /* functions that say something true while somebody watches */
    const struct dl_exchange *exchange;
} torch;

enum { LARGE_BYTES = 4 << 20 }; /* outputs from here on come from the pool of large ones */

/* The names of what is asked of a tensor. */
static struct {
    PyObject *requires_grad, *is_neg, *is_cpu, *dtype, *shape, *stride, *data_ptr;
} name;

static bool make_names(void) {
    return (name.requires_grad = PyUnicode_InternFromString("requires_grad")) &&
           (name.is_neg = PyUnicode_InternFromString("is_neg")) &&
           (name.is_cpu = PyUnicode_InternFromString("is_cpu")) && (name.dtype = PyUnicode_InternFromString("dtype")) &&
           (name.shape = PyUnicode_InternFromString("shape")) && (name.stride = PyUnicode_InternFromString("stride")) &&
           (name.data_ptr = PyUnicode_InternFromString("data_ptr"));
}

/* set_torch((Tensor, Parameter), dtypes in the order of enum dtype,
 * (empty, its keywords, empty_strided, its keywords for uint8),
 * (new_large, get_num_threads, is_grad_enabled), watchers, the exchange interface's capsule or None) */
PyObject *set_torch(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    PyObject **targets[5][DTYPES] = {{&torch.tensor, &torch.parameter},
                                     {&torch.dtypes[0], &torch.dtypes[1], &torch.dtypes[2], &torch.dtypes[3],
                                      &torch.dtypes[4], &torch.dtypes[5], &torch.dtypes[6], &torch.dtypes[7]},
                                     {&torch.empty, &torch.float32_on_cpu, &torch.empty_strided, &torch.uint8_on_cpu},
                                     {&torch.new_large, &torch.get_num_threads, &torch.is_grad_enabled},
                                     {&torch.watchers[0], &torch.watchers[1], &torch.watchers[2], &torch.watchers[3]}};
    static const Py_ssize_t sizes[5] = {2, DTYPES, 4, 3, WATCHERS};
    if (count != 6) return PyErr_Format(PyExc_TypeError, "set_torch takes 6 arguments, got %zd", count);
    if (!make_names()) return NULL;
    for (int i = 0; i < 5; i++) {
        if (!PyTuple_Check(args[i]) || PyTuple_Size(args[i]) != sizes[i]) {
            return PyErr_Format(PyExc_TypeError, "set_torch: argument %d must be a tuple of %zd", i, sizes[i]);
        }
        for (Py_ssize_t j = 0; j < sizes[i]; j++) {
            *targets[i][j] = PyTuple_GetItem(args[i], j);
            Py_INCREF(*targets[i][j]);
        }
    }
    torch.exchange = NULL;
    if (args[5] != Py_None) {
        const struct dl_exchange *exchange = PyCapsule_GetPointer(args[5], "dlpack_exchange_api");
        if (exchange == NULL) return NULL;
        if (exchange->major == DL_MAJOR) torch.exchange = exchange;
    }
    return PyBool_FromLong(torch.exchange != NULL);
}

bool is_float32(PyObject *dtype) { return dtype == torch.dtypes[FLOAT32]; }

static bool find_dtype(const struct dl_type *type, enum dtype *dtype) {
    for (int i = 0; i < DTYPES; i++) {
        if (dl_types[i].code == type->code && dl_types[i].bits == type->bits && type->lanes == 1) {
            *dtype = (enum dtype)i;
            return true;
        }
    }
    return false;
}

static bool read_exchanged(PyObject *object, struct tensor *tensor) {
    struct dl_tensor seen;
    if (torch.exchange->view(object, &seen) != 0) return false;
    if (seen.device_type != DL_CPU || seen.dimensions > MOST_DIMENSIONS || !find_dtype(&seen.type, &tensor->dtype))
        return false;
    tensor->data = (char *)seen.data + seen.byte_offset;
    tensor->dimensions = seen.dimensions;
    tensor->count = 1;
    for (int i = seen.dimensions - 1; i >= 0; i--) {
        tensor->shape[i] = seen.shape[i];
        tensor->strides[i] = seen.strides ? seen.strides[i] : tensor->count;
        tensor->count *= seen.shape[i];
    }
    return true;
}

static long long integer_from(PyObject *value) {
    const long long integer = value ? PyLong_AsLongLong(value) : -1; /* a bool is an integer */
    Py_XDECREF(value);
    return integer;
}

static bool has_known_dtype(PyObject *object, enum dtype *dtype) {
    PyObject *known = PyObject_GetAttr(object, name.dtype);
    Py_XDECREF(known); /* dtypes live for ever */
    for (int i = 0; known && i < DTYPES; i++) {
        if (torch.dtypes[i] == known) {
            *dtype = (enum dtype)i;
            return true;
        }
    }
    return false;
}

static bool read_by_methods(PyObject *object, struct tensor *tensor) {
    if (!has_known_dtype(object, &tensor->dtype) || integer_from(PyObject_GetAttr(object, name.is_cpu)) != 1)
        return false;
    PyObject *shape = PyObject_GetAttr(object, name.shape);
    PyObject *strides = shape ? PyObject_CallMethodObjArgs(object, name.stride, NULL) : NULL;
    tensor->dimensions = strides ? (int)PyTuple_Size(strides) : MOST_DIMENSIONS + 1;
    tensor->count = 1;
    for (int i = 0; i < tensor->dimensions && tensor->dimensions <= MOST_DIMENSIONS; i++) {
        tensor->shape[i] = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
        tensor->strides[i] = PyLong_AsLongLong(PyTuple_GetItem(strides, i));
        tensor->count *= tensor->shape[i];
    }
    Py_XDECREF(shape);
    Py_XDECREF(strides);
    if (tensor->dimensions > MOST_DIMENSIONS) return false;
    PyObject *address = PyObject_CallMethodObjArgs(object, name.data_ptr, NULL);
    tensor->data = address ? PyLong_AsVoidPtr(address) : NULL;
    Py_XDECREF(address);
    return !PyErr_Occurred();
}

/* Subclasses have a mind of their own; anything else is not for torch's functions. */
static bool is_plain(PyObject *object) {
    PyObject *type = (PyObject *)Py_TYPE(object);
    return type == torch.tensor || type == torch.parameter;
}

bool read_strided(PyObject *object, struct tensor *tensor) {
    if (!is_plain(object)) return false;
    if (torch.exchange ? read_exchanged(object, tensor) : read_by_methods(object, tensor)) {
        return tensor->data != NULL || tensor->count == 0; /* a storage may be freed, or never have been there */
    }
    PyErr_Clear(); /* torch has its reasons: a tensor of a function transform, say, has no memory to show */
    return false;
}

static bool has_truth(PyObject *value) {
    const int truth = value ? PyObject_IsTrue(value) : -1;
    Py_XDECREF(value);
    return truth != 0;
}

bool is_trained(PyObject *object) {
    return has_truth(PyObject_GetAttr(object, name.requires_grad)) &&
           has_truth(PyObject_CallObject(torch.is_grad_enabled, NULL));
}

bool is_watched(PyObject *object) {
    if (!is_plain(object)) return true;
    for (int i = 0; i < WATCHERS; i++) {
        if (has_truth(PyObject_CallObject(torch.watchers[i], NULL))) return true;
    }
    return is_trained(object) || has_truth(PyObject_CallMethodObjArgs(object, name.is_neg, NULL));
}

PyObject *new_tensor(const int64_t *shape, int dimensions, struct tensor *tensor) {
    PyObject *sizes = PyTuple_New(dimensions), *made = NULL;
    int64_t bytes = sizeof(float);
    for (int i = 0; sizes && i < dimensions; i++) {
        PyTuple_SetItem(sizes, i, PyLong_FromLongLong(shape[i]));
        if (__builtin_mul_overflow(bytes, shape[i], &bytes)) bytes = INT64_MAX;
    }
    if (sizes && bytes >= LARGE_BYTES) made = PyObject_CallFunctionObjArgs(torch.new_large, sizes, NULL);
    else if (sizes) made = PyObject_Call(torch.empty, sizes, torch.float32_on_cpu); /* each by itself: 0.5 us less */
    Py_XDECREF(sizes);
    if (made && !read_tensor(made, tensor)) {
        PyErr_SetString(PyExc_SystemError, "torch.empty gave a tensor that cannot be read");
        Py_CLEAR(made);
    }
    return made;
}

static PyObject *integers(const int64_t *values, int count) {
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple && i < count; i++) PyTuple_SetItem(tuple, i, PyLong_FromLongLong(values[i]));
    return tuple;
}

PyObject *new_strided(const int64_t *shape, const int64_t *strides, int dimensions, enum dtype dtype,
                      struct tensor *tensor) {
    PyObject *sizes = integers(shape, dimensions), *steps = integers(strides, dimensions);
    PyObject *args = sizes && steps ? PyTuple_Pack(2, sizes, steps) : NULL, *made = NULL;
    if (args)
        made = PyObject_Call(torch.empty_strided, args, dtype == UINT8 ? torch.uint8_on_cpu : torch.float32_on_cpu);
    Py_XDECREF(args);
    Py_XDECREF(sizes);
    Py_XDECREF(steps);
    if (made && !read_strided(made, tensor)) {
        PyErr_SetString(PyExc_SystemError, "torch.empty_strided gave a tensor that cannot be read");
        Py_CLEAR(made);
    }
    return made;
}

int thread_count(void) {
    if (PyErr_Occurred()) return -1; /* of an argument: torch must not be called with one set */
    const long long threads = integer_from(PyObject_CallObject(torch.get_num_threads, NULL));
    return PyErr_Occurred() ? -1 : (int)threads;
}
