/* What calls read their arguments with, and give their results as: Python's objects, or torch's values. */
#ifndef FXQUANT_DOOR_H
#define FXQUANT_DOOR_H

#ifdef FXQ_FOR_TORCH
#include "torch/door.h"
#else
#include "python/door.h"
#endif

#endif
