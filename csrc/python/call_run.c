/* The module's calls of a run of static operators: its plan, made once, and the run. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "python/plan.h"

static const char *const capsule_name = "fxquant.plan";

static void free_plan(struct plan *plan) {
    if (plan == NULL) return;
    free(plan->places);
    free(plan->guards);
    free(plan->steps);
    free(plan->templates);
    free(plan);
}

static void release(PyObject *capsule) { free_plan(PyCapsule_GetPointer(capsule, capsule_name)); }

/* Integers of a tuple, at most `most`; how many, or -1. */
static int read_tuple(PyObject *tuple, int most, int64_t *to) {
    const Py_ssize_t count = PyTuple_Check(tuple) ? PyTuple_Size(tuple) : -1;
    if (count < 0 || count > most) return -1;
    for (Py_ssize_t i = 0; i < count; i++) to[i] = INTEGER(PyTuple_GetItem(tuple, i));
    return PyErr_Occurred() ? -1 : (int)count;
}

static int read_numbers(PyObject *tuple, int most, int below, int least, int *to) {
    int64_t numbers[FXQ_STEP_INPUTS];
    const int count = most > FXQ_STEP_INPUTS ? -1 : read_tuple(tuple, most, numbers);
    for (int i = 0; i < count; i++) {
        if (numbers[i] < least || numbers[i] >= below) return -1;
        to[i] = (int)numbers[i];
    }
    return count;
}

/* (operator, output, last use, inputs, places, integers, low, high, slope) */
static bool read_step(PyObject *tuple, const struct plan *plan, struct fxq_step *step, struct template *template) {
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != 9) return false;
    const int64_t operator = INTEGER(PyTuple_GetItem(tuple, 0)), output = INTEGER(PyTuple_GetItem(tuple, 1));
    step->operator = (enum fxq_operator)operator;
    step->output = (int)output;
    step->last_use = (int)INTEGER(PyTuple_GetItem(tuple, 2));
    step->input_count = read_numbers(PyTuple_GetItem(tuple, 3), FXQ_STEP_INPUTS, plan->value_count, 0, step->inputs);
    for (int i = 0; i < STEP_PLACES; i++) template->places[i] = -1;
    const int places = read_numbers(PyTuple_GetItem(tuple, 4), STEP_PLACES, plan->place_count, -1, template->places);
    const int integers = read_tuple(PyTuple_GetItem(tuple, 5), STEP_INTEGERS, template->integers);
    template->low = read_bound(PyTuple_GetItem(tuple, 6), -INFINITY);
    template->high = read_bound(PyTuple_GetItem(tuple, 7), INFINITY);
    template->slope = read_bound(PyTuple_GetItem(tuple, 8), 0.0f);
    return !PyErr_Occurred() && operator >= 0 && operator < FXQ_STEPS && output >= 0 && output < plan->value_count &&
           step->input_count > 0 && places >= 0 && integers >= 0;
}

static bool read_places(PyObject *tuple, struct plan *plan) {
    for (int i = 0; i < plan->place_count; i++) {
        PyObject *pair = PyTuple_GetItem(tuple, i);
        if (!PyTuple_Check(pair) || PyTuple_Size(pair) != 2 || !PyDict_Check(PyTuple_GetItem(pair, 0))) return false;
        plan->places[i] = (struct place){PyTuple_GetItem(pair, 0), PyTuple_GetItem(pair, 1)};
    }
    return true;
}

static PyObject *or_null(PyObject *object) { return object == Py_None ? NULL : object; }

static bool read_guards(PyObject *tuple, struct plan *plan) {
    for (int i = 0; i < plan->guard_count; i++) {
        PyObject *three = PyTuple_GetItem(tuple, i);
        if (!PyTuple_Check(three) || PyTuple_Size(three) != 3 || !PyDict_Check(PyTuple_GetItem(three, 0))) return false;
        plan->guards[i] = (struct guard){or_null(PyTuple_GetItem(three, 0)), or_null(PyTuple_GetItem(three, 1)),
                                         or_null(PyTuple_GetItem(three, 2))};
    }
    return true;
}

static bool all_hold(const struct plan *plan) {
    for (int i = 0; i < plan->guard_count; i++) {
        const struct guard *guard = &plan->guards[i];
        if (guard->key ? PyDict_GetItem(guard->dict, guard->key) != guard->expected : PyDict_Size(guard->dict) != 0)
            return false;
    }
    return true;
}

/* plan_run(places ((dict, key), ...), guards ((dict, key, expected), ...), the number of values, inputs, outputs,
 * steps): for run(). A capsule, which owns no references, since Python's garbage collector cannot see into it, and the
 * two tuples, which own what it refers to: a model that a hook of its own refers to is still collected. */
PyObject *plan_run(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (count != 6 || !PyTuple_Check(args[0]) || !PyTuple_Check(args[1]) || !PyTuple_Check(args[5])) return nothing();
    struct plan *plan = calloc(1, sizeof *plan);
    if (plan == NULL) return PyErr_NoMemory();
    plan->place_count = (int)PyTuple_Size(args[0]);
    plan->value_count = (int)INTEGER(args[2]);
    plan->step_count = (int)PyTuple_Size(args[5]);
    plan->guard_count = (int)PyTuple_Size(args[1]);
    plan->places = calloc((size_t)plan->place_count + 1, sizeof *plan->places);
    plan->guards = calloc((size_t)plan->guard_count + 1, sizeof *plan->guards);
    plan->steps = calloc((size_t)plan->step_count + 1, sizeof *plan->steps);
    plan->templates = calloc((size_t)plan->step_count + 1, sizeof *plan->templates);
    plan->input_count = read_numbers(args[3], FXQ_STEP_INPUTS, plan->value_count, 0, plan->inputs);
    plan->output_count = read_numbers(args[4], FXQ_STEP_INPUTS, plan->value_count, 0, plan->outputs);
    bool fits = plan->places && plan->guards && plan->steps && plan->templates &&
                plan->value_count <= FXQ_MOST_VALUES && plan->input_count > 0 && plan->output_count > 0 &&
                read_places(args[0], plan) && read_guards(args[1], plan);
    for (int i = 0; fits && i < plan->step_count; i++) {
        fits = read_step(PyTuple_GetItem(args[5], i), plan, &plan->steps[i], &plan->templates[i]);
    }
    PyObject *capsule = fits ? PyCapsule_New(plan, capsule_name, release) : NULL;
    if (capsule == NULL) {
        free_plan(plan);
        return nothing();
    }
    PyObject *made = PyTuple_Pack(3, capsule, args[0], args[1]);
    Py_DECREF(capsule);
    return made;
}

/* The memory of a call: made together. */
struct memory {
    struct tensor *tensors; /* of the places, */
    PyObject **held;        /* which live as long as the call */
    int held_count;
    struct fxq_value *values;
    struct fxq_step *steps; /* copies: another thread may run the same plan */
};

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

static bool allocate(const struct plan *plan, struct memory *m) {
    const size_t tensors = (size_t)aligned((int64_t)sizeof *m->tensors * plan->place_count),
                 held = (size_t)aligned((int64_t)sizeof *m->held * plan->place_count),
                 values = (size_t)aligned((int64_t)sizeof *m->values * plan->value_count),
                 steps = sizeof *m->steps * (size_t)plan->step_count;
    char *all = malloc(tensors + held + values + steps);
    if (all == NULL) return false;
    m->tensors = (struct tensor *)all;
    m->held = (PyObject **)(all + tensors);
    m->held_count = 0;
    m->values = (struct fxq_value *)(all + tensors + held);
    m->steps = (struct fxq_step *)(all + tensors + held + values);
    memset(m->values, 0, values);
    memcpy(m->steps, plan->steps, steps);
    return true;
}

/* An input from outside: dense, by rows or by pixels. */
static bool read_input(PyObject *asks, PyObject *object, struct fxq_value *value) {
    struct tensor x;
    bool says = false, by_pixels;
    if (!may_run(asks, object) || !read_strided(object, &x) || (x.dtype != UINT8 && x.dtype != FLOAT32) ||
        x.dimensions < 1 || x.dimensions > FXQ_RANK || x.count == 0) {
        return false;
    }
    by_pixels = x.dimensions > 1 && lies_by_pixels(&x, &says) && says;
    if (!by_pixels && !read_tensor(object, &x)) return false;
    *value = (struct fxq_value){
        .dimensions = x.dimensions, .is_float = x.dtype == FLOAT32, .by_rows = !by_pixels, .data = x.data};
    memcpy(value->shape, x.shape, sizeof value->shape);
    return true;
}

static bool prepare_call(const struct plan *plan, PyObject *asks, PyObject *const *inputs, struct memory *m) {
    for (int i = 0; i < plan->place_count; i++) {
        PyObject *tensor = PyDict_GetItem(plan->places[i].dict, plan->places[i].key);
        if (tensor == NULL || !read_strided(tensor, &m->tensors[i])) return false;
        Py_INCREF(tensor);
        m->held[m->held_count++] = tensor;
    }
    for (int i = 0; i < plan->input_count; i++) {
        if (!read_input(asks, inputs[i], &m->values[plan->inputs[i]])) return false;
    }
    for (int i = 0; i < plan->step_count; i++) {
        if (!prepare_step(&plan->templates[i], m->tensors, &m->steps[i], m->values)) return false;
    }
    return true;
}

/* The outputs' tensors. Those that have to be turned keep a place in the arena first. */
static PyObject *make_outputs(const struct plan *plan, struct fxq_value *values) {
    PyObject *all = PyTuple_New(plan->output_count);
    for (int i = 0; all && i < plan->output_count; i++) {
        struct fxq_value *value = &values[plan->outputs[i]];
        int64_t strides[MOST_DIMENSIONS];
        struct tensor made;
        set_strides(value->shape, value->dimensions, !value->by_rows && value->dimensions > 3, strides);
        PyObject *one = new_strided(value->shape, strides, value->dimensions, value->is_float ? FLOAT32 : UINT8, &made);
        if (one == NULL || PyTuple_SetItem(all, i, one) != 0) {
            Py_DECREF(all);
            return NULL;
        }
        if (!value->by_rows || value->dimensions < 3 || value->is_turned) value->data = made.data;
        else value->leaves = made.data;
    }
    return all;
}

/* run(asks, plan, input, ...): a tuple of the outputs */
PyObject *run(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    PyObject *capsule = count > 1 && PyTuple_Check(args[1]) ? PyTuple_GetItem(args[1], 0) : NULL;
    const struct plan *plan = capsule ? PyCapsule_GetPointer(capsule, capsule_name) : NULL;
    struct memory m;
    if (plan == NULL || count != 2 + plan->input_count) return nothing();
    if (!allocate(plan, &m)) return PyErr_NoMemory();
    const bool fits = all_hold(plan) && prepare_call(plan, args[0], args + 2, &m);
    const int threads = fits ? thread_count() : -1;
    PyObject *outputs = threads > 0 ? make_outputs(plan, m.values) : NULL;
    int status = FXQ_OK;
    if (outputs) {
        Py_BEGIN_ALLOW_THREADS
        status = fxq_run_steps(m.steps, plan->step_count, m.values, threads);
        fxq_trim_arena();
        Py_END_ALLOW_THREADS
    }
    for (int i = 0; i < m.held_count; i++) Py_DECREF(m.held[i]);
    free(m.tensors);
    return outputs ? finish(status, outputs) : nothing();
}
