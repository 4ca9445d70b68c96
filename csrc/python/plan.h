/* A run of static operators, read once from Python, and its shapes at each call. See plan.c and call_run.c. */
#ifndef FXQUANT_PYTHON_PLAN_H
#define FXQUANT_PYTHON_PLAN_H

#include "kernels.h"
#include "calls/calls.h"
#include "calls/layout.h"

enum { STEP_PLACES = 9, STEP_INTEGERS = 19 };

/* What a step reads beside its values: the numbers of places, -1 for none; and constants, by operator. */
struct template {
    int places[STEP_PLACES];
    int64_t integers[STEP_INTEGERS];
    float low, high, slope;
};

/* A tensor that is looked up at each call: whoever replaces it, or its memory, is heard. */
struct place {
    PyObject *dict, *key;
};

/* What must still be so, or a run's nodes are to be called one by one: somebody replaced a module, its forward, or hung
 * a hook on it. */
struct guard {
    PyObject *dict, *key, *expected; /* key NULL: the dict is empty; expected NULL: it has no such key */
};

struct plan {
    int place_count, guard_count, value_count, step_count, input_count, output_count;
    struct place *places;
    struct guard *guards;
    struct fxq_step *steps;
    struct template *templates;
    int inputs[FXQ_STEP_INPUTS], outputs[FXQ_STEP_INPUTS];
};

CALL(plan_run); /* call_run.c */
CALL(run);

/* Fills in a step and its output's shape; whether they fit. tensors: of the places. */
bool prepare_step(const struct template *template, const struct tensor *tensors, struct fxq_step *step,
                  struct fxq_value *values);

#endif
