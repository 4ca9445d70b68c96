/* torch's tensors, seen from Python: see tensors.c. */
#ifndef FXQUANT_PYTHON_TENSORS_H
#define FXQUANT_PYTHON_TENSORS_H

#include "calls/tensors.h"

/* Before it, no tensor can be read. */
PyObject *set_torch(PyObject *self, PyObject *const *args, Py_ssize_t count);

#endif
