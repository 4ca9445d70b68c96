/* The Python module: addresses and sizes in, nothing kept, the GIL released while a kernel runs.
 *
 * fxquant/ops/native.py, its only caller, checks shapes, dtypes and contiguity. */
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fxquant.h"

#define ADDRESS(object) PyLong_AsVoidPtr(object)
#define INTEGER(object) PyLong_AsLongLong(object)

static bool has_count(const char *name, Py_ssize_t given, Py_ssize_t wanted) {
    if (given == wanted) return true;
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", name, wanted, given);
    return false;
}

/* None, or the exception of a status that is the caller's: memory, or a number that native.py makes an error of. */
static PyObject *result(int status) {
    if (status == FXQ_NO_MEMORY) return PyErr_NoMemory();
    return PyLong_FromLong(status);
}

/* What is asked of tensors. Their methods are called from here because a model's Python code runs on cold caches, between
 * kernels that fill them: each line of it costs several times what it does in a loop. */
static struct {
    PyObject *numel, *is_contiguous, *data_ptr, *dtype; /* names */
    PyObject *float32, *int8;                           /* torch's */
} known;

/* set_dtypes(torch.float32, torch.int8): once, before any kernel */
static PyObject *set_dtypes(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!has_count("set_dtypes", count, 2)) return NULL;
    Py_INCREF(args[0]), Py_INCREF(args[1]);
    known.float32 = args[0];
    known.int8 = args[1];
    known.numel = PyUnicode_InternFromString("numel");
    known.is_contiguous = PyUnicode_InternFromString("is_contiguous");
    known.data_ptr = PyUnicode_InternFromString("data_ptr");
    known.dtype = PyUnicode_InternFromString("dtype");
    if (!known.numel || !known.is_contiguous || !known.data_ptr || !known.dtype) return NULL;
    Py_RETURN_NONE;
}

static long long call_for_integer(PyObject *tensor, PyObject *method) {
    PyObject *value = PyObject_CallMethodObjArgs(tensor, method, NULL);
    const long long integer = value ? PyLong_AsLongLong(value) : -1; /* is_contiguous: a bool is an integer */
    Py_XDECREF(value);
    return integer;
}

/* Whether the tensor is dense, of that dtype and of so many elements; then *address is where. May set an exception. */
static bool read_tensor(PyObject *tensor, PyObject *dtype, int64_t count, void **address) {
    PyObject *own = PyObject_GetAttr(tensor, known.dtype);
    Py_XDECREF(own); /* dtypes live for ever */
    if (own != dtype || call_for_integer(tensor, known.numel) != count) return false;
    if (call_for_integer(tensor, known.is_contiguous) != 1) return false;
    PyObject *pointer = PyObject_CallMethodObjArgs(tensor, known.data_ptr, NULL);
    *address = pointer ? PyLong_AsVoidPtr(pointer) : NULL;
    Py_XDECREF(pointer);
    return !PyErr_Occurred();
}

/* linear(x, weight, scale, bias or None, out, rows, columns, outputs, relu, per_row, qmax, threads) -> True, or False when
 * a tensor is not dense, not of its dtype or not of its size, and nothing was done */
static PyObject *linear(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!has_count("linear", count, 12)) return NULL;
    struct fxq_linear call = {.rows = INTEGER(args[5]), .columns = INTEGER(args[6]), .outputs = INTEGER(args[7]),
        .relu = INTEGER(args[8]) != 0, .per_row = INTEGER(args[9]) != 0, .qmax = (int)INTEGER(args[10])};
    const int threads = (int)INTEGER(args[11]);
    if (PyErr_Occurred()) return NULL;
    void *x, *weight, *scale, *bias = NULL, *out;
    if (!read_tensor(args[0], known.float32, call.rows * call.columns, &x) ||
        !read_tensor(args[1], known.int8, call.outputs * call.columns, &weight) ||
        !read_tensor(args[2], known.float32, call.outputs, &scale) ||
        (args[3] != Py_None && !read_tensor(args[3], known.float32, call.outputs, &bias)) ||
        !read_tensor(args[4], known.float32, call.rows * call.outputs, &out)) {
        return PyErr_Occurred() ? NULL : PyBool_FromLong(0);
    }
    call.x = x;
    call.weight = weight;
    call.scale = scale;
    call.bias = bias;
    call.out = out;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fxq_linear(&call, threads);
    Py_END_ALLOW_THREADS
    return status == FXQ_NO_MEMORY ? PyErr_NoMemory() : PyBool_FromLong(1);
}

/* addresses(tensors, counts, is_int8) -> a tuple of the tensors' addresses, or None when one of them is not dense, not of
 * the dtype or not of its count */
static PyObject *addresses(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!has_count("addresses", count, 3)) return NULL;
    const Py_ssize_t tensors = PySequence_Size(args[0]);
    PyObject *dtype = args[2] == Py_True ? known.int8 : known.float32;
    if (tensors < 0 || !PyTuple_Check(args[1])) return NULL;
    if (tensors != PyTuple_Size(args[1])) Py_RETURN_NONE;
    PyObject *all = PyTuple_New(tensors);
    for (Py_ssize_t i = 0; all && i < tensors; i++) {
        void *address = NULL;
        PyObject *tensor = PySequence_GetItem(args[0], i);
        const bool is_ready = tensor && read_tensor(tensor, dtype, INTEGER(PyTuple_GetItem(args[1], i)), &address);
        Py_XDECREF(tensor);
        if (!is_ready) {
            Py_DECREF(all);
            if (PyErr_Occurred()) return NULL;
            Py_RETURN_NONE;
        }
        PyTuple_SetItem(all, i, PyLong_FromVoidPtr(address));
    }
    return all;
}

/* The i-th address of a tuple, NULL beyond its end. */
static void *address_at(PyObject *tuple, Py_ssize_t i) {
    return i < PyTuple_Size(tuple) ? ADDRESS(PyTuple_GetItem(tuple, i)) : NULL;
}

/* The cells from four tuples of addresses: weights (ih, hh and perhaps hr of each cell), scales, biases, hidden_biases. */
static struct fxq_recurrent_weights *read_cells(PyObject *const *tuples, Py_ssize_t cells) {
    for (int i = 0; i < 4; i++) {
        if (!PyTuple_Check(tuples[i])) {
            PyErr_SetString(PyExc_TypeError, "recurrent takes four tuples of addresses");
            return NULL;
        }
    }
    const Py_ssize_t per_cell = cells ? PyTuple_Size(tuples[0]) / cells : 0;
    if (per_cell < 2 || per_cell > 3 || PyTuple_Size(tuples[1]) != cells * per_cell) {
        PyErr_SetString(PyExc_TypeError, "recurrent takes two or three weights a cell and as many scales");
        return NULL;
    }
    struct fxq_recurrent_weights *weights = calloc((size_t)cells, sizeof *weights);
    if (weights == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0, at = 0; i < cells; i++, at += per_cell) {
        weights[i] = (struct fxq_recurrent_weights){
            .ih = address_at(tuples[0], at), .hh = address_at(tuples[0], at + 1),
            .ih_scale = address_at(tuples[1], at), .hh_scale = address_at(tuples[1], at + 1),
            .bias = address_at(tuples[2], i), .hidden_bias = address_at(tuples[3], i)};
        if (per_cell == 3) {
            weights[i].hr = address_at(tuples[0], at + 2);
            weights[i].hr_scale = address_at(tuples[1], at + 2);
        }
    }
    return weights;
}

/* recurrent(mode, x, steps, batch, inputs, hidden, outputs, sizes, layers, directions, weights, scales, biases,
 *           hidden_biases, h0, h, c, out, per_row, qmax, threads), the tensors as addresses */
static PyObject *recurrent(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!has_count("recurrent", count, 21)) return NULL;
    struct fxq_recurrent call = {
        .mode = (enum fxq_mode)INTEGER(args[0]), .x = ADDRESS(args[1]), .steps = INTEGER(args[2]),
        .batch = INTEGER(args[3]), .inputs = INTEGER(args[4]), .hidden = INTEGER(args[5]), .outputs = INTEGER(args[6]),
        .sizes = ADDRESS(args[7]), .layers = (int)INTEGER(args[8]), .directions = (int)INTEGER(args[9]),
        .h0 = ADDRESS(args[14]), .h = ADDRESS(args[15]), .c = ADDRESS(args[16]), .out = ADDRESS(args[17]),
        .per_row = INTEGER(args[18]) != 0, .qmax = (int)INTEGER(args[19])};
    const int threads = (int)INTEGER(args[20]);
    if (PyErr_Occurred()) return NULL;
    struct fxq_recurrent_weights *cells = read_cells(args + 10, (Py_ssize_t)call.layers * call.directions);
    if (cells == NULL) return NULL;
    call.cells = cells;
    int status = FXQ_OK;
    if (!PyErr_Occurred()) {
        Py_BEGIN_ALLOW_THREADS
        status = fxq_recurrent(&call, threads);
        Py_END_ALLOW_THREADS
    }
    free(cells);
    return PyErr_Occurred() ? NULL : result(status);
}

enum { TABLE_ARGUMENTS = 10 };

/* values, rows, columns, bits, is_signed, scale, zero_point, indices, count, is_wide */
static void read_table(PyObject *const *args, struct fxq_table *table, struct fxq_indices *indices) {
    *table = (struct fxq_table){
        .values = ADDRESS(args[0]), .rows = INTEGER(args[1]), .columns = INTEGER(args[2]), .bits = (int)INTEGER(args[3]),
        .is_signed = INTEGER(args[4]) != 0, .scale = ADDRESS(args[5]), .zero_point = ADDRESS(args[6])};
    *indices = (struct fxq_indices){
        .values = ADDRESS(args[7]), .count = INTEGER(args[8]), .is_wide = INTEGER(args[9]) != 0};
}

/* embedding(..., out, threads) -> 0, or -2 for an index beyond the table */
static PyObject *embedding(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!has_count("embedding", count, TABLE_ARGUMENTS + 2)) return NULL;
    struct fxq_table table;
    struct fxq_indices indices;
    read_table(args, &table, &indices);
    float *out = ADDRESS(args[TABLE_ARGUMENTS]);
    const int threads = (int)INTEGER(args[TABLE_ARGUMENTS + 1]);
    if (PyErr_Occurred()) return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fxq_embedding(&table, &indices, out, threads);
    Py_END_ALLOW_THREADS
    return result(status);
}

/* embedding_bag(..., offsets, bags, width, has_end, mode, weights, padding, out, threads) -> 0, -2 or, for offsets that
 * do not rise from 0 to the number of indices, -3 */
static PyObject *embedding_bag(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!has_count("embedding_bag", count, TABLE_ARGUMENTS + 9)) return NULL;
    struct fxq_table table;
    struct fxq_indices indices;
    read_table(args, &table, &indices);
    PyObject *const *more = args + TABLE_ARGUMENTS;
    const struct fxq_bags bags = {
        .offsets = ADDRESS(more[0]), .count = INTEGER(more[1]), .width = INTEGER(more[2]), .has_end = INTEGER(more[3]) != 0,
        .mode = (int)INTEGER(more[4]), .weights = ADDRESS(more[5]), .padding = INTEGER(more[6])};
    float *out = ADDRESS(more[7]);
    const int threads = (int)INTEGER(more[8]);
    if (PyErr_Occurred()) return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fxq_embedding_bag(&table, &indices, &bags, out, threads);
    Py_END_ALLOW_THREADS
    return result(status);
}

/* isas() -> ((name, obstacle), ...), best first; an empty obstacle: it can be used */
static PyObject *isas(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *all = PyTuple_New(fxq_isa_count());
    for (int i = 0; all && i < fxq_isa_count(); i++) {
        PyObject *pair = Py_BuildValue("(ss)", fxq_isa_name(i), fxq_isa_obstacle(i));
        if (pair == NULL || PyTuple_SetItem(all, i, pair) != 0) Py_CLEAR(all);
    }
    return all;
}

static PyObject *active_isa(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyUnicode_FromString(fxq_active->name);
}

/* select_isa(index into isas()) -> whether it is now in use. No kernel may be running. */
static PyObject *select_isa(PyObject *self, PyObject *index) {
    (void)self;
    const long long i = INTEGER(index);
    if (PyErr_Occurred()) return NULL;
    return PyBool_FromLong(i >= 0 && i < fxq_isa_count() && fxq_select_isa((int)i));
}

/* use_huge_pages(address, bytes): ask for them; whether they come does not matter */
static PyObject *use_huge_pages(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!has_count("use_huge_pages", count, 2)) return NULL;
    const uintptr_t address = (uintptr_t)ADDRESS(args[0]), bytes = (uintptr_t)INTEGER(args[1]);
    if (PyErr_Occurred()) return NULL;
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
    if (first < last) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)address, (void)bytes;
#endif
    Py_RETURN_NONE;
}

/* set_least_share(multiplications): tests make threads share even the smallest work */
static PyObject *set_least_share(PyObject *self, PyObject *least) {
    (void)self;
    const long long value = INTEGER(least);
    if (PyErr_Occurred()) return NULL;
    fxq_least_share = value < 1 ? 1 : value;
    Py_RETURN_NONE;
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {
    FAST(set_dtypes), FAST(linear), FAST(addresses), FAST(recurrent), FAST(embedding), FAST(embedding_bag), FAST(use_huge_pages),
    {"isas", isas, METH_NOARGS, NULL},
    {"active_isa", active_isa, METH_NOARGS, NULL},
    {"select_isa", select_isa, METH_O, NULL},
    {"set_least_share", set_least_share, METH_O, NULL},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "fxquant's CPU kernels.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    fxq_select_isa(-1);
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddIntConstant(module, "interface", 3) != 0) Py_CLEAR(module); /* of native.py's _INTERFACE */
    return module;
}
