/* The operators of the namespace fxquant, for programs without Python. */
#ifndef FXQUANT_TORCH_OPERATORS_H
#define FXQUANT_TORCH_OPERATORS_H

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

extern "C" {
#include "calls/calls.h"
}

/* What becomes of arguments that a call does not take as they lie, and of what it then gives. */
enum class Operands {
    FLOATS,   /* dense and float32; the result in the first one's dtype */
    INDICES,  /* a table's: dense; the result in the argument dtype */
    PIXELS,   /* pixel by pixel; the result as the first one lies */
    LIKE,     /* dense; the result as the first one lies */
    ANYHOW,   /* dense */
    ATTENTION /* floats of any strides; the result as torch lays it out */
};

struct Operator {
    const char *name, *overload, *schema; /* the schema as of fxquant/ops/ */
    object (*call)(object const *args, int64_t count);
    Operands operands;
    int results;
};
constexpr int OPERATORS = 21;
extern const Operator operators[OPERATORS];

/* An operator's arguments, as its schema has them. */
struct Argument {
    std::string type, name;
};
const std::vector<Argument> &arguments_of(const Operator &op);

/* The results of an operator; std::runtime_error for arguments that it does not take. */
std::vector<torch::stable::Tensor> run_operator(const Operator &op, std::vector<fxq_argument> args);

#endif
