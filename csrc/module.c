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

/* linear(x, rows, columns, weight, outputs, scale, bias, out, relu, per_row, qmax, threads) */
static PyObject *linear(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!has_count("linear", count, 12)) return NULL;
    const struct fxq_linear call = {
        .x = ADDRESS(args[0]), .rows = INTEGER(args[1]), .columns = INTEGER(args[2]), .weight = ADDRESS(args[3]),
        .outputs = INTEGER(args[4]), .scale = ADDRESS(args[5]), .bias = ADDRESS(args[6]), .out = ADDRESS(args[7]),
        .relu = INTEGER(args[8]) != 0, .per_row = INTEGER(args[9]) != 0, .qmax = (int)INTEGER(args[10])};
    const int threads = (int)INTEGER(args[11]);
    if (PyErr_Occurred()) return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fxq_linear(&call, threads);
    Py_END_ALLOW_THREADS
    return result(status);
}

/* The cells from one flat tuple of 8 addresses each, 0 for none: ih, hh, hr, their scales, bias, hidden_bias. */
static struct fxq_recurrent_weights *read_cells(PyObject *addresses, Py_ssize_t cells) {
    if (!PyTuple_Check(addresses) || PyTuple_Size(addresses) != cells * 8) {
        PyErr_SetString(PyExc_TypeError, "recurrent takes one tuple of all the cells' addresses");
        return NULL;
    }
    struct fxq_recurrent_weights *weights = calloc((size_t)cells, sizeof *weights);
    if (weights == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < cells; i++) {
        void *a[8];
        for (Py_ssize_t j = 0; j < 8; j++) a[j] = ADDRESS(PyTuple_GetItem(addresses, i * 8 + j));
        weights[i] = (struct fxq_recurrent_weights){a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]};
    }
    return weights;
}

/* recurrent(mode, x, steps, batch, inputs, hidden, outputs, sizes, layers, directions, addresses, h0, h, c, out, per_row,
 *           qmax, threads) */
static PyObject *recurrent(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!has_count("recurrent", count, 18)) return NULL;
    struct fxq_recurrent call = {
        .mode = (enum fxq_mode)INTEGER(args[0]), .x = ADDRESS(args[1]), .steps = INTEGER(args[2]), .batch = INTEGER(args[3]),
        .inputs = INTEGER(args[4]), .hidden = INTEGER(args[5]), .outputs = INTEGER(args[6]), .sizes = ADDRESS(args[7]),
        .layers = (int)INTEGER(args[8]), .directions = (int)INTEGER(args[9]), .h0 = ADDRESS(args[11]), .h = ADDRESS(args[12]),
        .c = ADDRESS(args[13]), .out = ADDRESS(args[14]), .per_row = INTEGER(args[15]) != 0, .qmax = (int)INTEGER(args[16])};
    const int threads = (int)INTEGER(args[17]);
    if (PyErr_Occurred()) return NULL;
    struct fxq_recurrent_weights *cells = read_cells(args[10], (Py_ssize_t)call.layers * call.directions);
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
    *indices = (struct fxq_indices){.values = ADDRESS(args[7]), .count = INTEGER(args[8]), .is_wide = INTEGER(args[9]) != 0};
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

/* embedding_bag(..., offsets, bags, width, has_end, mode, weights, padding, out, threads) -> 0, -2 or, for offsets that do not
 * rise from 0 to the number of indices, -3 */
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
    FAST(linear), FAST(recurrent), FAST(embedding), FAST(embedding_bag), FAST(use_huge_pages),
    {"isas", isas, METH_NOARGS, NULL}, {"active_isa", active_isa, METH_NOARGS, NULL}, {"select_isa", select_isa, METH_O, NULL},
    {"set_least_share", set_least_share, METH_O, NULL},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "fxquant's CPU kernels.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    fxq_select_isa(-1);
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddIntConstant(module, "interface", 2) != 0) Py_CLEAR(module); /* of native.py's _INTERFACE */
    return module;
}
