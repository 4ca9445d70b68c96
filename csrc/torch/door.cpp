/* The two doors to the operators for programs without Python: torch's dispatcher, and fxq_call for compiled models. */
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <deque>
#include <exception>
#include <optional>
#include <utility>

#include "torch/operators.h"

using torch::stable::Tensor;
namespace values = torch::stable::detail;

/* The values of a call from the dispatcher, and arguments that refer to them. */
struct Values {
    std::deque<Tensor> tensors;
    std::deque<std::string> texts;
    std::deque<std::vector<fxq_argument>> lists;

    fxq_argument keep(Tensor value) {
        tensors.push_back(std::move(value));
        fxq_argument argument = {FXQ_IS_TENSOR, 0, {0}};
        argument.as.tensor = tensors.back().get();
        return argument;
    }
    fxq_argument keep(std::string value) {
        texts.push_back(std::move(value));
        fxq_argument argument = {FXQ_IS_TEXT, 0, {0}};
        argument.as.text = texts.back().c_str();
        return argument;
    }
    static fxq_argument keep(int64_t value) { return {FXQ_IS_INTEGER, 0, {value}}; }
    static fxq_argument keep(double value) {
        fxq_argument argument = {FXQ_IS_NUMBER, 0, {0}};
        argument.as.number = value;
        return argument;
    }
    template <typename T> fxq_argument keep(std::vector<T> values) {
        std::vector<fxq_argument> items;
        for (T &value : values) items.push_back(keep(std::move(value)));
        lists.push_back(std::move(items));
        fxq_argument argument = {FXQ_IS_LIST, (int64_t)lists.back().size(), {0}};
        argument.as.items = lists.back().data();
        return argument;
    }
    template <typename T> fxq_argument keep(std::optional<T> value) {
        return value ? keep(std::move(*value)) : fxq_argument{FXQ_IS_NONE, 0, {0}};
    }

    fxq_argument read(const std::string &type, StableIValue value) {
        if (type == "Tensor") return keep(values::to<Tensor>(value));
        if (type == "Tensor?") return keep(values::to<std::optional<Tensor>>(value));
        if (type == "Tensor[]") return keep(values::to<std::vector<Tensor>>(value));
        if (type == "bool") return keep((int64_t)values::to<bool>(value));
        if (type == "int" || type == "SymInt") return keep(values::to<int64_t>(value));
        if (type == "int?") return keep(values::to<std::optional<int64_t>>(value));
        if (type == "int[]" || type == "SymInt[]") return keep(values::to<std::vector<int64_t>>(value));
        if (type == "SymInt[]?") return keep(values::to<std::optional<std::vector<int64_t>>>(value));
        if (type == "float[]?") return keep(values::to<std::optional<std::vector<double>>>(value));
        if (type == "float") return keep(values::to<double>(value));
        if (type == "float?") return keep(values::to<std::optional<double>>(value));
        if (type == "str") return keep(values::to<std::string>(value));
        if (type == "str?") return keep(values::to<std::optional<std::string>>(value));
        if (type == "str[]?") return keep(values::to<std::optional<std::vector<std::string>>>(value));
        if (type == "ScalarType") return keep((int64_t)values::to<int32_t>(value));
        throw std::runtime_error("fxquant: a schema has an argument of type " + type);
    }
};

template <int I> static void run_boxed(StableIValue *stack, uint64_t, uint64_t) {
    Values kept;
    std::vector<fxq_argument> args;
    size_t at = 0;
    for (const Argument &argument : arguments_of(operators[I])) args.push_back(kept.read(argument.type, stack[at++]));
    at = 0;
    for (const Tensor &result : run_operator(operators[I], std::move(args))) {
        stack[at++] = values::from(result);
    }
}

/* The kernels are chosen here, unless Python has done so: FXQUANT_ISA names them, as there. */
static void choose_kernels() {
    const char *name = std::getenv("FXQUANT_ISA");
    if (!fxq_begin()) return;
    for (int i = 0; name && i < fxq_isa_count(); i++) {
        if (std::string(name) == fxq_isa_name(i) && !*fxq_isa_obstacle(i)) fxq_select_isa(i);
    }
}

/* As STABLE_TORCH_LIBRARY does, but nothing where Python has defined the operators, in whatever order both are loaded.
 */
struct Registration {
    TorchLibraryHandle definitions = nullptr, kernels = nullptr;

    Registration() {
        choose_kernels();
        if (fxq_is_registered) return;
        fxq_is_registered = true;
        if (aoti_torch_library_init_fragment("fxquant", __FILE__, __LINE__, &definitions) ||
            aoti_torch_library_init_impl("fxquant", "CPU", __FILE__, __LINE__, &kernels)) {
            return;
        }
        add(std::make_integer_sequence<int, OPERATORS>());
    }
    template <int... I> void add(std::integer_sequence<int, I...>) { (add_one(operators[I], run_boxed<I>), ...); }
    void add_one(const Operator &op, void (*run)(StableIValue *, uint64_t, uint64_t)) {
        const std::string name = std::string(op.name) + (*op.overload ? "." : "") + op.overload;
        if (aoti_torch_library_def(definitions, (name + op.schema).c_str())) return; /* somebody else's */
        torch_library_impl(kernels, name.c_str(), run, TORCH_ABI_VERSION);
    }
};
static Registration registration;

static thread_local std::string failure;

extern "C" {
/* What compiled models call. Returns NULL, with the results in `results`, or what is wrong. */
__attribute__((visibility("default"))) const char *fxq_call_1(const char *name, const struct fxq_argument *args,
                                                              int64_t count, AtenTensorHandle *results) {
    try {
        for (const Operator &op : operators) {
            if (std::string(op.name) != name) continue;
            if (arguments_of(op).size() != (size_t)count) break;
            for (Tensor &result : run_operator(op, std::vector<fxq_argument>(args, args + count))) {
                STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(result.get(), results++));
            }
            return nullptr;
        }
        failure = std::string("fxquant has no operator ") + name + " of " + std::to_string(count) + " arguments";
    } catch (const std::exception &error) {
        failure = error.what();
    }
    return failure.c_str();
}
}
