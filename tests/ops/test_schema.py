"""The operators as torch sees them: opcheck, fake shapes, and what they refuse."""

import pytest
import torch

from fxquant import ArgumentError, DTypeError, ShapeError, ops
from fxquant.ops import reference, reference_products, reference_recurrent, schema
from fxquant.qconfig import default_dynamic_qconfig, int4_dynamic_qconfig, int16_dynamic_qconfig

INT8 = default_dynamic_qconfig
REFERENCES = {**vars(reference), **vars(reference_recurrent), **vars(reference_products)}
ROUNDED = ("embedding_bag", "matmul", "attention")  # sums of floats: the kernels round them otherwise


def quantized(*shape):
    return INT8.quantize_weight(torch.randn(*shape))[:2]


def quantized_int4(outputs, columns, group_size=32):
    """Return (weight, scale) and (group_size, in_features)."""
    weight = int4_dynamic_qconfig.with_group_size(group_size).quantize_weight(torch.randn(outputs, columns))
    return weight[:2], (group_size, columns)


def lstm_arguments(inputs=6, hidden=5, layers=1, directions=1, proj=0, bias=True, packed=False):
    """Return the operands of one call of the lstm operator."""
    torch.manual_seed(1)
    size = proj or hidden
    weights, scales, biases = [], [], []
    for layer in range(layers):
        for _ in range(directions):
            shapes = [(4 * hidden, inputs if layer == 0 else size * directions), (4 * hidden, size)]
            for shape in [*shapes, (proj, hidden)] if proj else shapes:
                values, scale = quantized(*shape)
                weights.append(values)
                scales.append(scale)
            biases.append(torch.randn(4 * hidden))
    x = torch.randn(7, inputs) if packed else torch.randn(3, 4, inputs)
    sizes = torch.tensor([4, 2, 1]) if packed else None
    h0, c0 = torch.randn(layers * directions, 4, size), torch.randn(layers * directions, 4, hidden)
    return x, sizes, h0, c0, weights, scales, biases if bias else [], directions == 2


def rnn_arguments(mode, inputs=6, hidden=5, packed=False):
    """Return the operands of one call of the rnn operator, two layers in both directions."""
    torch.manual_seed(1)
    gates = 3 if mode == "gru" else 1
    weights, scales = [], []
    for cell in range(4):
        for columns in (inputs if cell < 2 else 2 * hidden, hidden):
            values, scale = quantized(gates * hidden, columns)
            weights.append(values)
            scales.append(scale)
    biases = [torch.randn(gates * hidden) for _ in range(4)]
    hidden_biases = [torch.randn(hidden) for _ in range(4)] if mode == "gru" else []
    x = torch.randn(7, inputs) if packed else torch.randn(3, 4, inputs)
    sizes = torch.tensor([4, 2, 1]) if packed else None
    return x, sizes, torch.randn(4, 4, hidden), weights, scales, biases, hidden_biases, mode, True


def table_arguments(bits=8, affine=False):
    qconfig = {8: "float_qparams_weight_only_qconfig", 4: "float_qparams_weight_only_qconfig_4bit"}[bits]
    import fxquant

    spec = getattr(fxquant, qconfig) if affine or bits == 4 else INT8
    return torch.randint(10, (3, 4)), *spec.quantize_weight(torch.randn(10, 7)), 7


def cases():
    x = torch.randn(3, 6)
    yield "linear", (x, *quantized(4, 6)), {}
    yield "linear", (x.half(), *quantized(4, 6), torch.randn(4), True, False, 127), {}
    yield "linear", (torch.randn(2, 3, 6), torch.randn(4, 6).half(), None), {}
    yield "linear", (torch.randn(0, 6), *quantized(4, 6)), {}
    weight, groups = quantized_int4(4, 75)
    yield "linear", (torch.randn(2, 3, 75), *weight, torch.randn(4), True, True, 255, *groups), {}
    yield "linear", (torch.randn(3, 75).half(), *weight, None, False, False, 127, *groups), {}
    yield "lstm", lstm_arguments(), {}
    yield "lstm", lstm_arguments(layers=2, directions=2, proj=3), {}
    yield "lstm", lstm_arguments(bias=False, packed=True), {}
    yield "rnn", rnn_arguments("gru"), {}
    yield "rnn", rnn_arguments("rnn_tanh", packed=True), {}
    yield "rnn", rnn_arguments("rnn_relu"), {"per_row": False, "qmax": 127}
    yield "embedding", table_arguments(), {}
    yield "embedding", table_arguments(bits=4), {"bits": 4, "dtype": torch.float16}
    yield "embedding", table_arguments(affine=True), {}
    yield "embedding_bag", table_arguments(), {"mode": "max"}
    weights = torch.rand(12)
    indices, *table = table_arguments(affine=True)
    options = {"offsets": torch.tensor([0, 5, 12]), "mode": "sum", "per_sample_weights": weights}
    yield "embedding_bag", (indices.reshape(-1), *table), {**options, "include_last_offset": True, "padding_idx": 3}
    yield "matmul", (torch.randn(2, 3, 6), torch.randn(4, 1, 6, 5)), {}
    yield "matmul", (torch.randn(6).double(), torch.randn(6, 5).double()), {}
    yield "matmul", (torch.randn(2, 3, 6, requires_grad=True), torch.randn(6, requires_grad=True)), {}
    heads = [torch.randn(2, 2, length, width, requires_grad=True) for length, width in ((3, 6), (5, 6), (5, 4))]
    yield "attention", (*heads, torch.randn(2, 1, 1, 5)), {}
    yield "attention", tuple(x.detach()[0, 0].half() for x in heads), {"is_causal": True, "scale": 0.3}
    yield "attention", (*(x.detach()[:1] for x in heads), torch.ones(3, 5, dtype=torch.bool).tril()), {}


CASES = list(cases())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.14's opcheck looks at that of copies
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_opcheck(case):
    name, args, kwargs = case
    torch.library.opcheck(getattr(torch.ops.fxquant, name).default, args, kwargs)


def test_every_operator_is_opchecked_here():
    assert {case[0] for case in CASES} == set(schema.SCHEMAS)


@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_every_operator_has_a_reference_with_the_schemas_operands(name):
    import inspect

    operands = [argument.name for argument in getattr(torch.ops.fxquant, name).default._schema.arguments]
    assert list(inspect.signature(REFERENCES[name]).parameters) == operands


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_the_functions_give_the_references_numbers(case):
    name, args, kwargs = case
    got, expected = ops.OVERLOADS[name](*args, **kwargs), REFERENCES[name](*args, **kwargs)
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


@pytest.mark.parametrize("shape", [(3, 5), (), (6, 3)])
def test_linear_refuses_another_shape(shape):
    with pytest.raises(ShapeError, match=r"of 6 inputs takes x of shape \(..., 6\), got"):
        ops.linear(torch.zeros(shape), *LINEAR)


@pytest.mark.parametrize("columns", [74, 76, 38])
def test_int4_linear_refuses_another_shape(columns):
    weight, groups = quantized_int4(4, 75)
    with pytest.raises(ShapeError, match=rf"of 75 inputs takes x of shape \(..., 75\), got \(3, {columns}\)"):
        ops.linear(torch.zeros(3, columns), *weight, None, False, True, 255, *groups)


@pytest.mark.parametrize(
    ("weight", "scale", "group_size"),
    [((4, 37), (4, 3), 32), ((4, 38), (4, 2), 32), ((4, 38), (3, 3), 32), ((4, 38), (4, 3), 48), ((4, 38), (12,), 32)],
)
def test_int4_linear_refuses_weights_and_scales_that_do_not_fit(weight, scale, group_size):
    operands = torch.zeros(weight, dtype=torch.uint8), torch.ones(scale, dtype=torch.bfloat16)
    with pytest.raises(
        ShapeError, match=rf"of 75 inputs in groups of {group_size} .* takes a weight of shape \(O, 38\)"
    ):
        ops.linear(torch.zeros(3, 75), *operands, None, False, True, 255, group_size, 75)


@pytest.mark.parametrize(("weight", "scale"), [("int8", "bfloat16"), ("uint8", "float32")])
def test_int4_linear_refuses_other_dtypes(weight, scale):
    operands = torch.zeros(4, 38, dtype=getattr(torch, weight)), torch.ones(4, 3, dtype=getattr(torch, scale))
    with pytest.raises(
        DTypeError, match=rf"torch.uint8 with a scale of torch.bfloat16, got torch.{weight} and torch.{scale}"
    ):
        ops.linear(torch.zeros(3, 75), *operands, None, False, True, 255, 32, 75)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_linear_refuses_integers(dtype):
    with pytest.raises(DTypeError, match=f"takes a float tensor, got {dtype}".replace(".", r"\.")):
        ops.linear(torch.zeros(3, 6, dtype=dtype), *LINEAR)


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 6), (6,)])
def test_lstm_refuses_another_shape(shape):
    _, *rest = lstm_arguments()
    with pytest.raises(ShapeError, match="of 6 inputs takes 3-D input whose last dimension is 6"):
        ops.lstm(torch.zeros(shape), *rest)


@pytest.mark.parametrize("state", [2, 3])
def test_lstm_refuses_a_state_of_another_batch(state):
    arguments = list(lstm_arguments())
    arguments[state] = torch.zeros(1, 9, 5)
    with pytest.raises(ShapeError, match=rf"with batch 4 got {'h0' if state == 2 else 'c0'} of shape \(1, 9, 5\)"):
        ops.lstm(*arguments)


@pytest.mark.parametrize(("packed", "h0", "c0"), [(False, 1, 2), (True, 1, 2), (False, 0, 0)])
def test_lstm_refuses_states_of_other_cells_than_each_other_or_of_none(packed, h0, c0):
    x, sizes, *_, weights, scales, biases, bidirectional = lstm_arguments(packed=packed)
    states = torch.zeros(h0, 4, 5), torch.zeros(c0, 4, 5)
    with pytest.raises(ShapeError, match=rf"got \({h0}, 4, 5\) and \({c0}, 4, 5\)"):
        ops.lstm(x, sizes, *states, weights, scales, biases, bidirectional)


def test_lstm_refuses_states_of_another_packed_batch_than_each_other():
    arguments = list(lstm_arguments(packed=True))
    arguments[3] = torch.zeros(1, 3, 5)
    with pytest.raises(ShapeError, match=r"got \(1, 4, 5\) and \(1, 3, 5\)"):
        ops.lstm(*arguments)


def test_rnn_refuses_another_mode():
    arguments = list(rnn_arguments("gru"))
    arguments[-2] = "lstm"
    with pytest.raises(ArgumentError, match="takes one of the modes 'gru', 'rnn_tanh', 'rnn_relu', got 'lstm'"):
        ops.rnn(*arguments)


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


def test_activations_of_16_bits_have_a_greatest_integer_of_their_own():
    weight, scale = int16_dynamic_qconfig.quantize_weight(torch.randn(4, 6))[:2]
    x = torch.randn(3, 6)
    assert torch.equal(ops.linear(x, weight, scale, None, False, True, 32767), reference.linear(x, weight, scale))


@pytest.mark.parametrize(("place", "name"), [(0, "input"), (2, "h0"), (3, "c0")])
def test_lstm_refuses_integers(place, name):
    arguments = list(lstm_arguments())
    arguments[place] = arguments[place].long()
    with pytest.raises(DTypeError, match=rf"takes float tensors, got {name} of torch\.int64"):
        ops.lstm(*arguments)


@pytest.mark.parametrize("name", ["embedding", "embedding_bag"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool])
def test_tables_refuse_other_indices(name, dtype):
    indices, *table = table_arguments()
    with pytest.raises(DTypeError, match=rf"takes int32 or int64 indices, got {dtype}"):
        getattr(ops, name)(indices.to(dtype), *table)


@pytest.mark.parametrize("shapes", [((3, 4), (5, 4)), ((2, 3, 4), (3, 4, 5)), ((), (4,)), ((4,), (5, 3))])
def test_matmul_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(ShapeError, match="no product of"):
        ops.matmul(*map(torch.zeros, shapes))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.complex64, torch.complex64)])
def test_matmul_refuses_other_dtypes(dtypes):
    with pytest.raises(DTypeError, match=f"floats of one dtype, got {dtypes[0]} and {dtypes[1]}"):
        ops.OVERLOADS["matmul"](*(torch.zeros(2, 2, dtype=dtype) for dtype in dtypes))


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (((2, 3), (4, 2), (4, 5)), "takes query"),
        (((2, 3), (4, 3), (5, 5)), "takes query"),
        (((3,), (4, 3), (4, 5)), "takes query"),
        (((2, 2, 3), (3, 4, 3), (2, 4, 5)), "no attention of"),
        (((2, 3), (4, 3), (4, 5), (3, 4)), "its mask"),
        (((2, 3), (4, 3), (4, 5), (7, 2, 4)), r"must expand to \(2, 4\), got \(7, 2, 4\)"),
    ],
)
def test_attention_refuses_shapes_that_do_not_fit(shapes, match):
    with pytest.raises(ShapeError, match=match):
        ops.attention(*map(torch.zeros, shapes))


def test_attention_refuses_other_dtypes():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(DTypeError, match=r"floats of one dtype, got torch\.float32, torch\.float64, torch\.float32"):
        ops.attention(x, x.double(), x)
    with pytest.raises(DTypeError, match=r"bool or floating point, got torch.int64; call mask.bool\(\)"):
        ops.attention(x, x, x, torch.zeros(2, 2, dtype=torch.long))


@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_compiled_graphs_refuse_with_the_same_words(name):
    with torch.device("meta"):
        if name == "linear":
            with pytest.raises(ShapeError, match="of 6 inputs takes"):
                ops.linear(torch.zeros(3, 5), torch.zeros(4, 6, dtype=torch.int8), torch.ones(4))
        else:
            with pytest.raises(DTypeError, match="takes int32 or int64"):
                ops.embedding(torch.zeros(3), torch.zeros(4, 6, dtype=torch.int8), torch.ones(4), None, 6)
