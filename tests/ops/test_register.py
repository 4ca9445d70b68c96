"""The operators as torch sees them: opcheck, fake shapes, and that all their parts agree."""

import inspect
import types

import pytest
import torch

from fxquant import ArgumentError, DTypeError, ModelStateError, ShapeError, ops
from fxquant.ops import KERNELS, library
from tests.ops import reference
from tests.ops.operands import lstm_arguments, quantized, quantized_int4, rnn_arguments, table_arguments
from tests.samples import same_bits

ROUNDED = ("matmul", "attention")  # sums of floats: the kernels round them otherwise


def cases():
    x = torch.randn(3, 6)
    yield "linear", (x, *quantized(4, 6)), {}
    yield "linear", (x.half(), *quantized(4, 6), torch.randn(4), True, False, 127), {}
    yield "linear", (torch.randn(2, 3, 6), torch.randn(4, 6).half(), None), {"format": "float16"}
    yield "linear", (torch.randn(0, 6), *quantized(4, 6)), {}
    weight, groups = quantized_int4(4, 75)
    yield "linear", (torch.randn(2, 3, 75), *weight, torch.randn(4), True, True, 255, *groups), {}
    yield "linear", (torch.randn(3, 75).half(), *weight, None, False, False, 127, *groups), {}
    yield "lstm", lstm_arguments(), {}
    yield "lstm", lstm_arguments(layers=2, directions=2, proj=3), {}
    yield "lstm", lstm_arguments(bias=False, packed=True), {}
    yield "rnn", rnn_arguments("gru"), {}
    yield "rnn", rnn_arguments("rnn_tanh", packed=True), {}
    yield "rnn", rnn_arguments("rnn_relu"), {"per_token": False, "qmax": 127}
    yield "embedding", table_arguments(), {}
    yield "embedding", table_arguments(bits=4), {"format": "uint4", "dtype": torch.float16}
    yield "embedding", table_arguments(affine=True), {"format": "uint8"}
    yield "embedding_bag", table_arguments(), {"mode": "max"}
    weights = torch.rand(12)
    indices, *table = table_arguments(affine=True)
    options = {"offsets": torch.tensor([0, 5, 12]), "mode": "sum", "per_sample_weights": weights}
    yield (
        "embedding_bag",
        (indices.reshape(-1), *table),
        {**options, "include_last_offset": True, "padding_idx": 3, "format": "uint8"},
    )
    yield "matmul", (torch.randn(2, 3, 6), torch.randn(4, 1, 6, 5)), {}
    yield "matmul", (torch.randn(6).double(), torch.randn(6, 5).double()), {}
    yield "matmul", (torch.randn(2, 3, 6, requires_grad=True), torch.randn(6, requires_grad=True)), {}
    heads = [torch.randn(2, 2, length, width, requires_grad=True) for length, width in ((3, 6), (5, 6), (5, 4))]
    yield "attention", (*heads, torch.randn(2, 1, 1, 5)), {}
    yield "attention", tuple(x.detach()[0, 0].half() for x in heads), {"is_causal": True, "scale": 0.3}
    yield from value_cases()
    yield "attention", (*(x.detach()[:1] for x in heads), torch.ones(3, 5, dtype=torch.bool).tril()), {}


def value_cases():
    """Yield the operators of static models: uint8 values, each with a scale and a zero point."""
    scale, zero = torch.tensor(0.02), torch.tensor(128, dtype=torch.int32)
    q = torch.randint(256, (2, 4, 5, 6), dtype=torch.uint8)
    value = (q, scale, zero)
    yield "quantize", (torch.randn(2, 3), scale, zero), {}
    yield "dequantize", value, {}
    yield "lookup", (q, torch.arange(255, -1, -1).to(torch.uint8)), {}
    yield "lookup_channels", (q, torch.randint(256, (4, 256), dtype=torch.uint8)), {}
    yield "resize_value", (q, [3, 9]), {"align_corners": True}
    yield "resize_value", (q,), {"factors": [2.0, 1.5]}
    yield "add_values", (*value, *value, scale, zero), {"alpha": -1.0, "low": 0.0}
    yield "mul_values", (*value, q[:, :1], scale, zero, scale, zero), {"high": 6.0}
    yield "mean_value", (*value, scale, zero, [2, -1]), {"keepdim": True}
    yield "pool_value", (*value, scale, zero, [3, 3], [2, 2], [1, 1]), {"ceil_mode": True}
    yield "adaptive_pool_value", (*value, scale, zero, [2, 3]), {}
    yield "max_pool_value", (q, [3, 2], [2, 2], [1, 0], [1, 1]), {}
    yield "pad_value", (q, zero, [1, 0, 2, 1]), {}
    weight, weight_scale = torch.randint(-127, 128, (8, 6), dtype=torch.int8), torch.rand(8)
    yield "static_linear", (*value, weight, weight_scale, torch.randn(8), scale, zero), {}
    yield "static_linear", (*value, weight, weight_scale), {"low": 0.0}
    kernel = torch.randint(-127, 128, (8, 2, 3, 3), dtype=torch.int8)
    yield "static_convolution", (*value, kernel, weight_scale, None, scale, zero, [1, 2], [1] * 4, [1, 1], 2), {}
    kernel = torch.randint(-127, 128, (4, 8, 3, 3), dtype=torch.int8)
    options = {"is_transposed": True, "output_padding": [1, 0], "high": 6.0}
    yield "static_convolution", (*value, kernel, weight_scale, None, None, None, [2, 2], [1] * 4, [1, 1]), options


CASES = list(cases())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.14's opcheck looks at that of copies
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_opcheck(case):
    name, args, kwargs = case
    torch.library.opcheck(ops.OVERLOADS[name], args, kwargs)


def test_every_operator_is_opchecked_here():
    assert {case[0] for case in CASES} == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_a_function_has_its_schemas_arguments_and_defaults(name):
    schema = ops.OVERLOADS[name]._schema
    arguments = KERNELS[name].arguments
    assert arguments._fields == tuple(argument.name for argument in schema.arguments)
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    ours = dict(arguments._field_defaults)
    assert ours.keys() == defaults.keys()
    assert ours.pop("dtype", None) in (None, torch.float32)  # which a schema has as a number
    assert all(defaults[key] == (list(value) if isinstance(value, tuple) else value) for key, value in ours.items())
    function = inspect.signature(getattr(ops, name))
    assert list(function.parameters)[: len(arguments._fields)] == list(arguments._fields)
    assert getattr(ops, name).__module__ == "fxquant.ops"


def test_a_function_that_the_library_lacks_is_an_error(monkeypatch):
    monkeypatch.setattr(library, "_library", types.SimpleNamespace(__file__="old.so"))
    with pytest.raises(ModelStateError, match=r"old\.so has no 'linear'; install fxquant again"):
        library.function("linear")
    monkeypatch.setattr(library, "_library", None)
    assert library.function("linear") is None


WITH_REFERENCE = [case for case in CASES if hasattr(reference, case[0])]  # the others: test_values.py, test_static.py


@pytest.mark.parametrize("case", WITH_REFERENCE, ids=lambda c: c[0])
def test_the_functions_give_the_references_numbers(case):
    name, args, kwargs = case
    got, expected = ops.OVERLOADS[name](*args, **kwargs), getattr(reference, name)(*args, **kwargs)
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    exact = name not in ROUNDED and not any(t.dtype == torch.float16 for t in args if isinstance(t, torch.Tensor))
    for a, b in pairs:
        assert (
            torch.equal(a, b)
            if exact
            else torch.allclose(a, b, rtol=2**-10 if a.dtype == torch.half else 1e-6, atol=1e-6)
        )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_no_operand_is_changed(case):
    name, args, kwargs = case
    flat = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, list) else [a]) if torch.is_tensor(t)]
    before = [t.clone() for t in flat]
    ops.OVERLOADS[name](*args, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(before, flat, strict=True))


LINEAR = quantized(4, 6)


@pytest.mark.parametrize("qmax", [0, -1, 256, 2**32 + 255])
def test_activations_of_8_bits_have_a_greatest_integer_of_8_bits(qmax):
    match = rf"takes qmax from 1 to 255, got {qmax}"
    weight, groups = quantized_int4(4, 75)
    with pytest.raises(ArgumentError, match=match):
        ops.linear(torch.zeros(3, 6), *LINEAR, None, False, True, qmax)
    with pytest.raises(ArgumentError, match=match):
        ops.linear(torch.zeros(3, 75), *weight, None, False, True, qmax, *groups)
    with pytest.raises(ArgumentError, match=match):
        ops.lstm(*lstm_arguments(), True, qmax)
    with pytest.raises(ArgumentError, match=match):
        ops.rnn(*rnn_arguments("gru"), True, qmax)


@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_compiled_graphs_refuse_with_the_same_words(name):
    with torch.device("meta"):
        if name == "linear":
            with pytest.raises(ShapeError, match="of 6 inputs takes"):
                ops.linear(torch.zeros(3, 5), torch.zeros(4, 6, dtype=torch.int8), torch.ones(4))
        else:
            with pytest.raises(DTypeError, match="takes int32 or int64"):
                ops.embedding(torch.zeros(3), torch.zeros(4, 6, dtype=torch.int8), torch.ones(4), None, 6)


OLD = {
    "linear": lambda: (torch.randn(3, 6) * torch.tensor([[1.0], [2], [3]]), *quantized(4, 6)),
    "lstm": lstm_arguments,
    "rnn": lambda: rnn_arguments("gru"),
}


@pytest.mark.parametrize("name", OLD)
def test_per_row_is_an_old_name_of_per_token(name):
    arguments = OLD[name]()
    expected = getattr(ops, name)(*arguments, per_token=False)
    with pytest.warns(DeprecationWarning, match=r"per_row of fxquant\.ops is now per_token"):
        assert same_bits(getattr(ops, name)(*arguments, per_row=False), expected)
    assert not same_bits(getattr(ops, name)(*arguments), expected)
    registered = getattr(torch.ops.fxquant, name)
    assert same_bits(registered(*arguments, per_token=False), expected)
    assert same_bits(registered.default(*arguments, per_row=False), expected)  # as in files of torch.export


def _as(dtype, value):
    if isinstance(value, list):
        return [_as(dtype, part) for part in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


WITH_FLOATS = {
    "linear": lambda dtype: ((_as(dtype, torch.randn(6, 3).t()), *quantized(4, 6), _as(dtype, torch.randn(4))), {}),
    "lstm": lambda dtype: ([_as(dtype, a) if i in (0, 2, 3, 6) else a for i, a in enumerate(lstm_arguments())], {}),
    "rnn": lambda dtype: ([_as(dtype, a) if i in (0, 2, 5, 6) else a for i, a in enumerate(rnn_arguments("gru"))], {}),
    "embedding": lambda dtype: (table_arguments(), {"dtype": dtype}),
    "embedding_bag": lambda dtype: (
        (torch.tensor([[1, 2], [0, 3]]), *table_arguments()[1:]),
        {"mode": "sum", "per_sample_weights": torch.rand(2, 2).to(dtype), "dtype": dtype},
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", WITH_FLOATS)
def test_other_floats_reach_the_library_without_the_dispatcher(name, dtype, monkeypatch):
    args, kwargs = WITH_FLOATS[name](dtype)
    with torch.no_grad():
        expected = ops.OVERLOADS[name](*args, **kwargs)
        monkeypatch.setitem(ops.OVERLOADS, name, None if library.available() else ops.OVERLOADS[name])
        got = getattr(ops, name)(*args, **kwargs)
    assert same_bits(got, expected)
    assert (got if isinstance(got, torch.Tensor) else got[0]).dtype == dtype


def test_a_gradient_passes_other_floats():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    ops.linear(x, *LINEAR).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float64
    assert x.grad.any()
