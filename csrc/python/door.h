/* The calls' arguments and results as Python's objects. A call that has failed has set an exception. */
#ifndef FXQUANT_PYTHON_DOOR_H
#define FXQUANT_PYTHON_DOOR_H

#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>

typedef PyObject *object;

#define CALL(name) PyObject *name(PyObject *self __attribute__((unused)), PyObject *const *args, Py_ssize_t count)
#define INTEGER(value) PyLong_AsLongLong(value)
#define NUMBER(value) PyFloat_AsDouble(value)
#define NONE Py_None
#define BEGIN_KERNEL Py_BEGIN_ALLOW_THREADS
#define END_KERNEL Py_END_ALLOW_THREADS

static inline bool is_none(object value) { return value == Py_None; }
static inline bool is_yes(object value) { return value == Py_True; } /* True itself */
static inline bool is_no(object value) { return value == Py_False; }
static inline bool is_true(object value) { return PyObject_IsTrue(value) == 1; }
static inline bool is_text(object value, const char *text) {
    return PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, text) == 0;
}
static inline int64_t length_of(object sequence) { return PySequence_Size(sequence); }

/* One item of a sequence of tensors or texts, which keeps it alive. */
static inline object item(object sequence, int64_t i) {
    PyObject *found = PySequence_GetItem(sequence, (Py_ssize_t)i);
    Py_XDECREF(found);
    return found;
}

static inline int64_t integer_at(object sequence, int64_t i) {
    PyObject *found = PySequence_GetItem(sequence, (Py_ssize_t)i);
    const int64_t value = found ? INTEGER(found) : -1;
    Py_XDECREF(found);
    return value;
}

static inline bool has_failed(void) { return PyErr_Occurred() != NULL; }
static inline object no_memory(void) { return PyErr_NoMemory(); }
static inline object new_none(void) { Py_RETURN_NONE; }
static inline void drop(object value) { Py_DECREF(value); }

/* The results together, which it takes over; NULL: one of them is NULL, or there is no memory. */
static inline object new_tuple(object *results, int count) {
    PyObject *tuple = PyTuple_New(count);
    bool are_made = tuple != NULL;
    for (int i = 0; i < count; i++) {
        are_made = are_made && results[i];
        if (tuple && results[i]) PyTuple_SetItem(tuple, i, results[i]);
        else Py_XDECREF(results[i]);
    }
    if (!are_made) Py_XDECREF(tuple);
    return are_made ? tuple : NULL;
}

#endif
