/* The operators' schemas, which are those of fxquant/ops/ (tests/ops/test_without_python.py compares them). */
#include "torch/operators.h"

#include <algorithm>

const Operator operators[OPERATORS] = {
    {"matmul", "", "(Tensor a, Tensor b) -> Tensor", matmul, Operands::FLOATS, 1},
    {"attention", "",
     "(Tensor query, Tensor key, Tensor value, Tensor? mask=None, bool is_causal=False, float? "
     "scale=None) -> Tensor",
     attention, Operands::ATTENTION, 1},
    {"embedding", "",
     "(Tensor indices, Tensor weight, Tensor? scale, Tensor? zero_point, SymInt embedding_dim, str "
     "format='int8', ScalarType dtype=float32) -> Tensor",
     embedding, Operands::INDICES, 1},
    {"embedding_bag", "",
     "(Tensor indices, Tensor weight, Tensor? scale, Tensor? zero_point, SymInt embedding_dim, "
     "Tensor? offsets=None, str mode='mean', Tensor? per_sample_weights=None, bool "
     "include_last_offset=False, int? padding_idx=None, str format='int8', ScalarType dtype=float32) "
     "-> Tensor",
     embedding_bag, Operands::INDICES, 1},
    {"linear", "per_token",
     "(Tensor x, Tensor weight, Tensor? scale, Tensor? bias=None, bool relu=False, bool "
     "per_token=True, int qmax=255, str format='int8', int group_size=0, int in_features=0) -> Tensor",
     linear, Operands::FLOATS, 1},
    {"quantize", "", "(Tensor x, Tensor scale, Tensor zero_point, int qmax=255) -> Tensor", quantize, Operands::LIKE,
     1},
    {"dequantize", "", "(Tensor q, Tensor scale, Tensor zero_point) -> Tensor", dequantize, Operands::LIKE, 1},
    {"lookup", "", "(Tensor q, Tensor table) -> Tensor", lookup, Operands::LIKE, 1},
    {"add_values", "",
     "(Tensor a, Tensor a_scale, Tensor a_zero_point, Tensor b, Tensor b_scale, Tensor b_zero_point, "
     "Tensor scale, Tensor zero_point, int qmax=255, float alpha=1.0, float? low=None, float? "
     "high=None) -> Tensor",
     add_values, Operands::PIXELS, 1},
    {"mul_values", "",
     "(Tensor a, Tensor a_scale, Tensor a_zero_point, Tensor b, Tensor b_scale, Tensor b_zero_point, "
     "Tensor scale, Tensor zero_point, int qmax=255, float? low=None, float? high=None) -> Tensor",
     mul_values, Operands::PIXELS, 1},
    {"mean_value", "",
     "(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor scale, Tensor zero_point, int[] dims, "
     "bool keepdim=False, int qmax=255) -> Tensor",
     mean_value, Operands::PIXELS, 1},
    {"pool_value", "",
     "(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor scale, Tensor zero_point, int[] kernel, "
     "int[] stride, int[] padding, bool ceil_mode=False, bool count_include_pad=True, int? "
     "divisor=None, int qmax=255) -> Tensor",
     pool_value, Operands::PIXELS, 1},
    {"adaptive_pool_value", "",
     "(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor scale, Tensor zero_point, SymInt[] size, "
     "int qmax=255) -> Tensor",
     adaptive_pool_value, Operands::PIXELS, 1},
    {"max_pool_value", "",
     "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode=False) -> "
     "Tensor",
     max_pool_value, Operands::PIXELS, 1},
    {"pad_value", "", "(Tensor x, Tensor zero_point, SymInt[] pad) -> Tensor", pad_value, Operands::ANYHOW, 1},
    {"resize_value", "", "(Tensor x, SymInt[]? size=None, float[]? factors=None, bool align_corners=False) -> Tensor",
     resize_value, Operands::ANYHOW, 1},
    {"lookup_channels", "", "(Tensor q, Tensor table) -> Tensor", lookup_channels, Operands::ANYHOW, 1},
    {"lstm", "per_token",
     "(Tensor x, Tensor? batch_sizes, Tensor h0, Tensor c0, Tensor[] weights, Tensor[] scales, "
     "Tensor[] biases, bool bidirectional=False, bool per_token=True, int qmax=255, str[]? "
     "formats=None) -> (Tensor, Tensor, Tensor)",
     lstm, Operands::FLOATS, 3},
    {"rnn", "per_token",
     "(Tensor x, Tensor? batch_sizes, Tensor h0, Tensor[] weights, Tensor[] scales, Tensor[] biases, "
     "Tensor[] hidden_biases, str mode, bool bidirectional=False, bool per_token=True, int qmax=255, "
     "str[]? formats=None) -> (Tensor, Tensor)",
     rnn, Operands::FLOATS, 2},
    {"static_linear", "",
     "(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_scale, Tensor? "
     "bias=None, Tensor? scale=None, Tensor? zero_point=None, Tensor? addend=None, Tensor? "
     "addend_scale=None, Tensor? addend_zero_point=None, int qmax=255, float? low=None, float? "
     "high=None, str? curve=None, float slope=0.0) -> Tensor",
     static_linear, Operands::ANYHOW, 1},
    {"static_convolution", "",
     "(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_scale, Tensor? "
     "bias, Tensor? scale, Tensor? zero_point, int[] stride, int[] padding, int[] dilation, int "
     "groups=1, bool is_transposed=False, int[] output_padding=[], Tensor? addend=None, Tensor? "
     "addend_scale=None, Tensor? addend_zero_point=None, int qmax=255, float? low=None, float? "
     "high=None, str? curve=None, float slope=0.0) -> Tensor",
     static_convolution, Operands::PIXELS, 1},
};

/* The words of "(Tensor x, int qmax=255, …)", a type and a name at a time. */
static std::vector<Argument> parse(const std::string &schema) {
    std::vector<Argument> arguments;
    const size_t end = schema.find(") ->");
    for (size_t at = 1; at < end;) {
        const size_t space = schema.find(' ', at), comma = std::min(schema.find(", ", at), end);
        const size_t stop = std::min(schema.find('=', space), comma);
        arguments.push_back({schema.substr(at, space - at), schema.substr(space + 1, stop - space - 1)});
        at = comma + 2;
    }
    return arguments;
}

const std::vector<Argument> &arguments_of(const Operator &op) {
    static const std::vector<std::vector<Argument>> all = [] {
        std::vector<std::vector<Argument>> parsed;
        for (const Operator &each : operators) parsed.push_back(parse(each.schema));
        return parsed;
    }();
    return all[(size_t)(&op - operators)];
}
