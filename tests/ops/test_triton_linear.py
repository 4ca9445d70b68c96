"""Triton's kernels of linear give the reference's bits: all formats, shapes of all forms, numbers at the ends."""

import pytest
import torch

from fxquant.formats import FORMATS, format_of
from tests.ops.kernels_on_gpu import DEVICE, TRUNCATES, USES_KERNELS, check, run_triton, triton_kernels  # noqa: F401
from tests.ops.triton_calls import product

pytestmark = USES_KERNELS
# Shapes that meet the ends of tiles; a tile of 16 holds 15 tokens beside its ones.
SHAPES = [("int8", tokens, *shape, 0) for tokens in (1, 15, 33) for shape in ((1, 1), (7, 33), (40, 256), (33, 300))]
SHAPES += [
    (row.name, tokens, 37, columns, size)
    for row in FORMATS
    for size in row.group_sizes
    for tokens in (1, 3, 17)
    for columns in ((1, 33, 128) if size == 64 else (200,))
]
SHAPES += [("int16", 3, 1, 1, 0), ("int16", 17, 37, 300, 0), ("int8", 16, 33, 64, 0), ("int8", 32, 33, 64, 0)]
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(DEVICE == "cpu", reason=TRUNCATES))
KINDS = [("int8", 0), ("int4", 64), ("int3", 64), ("int16", 0)]


def call(name, tokens, outputs, columns, group_size=0, bias=True, relu=False, per_token=True, qmax=255, x=None):
    operands, end = product(format_of(name), outputs, columns, group_size)
    x = torch.randn(tokens, columns) * torch.rand(tokens, 1) * 9 if x is None else x
    return check("linear", x, *operands, torch.randn(outputs) if bias else None, relu, per_token, qmax, *end)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_all_shapes(shape):
    call(*shape)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(("name", "group_size"), KINDS)
def test_without_a_bias_and_with_a_relu(name, group_size, tokens):
    assert (call(name, tokens, 20, 70, group_size, bias=False) < 0).any()
    assert not (call(name, tokens, 20, 70, group_size, relu=True) < 0).any()


@pytest.mark.parametrize(("name", "group_size"), KINDS)
def test_one_scale_for_all_tokens(name, group_size):
    call(name, 5, 20, 70, group_size, per_token=False)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("qmax", [127, 15, 2, 1])
def test_activations_of_fewer_bits(qmax, tokens):
    call("int8", tokens, 20, 70, qmax=qmax)
    call("int4", tokens, 20, 70, 32, qmax=qmax)


@pytest.mark.parametrize(("name", "group_size"), KINDS)
def test_bfloat16_is_read(name, group_size):
    operands, end = product(format_of(name), 20, 70, group_size)
    x = torch.randn(3, 70).bfloat16()
    wide = run_triton("linear", x.float(), *operands, None, False, True, 255, *end)
    got = run_triton("linear", x, *operands, None, False, True, 255, *end)
    assert got.dtype == torch.bfloat16
    assert bool(((got - wide).abs() <= 2.0**-7 * wide.abs()).all())  # rounded or, by the interpreter, truncated


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16, torch.float64])
@pytest.mark.parametrize(("name", "group_size"), KINDS)
def test_outputs_have_the_inputs_dtype(name, group_size, dtype):
    for tokens in (1, 3):
        call(name, tokens, 20, 70, group_size, x=torch.randn(tokens, 70).to(dtype))


STRANGE = {
    "zeros": torch.zeros(40),
    "a NaN": torch.tensor([torch.nan, *range(39)]),
    "infinities": torch.tensor([torch.inf, -torch.inf, *range(38)]),
    "the greatest numbers": torch.tensor([3.4028235e38, -3.4028235e38, *[1.0] * 38]),
    "numbers too small": torch.full((40,), 1e-40),
    "positive ones": torch.arange(1.0, 41.0),
    "negative ones": -torch.arange(1.0, 41.0),
}


@pytest.mark.parametrize("token", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize(("name", "group_size"), KINDS)
def test_strange_tokens(name, group_size, token):
    call(name, 1, 9, 40, group_size, x=token.unsqueeze(0))
    call(name, 3, 9, 40, group_size, x=torch.stack((torch.randn(40), token, torch.randn(40))))
    call(name, 2, 9, 40, group_size, x=torch.stack((torch.randn(40), token)), qmax=1, per_token=False)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("name", "group_size"), [("int8", 0), ("int4", 128), ("int3", 128), ("int16", 0)])
def test_sums_at_the_ends_of_their_range(name, group_size, tokens):
    kind, columns = format_of(name), 384
    low = -32768 if name == "int16" else kind.limits[0]
    x = torch.ones(tokens, columns)
    (_, scale), end = product(kind, 3, columns, group_size)
    weight = kind.pack(torch.tensor([low, kind.limits[1], low + 1]).unsqueeze(1).expand(3, columns)).to(kind.storage)
    for one in (x, -x, torch.cat((x[:, 1:], -x[:, :1]), 1)):
        check("linear", one, weight.contiguous(), scale, None, False, True, 255, *end)


@pytest.mark.parametrize("name", ["int8", "int16"])
def test_a_long_token_is_read_in_parts(name):
    call(name, 1, 1, 8200)


def test_any_dimensions_and_strides():
    wide = torch.randn(2, 3, 80)
    for x in (wide[..., :40], wide[..., ::2], wide[:, 1, 40:], wide[0, 0, :40], torch.randn(40, 3).t()):
        call("int8", 0, 9, 40, x=x)


def test_a_token_is_its_own():
    operands, end = product(format_of("int8"), 40, 300)
    x = torch.randn(17, 300)
    whole = run_triton("linear", x, *operands, None, False, True, 255, *end)
    for token in (0, 16):
        assert torch.equal(run_triton("linear", x[token], *operands, None, False, True, 255, *end), whole[token])


def test_what_is_the_references():
    operands, end = product(format_of("int8"), 4, 8)
    assert run_triton("linear", torch.randn(0, 8), *operands, None, False, True, 255, *end) is None
    assert run_triton("linear", torch.randn(2, 8), torch.randn(4, 8).half(), None, None, format="float16") is None
