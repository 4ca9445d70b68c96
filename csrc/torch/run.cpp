/* A call of an operator: its arguments as they lie, and where the kernels do not take these, copies that they take. */
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>

#include "torch/operators.h"

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

static Tensor tensor_of(const fxq_argument &argument) {
    AtenTensorHandle copy;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle((AtenTensorHandle)argument.as.tensor, &copy));
    return Tensor(copy);
}

/* The call's results, none where the kernels do not take the arguments. in_place: only if the results lie as torch's
 * would. */
static Tensors call(const Operator &op, std::vector<fxq_argument> &args, bool in_place) {
    fxq_argument asks = {FXQ_IS_INTEGER, 0, {in_place}};
    std::vector<object> places = {&asks};
    for (auto &argument : args) places.push_back(&argument);
    const object made = op.call(places.data(), (int64_t)places.size());
    if (made == nullptr) throw std::runtime_error(std::string("fxquant::") + op.name + ": out of memory");
    Tensors results;
    if (made->tag == FXQ_IS_TENSOR) results.emplace_back((AtenTensorHandle)made->as.tensor);
    for (int64_t i = 0; made->tag == FXQ_IS_LIST && i < made->count; i++) {
        results.emplace_back((AtenTensorHandle)made->as.items[i].as.tensor);
    }
    if (made->tag == FXQ_IS_LIST) free(made->as.items);
    if (made != NONE) free(made); /* what it holds belongs to the results now */
    return results;
}

static bool is_float(ScalarType type) {
    return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
           type == ScalarType::BFloat16;
}

/* A value whose channels are its second dimension, pixel by pixel. */
static Tensor by_pixels(const Tensor &x) {
    const int64_t rank = x.dim();
    if (rank == 4) return contiguous(x, MemoryFormat::ChannelsLast);
    if (rank == 5) return contiguous(x, MemoryFormat::ChannelsLast3d);
    return rank == 3 ? transpose(contiguous(transpose(x, 1, 2)), 1, 2) : contiguous(x);
}

static bool is_by_pixels(const Tensor &x) {
    struct fxq_argument argument = {FXQ_IS_TENSOR, 0, {0}};
    argument.as.tensor = x.get();
    struct tensor read;
    bool says = false;
    return read_strided(&argument, &read) && read.dimensions > 3 && lies_by_pixels(&read, &says) && says;
}

/* A tensor as the kernels take it. Weights, and scales in bfloat16, stay what they are. */
static Tensor prepare(const Operator &op, const std::string &name, const Tensor &x) {
    const ScalarType type = x.scalar_type();
    const bool is_stored =
        name.rfind("weight", 0) == 0 || (name.rfind("scale", 0) == 0 && type == ScalarType::BFloat16);
    if (op.operands == Operands::PIXELS) return type == ScalarType::Byte ? by_pixels(x) : x;
    if (!is_stored && is_float(type) && type != ScalarType::Float) return contiguous(to(x, ScalarType::Float));
    return op.operands == Operands::ATTENTION ? x : contiguous(x);
}

/* Arguments that the kernels take, and what they refer to. */
struct Prepared {
    std::vector<fxq_argument> args;
    std::deque<std::vector<fxq_argument>> lists;
    Tensors tensors;

    Prepared(const Operator &op, const std::vector<fxq_argument> &given) : args(given) {
        const std::vector<Argument> &names = arguments_of(op);
        for (size_t i = 0; i < args.size(); i++) {
            if (args[i].tag == FXQ_IS_TENSOR) take(op, names[i].name, args[i]);
            if (names[i].type == "Tensor[]") {
                lists.emplace_back(args[i].as.items, args[i].as.items + args[i].count);
                for (fxq_argument &part : lists.back()) take(op, names[i].name, part);
                args[i].as.items = lists.back().data();
            }
            if (names[i].type == "ScalarType") args[i].as.integer = aoti_torch_dtype_float32();
        }
    }

    void take(const Operator &op, const std::string &name, fxq_argument &argument) {
        tensors.push_back(prepare(op, name, tensor_of(argument)));
        argument.as.tensor = tensors.back().get();
    }
};

/* What torch's attention gives the query's strides: see fxquant/ops/attention.py. */
static bool is_laid_out_as_query(const Tensor &q, const Tensor &k, const Tensor &v, const fxq_argument &mask) {
    const int64_t dimensions = mask.tag == FXQ_IS_TENSOR ? tensor_of(mask).dim() : 2;
    return q.size(0) == k.size(0) && k.size(0) == v.size(0) && q.size(1) == k.size(1) && k.size(1) == v.size(1) &&
           q.size(3) == v.size(3) && q.size(2) > 0 && k.size(2) > 0 && q.stride(3) == 1 && k.stride(3) == 1 &&
           v.stride(3) == 1 && (dimensions == 2 || dimensions == 4);
}

/* Attention's result, (B, L, H, O), as torch's (B, H, L, O). */
static Tensor lay_out(const std::vector<fxq_argument> &args, const Tensor &attended) {
    const Tensor q = tensor_of(args[0]), turned = transpose(attended, 1, 2);
    if (!is_laid_out_as_query(q, tensor_of(args[1]), tensor_of(args[2]), args[3])) return contiguous(turned);
    bool is_same = true;
    for (int64_t i = 0; i < 4; i++) is_same = is_same && turned.stride(i) == q.stride(i);
    if (is_same) return turned;
    Tensor made = empty_like(to(q, turned.scalar_type()));
    return copy_(made, turned);
}

/* An attention's scale where none is given; false: it has other dimensions than (B, H, L, E). */
static bool complete_attention(std::vector<fxq_argument> &args) {
    const Tensor q = tensor_of(args[0]);
    if (q.dim() != 4) return false;
    if (args[5].tag == FXQ_IS_NONE) {
        args[5].tag = FXQ_IS_NUMBER;
        args[5].as.number = 1.0 / std::sqrt((double)std::max<int64_t>(q.size(3), 1));
    }
    return true;
}

/* What a call gave, in the dtype that the operator's result has, and as it lies. */
static void finish(const Operator &op, const std::vector<fxq_argument> &args, bool is_in_place, Tensors *results) {
    const Tensor first = tensor_of(args[0]);
    for (Tensor &result : *results) {
        if (op.operands == Operands::LIKE && !is_in_place) {
            Tensor made = empty_like(to(first, result.scalar_type()));
            result = copy_(made, result);
        }
        if (op.operands == Operands::PIXELS && !is_by_pixels(first)) result = contiguous(result);
        if (op.operands == Operands::FLOATS || op.operands == Operands::ATTENTION) {
            if (first.scalar_type() != ScalarType::Float) result = to(result, first.scalar_type());
        }
        const std::vector<Argument> &names = arguments_of(op);
        if (op.operands == Operands::INDICES && names.back().type == "ScalarType") {
            const ScalarType type =
                torch::stable::detail::to<ScalarType>(torch::stable::detail::from((int32_t)args.back().as.integer));
            if (type != ScalarType::Float) result = to(result, type);
        }
    }
}

/* Products of two float64 activations have float64 sums, for which there is no kernel. */
static bool needs_doubles(const Operator &op, const std::vector<fxq_argument> &args) {
    const bool is_product = op.operands == Operands::ATTENTION || std::string("matmul") == op.name;
    return is_product && tensor_of(args[0]).scalar_type() == ScalarType::Double;
}

std::vector<Tensor> run_operator(const Operator &op, std::vector<fxq_argument> args) {
    const bool is_attention = op.operands == Operands::ATTENTION;
    bool is_in_place = false;
    Tensors results;
    if (!is_attention || complete_attention(args)) {
        results = call(op, args, true);
        is_in_place = !results.empty();
        if (!is_in_place && !needs_doubles(op, args)) {
            Prepared prepared(op, args);
            results = call(op, prepared.args, false);
        }
    }
    if (results.empty()) {
        throw std::runtime_error(std::string("fxquant::") + op.name +
                                 ": the arguments do not fit each other, or only fxquant's Python package takes them");
    }
    if (is_attention) results[0] = lay_out(args, results[0]);
    finish(op, args, is_in_place, &results);
    return results;
}
