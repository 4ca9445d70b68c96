"""Recurrent operators with a scheme for each weight, against float64 and docs/numerics.md, "group output"."""

import itertools

import pytest
import torch

from fxquant import ArgumentError, DTypeError, ShapeError, formats, ops
from fxquant.numerics import QuantizedTensor, dequantize, quantize_tokens
from fxquant.ops import library
from fxquant.ops.linear import multiply
from fxquant.qconfig import default_dynamic_qconfig, int4_dynamic_qconfig
from tests.ops import reference

SCHEMES = ("int8", "int4", "float16", "float32")
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
GROUP = 32


def stored(rows, columns, scheme):
    """Return (weight, scale) of a random matrix as the operators take it."""
    weight = torch.randn(rows, columns) / max(1, columns) ** 0.5
    if scheme.startswith("float"):
        return weight.to(getattr(torch, scheme)), torch.empty(0)
    qconfig = int4_dynamic_qconfig.with_group_size(GROUP) if scheme == "int4" else default_dynamic_qconfig
    return qconfig.quantize_weight(weight).tensors[:2]


def real(weight, scale, columns):
    """Return the float64 matrix that a weight stands for."""
    row = formats.INT4 if weight.dtype is torch.uint8 else formats.INT8 if scale.numel() else formats.FLOAT16
    size = row.find_group_size(columns, scale.shape[1]) if row.group_sizes else 0
    return dequantize(QuantizedTensor(row, weight, scale if scale.numel() else None, None, columns, size)).double()


def layers(mode, schemes, inputs=75, hidden=70, count=1, directions=1, proj=0, bias=True):
    """Return (weights, scales, biases, hidden_biases, formats); schemes: of all cells' matrices in turn, repeated."""
    size, schemes = proj or hidden, itertools.cycle(schemes)
    weights, scales, names, rows = [], [], [], GATES[mode] * hidden
    for cell in range(count * directions):
        columns = inputs if cell < directions else directions * size
        shapes = [(rows, columns), (rows, size), (proj, hidden)]
        for shape in shapes[: 3 if proj else 2]:
            names.append(next(schemes))
            weight, scale = stored(*shape, names[-1])
            weights.append(weight)
            scales.append(scale)
    cells = range(count * directions if bias else 0)
    biases, hidden_biases = ([torch.randn(n) for _ in cells] for n in (rows, hidden))
    return weights, scales, biases, hidden_biases if mode == "gru" else [], names


def call(mode, operands, x, sizes=None, proj=0, hidden=70, bidirectional=False, run=ops, states=None):
    """Run the operator of a mode on some layers."""
    weights, scales, biases, hidden_biases, names = operands
    cells = len(weights) // (3 if proj else 2)
    batch = x.shape[1] if sizes is None else int(sizes[0])
    torch.manual_seed(7)
    h, c = states or (torch.randn(cells, batch, proj or hidden), torch.randn(cells, batch, hidden))
    if mode == "lstm":
        return run.lstm(x, sizes, h, c, weights, scales, biases, bidirectional, formats=names)
    return run.rnn(x, sizes, h, weights, scales, biases, hidden_biases, mode, bidirectional, formats=names)


@pytest.mark.parametrize("start", [None, "row", "matrix"])
def test_int4_products_are_added_to_their_start_in_order(start):
    weight, scale = stored(9, 75, "int4")
    rows, q = torch.randn(4, 75), formats.INT4.unpack(weight, 75).long()
    begin = {None: None, "row": torch.randn(9), "matrix": torch.randn(4, 9)}[start]
    a, s, z = quantize_tokens(rows, 255)
    expected = torch.full((4, 9), -0.0) if begin is None else begin.expand(4, 9)
    for group, columns in enumerate((slice(0, 32), slice(32, 64), slice(64, 75))):
        sums = (a.long() - z.long())[:, columns] @ q[:, columns].T
        expected = expected + sums.float() * (s * scale[:, group].float())
    whole = QuantizedTensor(formats.INT4, weight, scale, None, 75, GROUP)
    assert torch.equal(multiply(rows, whole, begin, True, 255), expected)


@pytest.mark.parametrize("mode", GATES)
@pytest.mark.parametrize("ih", SCHEMES)
@pytest.mark.parametrize("hh", SCHEMES)
def test_a_step_is_the_float_cell_of_the_weights_values(mode, ih, hh):
    operands, x = layers(mode, (ih, hh)), torch.randn(1, 3, 75)
    h0, c0 = torch.randn(1, 3, 70), torch.randn(1, 3, 70)
    (w_ih, w_hh), (s_ih, s_hh), (bias,), own, _ = operands

    def rounded(rows, weight):  # activations as integers say them, where the weight's are integers too
        if weight.is_floating_point():
            return rows.double()
        q, scale, zero = quantize_tokens(rows, 255)
        return (q - zero).double() * scale.double()

    from_x = rounded(x[0], w_ih) @ real(w_ih, s_ih, 75).T + bias.double()
    from_h = rounded(h0[0], w_hh) @ real(w_hh, s_hh, 70).T
    if mode == "lstm":
        i, f, g, o = (from_x + from_h).chunk(4, dim=1)
        c = f.sigmoid() * c0[0].double() + i.sigmoid() * g.tanh()
        expected = o.sigmoid() * c.tanh()
    elif mode == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, dim=1), from_h.chunk(3, dim=1)
        n = (x_n + (x_r + h_r).sigmoid() * (h_n + own[0].double())).tanh()
        expected = n + (x_z + h_z).sigmoid() * (h0[0].double() - n)
    else:
        expected = (from_x + from_h).tanh() if mode == "rnn_tanh" else (from_x + from_h).relu()
    got = call(mode, operands, x, states=(h0, c0))[0][0]
    # float32 roundings of sums of at most 75 products, below 20 together, and of what lstm_cell and gru_cell do to them
    assert (got - expected).abs().max() <= 20 * 75 * 2**-24 + 1e-5


MIXES = [
    ("lstm", ("float32", "int8"), {}),
    ("lstm", ("int4", "int4", "int4"), {"proj": 40}),
    ("lstm", ("int8", "int4", "int8", "int4", "int8", "float16"), {"proj": 40}),
    ("lstm", ("int8", "int4", "float32", "int8", "int4", "int4", "int8", "float16"), {}),
    ("gru", ("float16", "int8", "int8", "int4"), {}),
    ("rnn_tanh", ("int4", "int4", "float32", "int4"), {}),
    ("rnn_relu", ("int8", "float32"), {}),
]
INTEGER_MIXES = [mix for mix in MIXES if not any("float" in scheme for scheme in mix[1])] + [
    ("gru", ("int4", "int8", "int8", "int4"), {}),
    ("lstm", ("int8", "int4"), {}),
]


def summed_exactly(operands):
    """Return the operands with one number other than 0 in each row of a float weight: any order gives the same sum."""
    for weight in operands[0]:
        if weight.is_floating_point():
            one = torch.arange(weight.shape[1]) == torch.randint(weight.shape[1], (weight.shape[0], 1))
            weight.mul_(one)
    return operands


@pytest.mark.parametrize(("mode", "schemes", "how"), MIXES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_the_operators_give_the_references_bits(mode, schemes, how, packed, bias):
    operands = summed_exactly(layers(mode, schemes, count=2, directions=2, bias=bias, **how))
    x, sizes = (torch.randn(9, 75), torch.tensor([4, 3, 2])) if packed else (torch.randn(6, 4, 75), None)
    got = call(mode, operands, x, sizes, bidirectional=True, **how)
    expected = call(mode, operands, x, sizes, bidirectional=True, run=reference, **how)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(("mode", "schemes", "how"), MIXES if library.available() else INTEGER_MIXES)
def test_a_sequence_gives_the_same_bits_in_any_batch_and_step_by_step(mode, schemes, how):
    operands, x = layers(mode, schemes, count=2, **how), torch.randn(5, 3, 75)
    cells, size = 2, how.get("proj", 70)
    h, c = torch.randn(cells, 3, size), torch.randn(cells, 3, 70)
    whole = call(mode, operands, x, states=(h, c), **how)
    alone = call(mode, operands, x[:, 1:2], states=(h[:, 1:2], c[:, 1:2]), **how)
    assert all(torch.equal(a, b[:, 1:2]) for a, b in zip(alone, whole, strict=True))
    states = (h, c)
    for step in range(5):
        out, *states = call(mode, operands, x[step : step + 1], states=(*states, c)[:2], **how)
        assert torch.equal(out[0], whole[0][step]), step
    assert all(map(torch.equal, states, whole[1:]))


@pytest.mark.parametrize(("mode", "schemes", "how"), MIXES)
def test_opcheck(mode, schemes, how):
    weights, scales, biases, hidden_biases, names = layers(mode, schemes, count=2, **how)
    x, h, c = torch.randn(3, 2, 75), torch.randn(2, 2, how.get("proj", 70)), torch.randn(2, 2, 70)
    if mode == "lstm":
        torch.library.opcheck(ops.OVERLOADS["lstm"], (x, None, h, c, weights, scales, biases), {"formats": names})
    else:
        torch.library.opcheck(
            ops.OVERLOADS["rnn"], (x, None, h, weights, scales, biases, hidden_biases, mode), {"formats": names}
        )


def changed(part, place, tensor):
    """Return an LSTM's operands with one tensor replaced."""
    operands = layers("lstm", ("int8", "int4"))
    operands[part][place] = tensor
    return operands


INT4 = torch.zeros(280, 35, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("part", "place", "tensor", "words"),
    [
        (0, 0, torch.zeros(280, 75, dtype=torch.int32), r"weight_ih of cell 0, .* in int8: .* got torch.int32"),
        (0, 0, torch.zeros(280, 75), r"weight_ih of cell 0, .* in int8: .* got torch.float32"),
        (1, 1, torch.ones(280, 3), r"weight_hh of cell 0, .* in int4: .* got torch.uint8 .* with scale torch.float32"),
    ],
)
def test_other_dtypes_are_refused(part, place, tensor, words):
    with pytest.raises(DTypeError, match=words):
        call("lstm", changed(part, place, tensor), torch.randn(2, 3, 75), run=torch.ops.fxquant)


@pytest.mark.parametrize(
    ("part", "place", "tensor", "words"),
    [
        (
            0,
            1,
            torch.zeros(280, 36, dtype=torch.uint8),
            r"weight_hh of cell 0, \(280, 70\) in int4: expected torch.uint8 \(280, 35\) .* got .* \(280, 36\)",
        ),
        (0, 0, torch.zeros(279, 75, dtype=torch.int8), r"weight_ih of cell 0, \(280, 75\) in int8: .*\(279, 75\)"),
        (1, 0, torch.ones(279), r"got torch.int8 \(280, 75\) with scale torch.float32 \(279,\)"),
        (1, 0, torch.ones(0), r"with scale torch.float32 \(0,\)"),
        (1, 1, torch.ones(280, 4).bfloat16(), r"with scale torch.bfloat16 \(280, 4\)"),
        (1, 1, torch.ones(279, 3).bfloat16(), r"with scale torch.bfloat16 \(279, 3\)"),
        (2, 0, torch.ones(279), r"got a bias of shape \(279,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(part, place, tensor, words):
    with pytest.raises(ShapeError, match=words):
        call("lstm", changed(part, place, tensor), torch.randn(2, 3, 75), run=torch.ops.fxquant)


@pytest.mark.parametrize(("part", "name"), [(0, "weights"), (1, "scales"), (4, "formats")])
def test_a_wrong_number_of_operands_is_refused(part, name):
    operands = list(layers("lstm", ("int8", "int4")))
    operands[part] = operands[part][:1]
    states = (torch.zeros(1, 3, 70), torch.zeros(1, 3, 70))
    with pytest.raises(ShapeError, match=f"takes 2 {name}, got 1"):
        call("lstm", operands, torch.randn(2, 3, 75), states=states)


def test_integers_without_scales_are_refused():
    weights, _, *rest = layers("lstm", ("int8", "float16"))
    with pytest.raises(ShapeError, match=r"got torch.int8 .* with no scale"):
        call("lstm", (weights, [], *rest), torch.randn(2, 3, 75))


@pytest.mark.parametrize("columns", [74, 77])
def test_int4_inputs_of_another_size_are_refused(columns):
    operands = layers("gru", ("int4", "int8"))
    with pytest.raises(ShapeError, match=rf"of 76 inputs takes 3-D input .* got \(2, 3, {columns}\)"):
        call("gru", operands, torch.randn(2, 3, columns))


def test_outputs_of_another_size_than_the_hidden_units_need_a_projection():
    operands = layers("lstm", ("int8", "int8"))
    with pytest.raises(ShapeError, match="1 directions, no projection"):
        call("lstm", operands, torch.randn(2, 3, 75), states=(torch.zeros(1, 3, 60), torch.zeros(1, 3, 70)))


def test_a_format_that_no_product_has_is_refused():
    *operands, _ = layers("lstm", ("int8", "int8"))
    with pytest.raises(ArgumentError, match=r"a quantized LSTM takes one of the formats .* got 'uint4'"):
        call("lstm", (*operands, ["int8", "uint4"]), torch.randn(2, 3, 75))


def test_weights_are_int8_where_no_formats_are_given():
    *operands, names = layers("lstm", ("int8", "int8"))
    x, states = torch.randn(2, 3, 75), (torch.zeros(1, 3, 70), torch.zeros(1, 3, 70))
    named, plain = (call("lstm", (*operands, given), x, states=states) for given in (names, None))
    assert all(map(torch.equal, named, plain))
