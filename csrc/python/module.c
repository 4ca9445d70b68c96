/* The Python module: its table of methods, and its settings. The operators' calls stand in calls/. */
#include <sys/mman.h>

#include "kernels.h"
#include "calls/calls.h"
#include "python/plan.h"
#include "python/tensors.h"
#include "runtime/pool.h"

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
    if (count != 2) return PyErr_Format(PyExc_TypeError, "use_huge_pages takes 2 arguments, got %zd", count);
    const uintptr_t address = (uintptr_t)PyLong_AsVoidPtr(args[0]), bytes = (uintptr_t)INTEGER(args[1]);
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

/* hold_helpers(whether): tests see to it that nobody joins */
static PyObject *hold_helpers(PyObject *self, PyObject *holds) {
    (void)self;
    fxq_hold_helpers(holds == Py_True);
    Py_RETURN_NONE;
}

/* skip_rounds(count): tests let the pool grow old */
static PyObject *skip_rounds(PyObject *self, PyObject *count) {
    (void)self;
    const long long value = INTEGER(count);
    if (PyErr_Occurred()) return NULL;
    fxq_skip_rounds((uint32_t)value);
    Py_RETURN_NONE;
}

/* The index of a string among `count` names; `count` if it is none of them. */
static int find_name(PyObject *string, const char *const *names, int count) {
    int i = 0;
    while (i < count && !(PyUnicode_Check(string) && PyUnicode_CompareWithASCIIString(string, names[i]) == 0)) i++;
    return i;
}

static const char *const ways[] = {"ready", "waking", "openmp", "alone"};

/* use_way(name or None): tests choose how jobs get help; returns whether it can be had */
static PyObject *use_way(PyObject *self, PyObject *name) {
    (void)self;
    const int way = find_name(name, ways, FXQ_WAYS);
    fxq_only_way = way == FXQ_OPENMP && !fxq_has_openmp() ? FXQ_WAYS : (enum fxq_way)way;
    return PyBool_FromLong(name == Py_None || fxq_only_way != FXQ_WAYS);
}

/* use_method(name or None): tests and benchmarks choose the form of int8 products; returns whether there is one */
static PyObject *use_method(PyObject *self, PyObject *name) {
    (void)self;
    static const char *const methods[FXQ_METHODS] = {"gemv", "tiled", "packed"};
    fxq_only_method = (enum fxq_method)find_name(name, methods, FXQ_METHODS);
    return PyBool_FromLong(name == Py_None || fxq_only_method != FXQ_METHODS);
}

/* thresholds() -> of the kernels in use: the most rows of the gemv, the least of a packed copy, of one with streamed
 * outputs; a thread's least multiplications */
static PyObject *thresholds(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    const struct fxq_thresholds *rows = &fxq_active->thresholds;
    return Py_BuildValue("(LLLL)", (long long)rows->most_gemv, (long long)rows->least_packed,
                         (long long)rows->least_streamed, (long long)fxq_least_share);
}

/* pool_counts() -> how many jobs went each way, times that a thread joined one, workers woken, waits that ended in
 * sleep */
static PyObject *pool_counts(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    const struct fxq_pool_counts counts = fxq_count_pool();
    PyObject *all = PyDict_New();
    for (int i = 0; all && i < FXQ_WAYS + 4; i++) {
        static const char *const others[] = {"joined", "wakes", "sleeps"};
        const uint64_t values[] = {counts.joined, counts.wakes, counts.sleeps};
        const char *name = i <= FXQ_WAYS ? ways[i] : others[i - FXQ_WAYS - 1];
        PyObject *value = PyLong_FromUnsignedLongLong(i <= FXQ_WAYS ? counts.jobs[i] : values[i - FXQ_WAYS - 1]);
        if (value == NULL || PyDict_SetItemString(all, name, value) != 0) Py_CLEAR(all);
        Py_XDECREF(value);
    }
    return all;
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {FAST(set_torch),
                                FAST(linear),
                                FAST(transpose),
                                FAST(histogram),
                                FAST(matmul),
                                FAST(attention),
                                FAST(lstm),
                                FAST(rnn),
                                FAST(embedding),
                                FAST(embedding_bag),
                                FAST(static_linear),
                                FAST(static_convolution),
                                FAST(quantize),
                                FAST(dequantize),
                                FAST(lookup),
                                FAST(add_values),
                                FAST(mul_values),
                                FAST(mean_value),
                                FAST(pool_value),
                                FAST(adaptive_pool_value),
                                FAST(max_pool_value),
                                FAST(pad_value),
                                FAST(resize_value),
                                FAST(lookup_channels),
                                FAST(plan_run),
                                FAST(run),
                                FAST(use_huge_pages),
                                {"isas", isas, METH_NOARGS, NULL},
                                {"active_isa", active_isa, METH_NOARGS, NULL},
                                {"select_isa", select_isa, METH_O, NULL},
                                {"set_least_share", set_least_share, METH_O, NULL},
                                {"hold_helpers", hold_helpers, METH_O, NULL},
                                {"skip_rounds", skip_rounds, METH_O, NULL},
                                {"use_way", use_way, METH_O, NULL},
                                {"use_method", use_method, METH_O, NULL},
                                {"thresholds", thresholds, METH_NOARGS, NULL},
                                {"pool_counts", pool_counts, METH_NOARGS, NULL},
                                {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "fxquant's CPU kernels.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    fxq_begin();
    fxq_is_registered = true; /* by the package, if not by the other door before */
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddIntConstant(module, "interface", 14) != 0)
        Py_CLEAR(module); /* of library.py's _INTERFACE */
    return module;
}
