"""Products of two activations stand in for torch's: for what operands torch's own run, and what dtypes come back."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import ops
from tests.samples import quantize, same_bits


def sparse(layout):
    return (torch.rand(6, 6) * (torch.rand(6, 6) > 0.5)).to_sparse(layout=layout)


class Product(nn.Module):
    """A product behind one quantized layer."""

    def __init__(self, multiply):
        super().__init__()
        self.linear, self.multiply = nn.Linear(6, 6), multiply

    def forward(self, x, y):
        return self.multiply(self.linear(x), y)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, adjacency: torch.mm(adjacency, x),
        lambda x, adjacency: adjacency @ x,
        lambda x, adjacency: torch.addmm(x, adjacency, x),
        lambda x, adjacency: torch.addmm(x, adjacency, x, beta=0.5, alpha=2),
    ],
)
def test_a_sparse_operand_is_torchs(layout, multiply):
    x, adjacency = torch.randn(6, 6), sparse(layout)
    for batch_invariant in (None, True):
        quantized = quantize(Product(multiply), x, adjacency, batch_invariant=batch_invariant)
        hidden = quantized.get_submodule("linear")(x)
        assert same_bits(quantized(x, adjacency), multiply(hidden, adjacency))
    assert same_bits(ops.matmul(adjacency, x), adjacency @ x)
    assert same_bits(ops.float_linear(x, adjacency), F.linear(x, adjacency))
    assert torch.allclose(ops.add_product(x, adjacency, x), x + adjacency.to_dense() @ x, atol=1e-5)
    assert torch.allclose(ops.add_product(x, adjacency, x, 2), 2 * x + adjacency.to_dense() @ x, atol=1e-5)


def test_a_batch_of_sparse_matrices_is_torchs():
    a, b = (torch.rand(2, 3, 4) > 0.5).float().to_sparse(), torch.randn(2, 4, 5)
    assert same_bits(ops.matmul(a, b), torch.bmm(a, b))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_a_nested_operand_is_torchs():
    a, b = (torch.nested.nested_tensor([torch.randn(2, n, n) for n in (3, 4)]) for _ in range(2))
    for ours, torchs in zip(ops.matmul(a, b).unbind(), torch.matmul(a, b).unbind(), strict=True):
        assert same_bits(ours, torchs)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_complex_and_integer_operands_are_torchs(dtype):
    a, b = (torch.randn(2, 4, 4).mul(5).to(dtype) for _ in range(2))
    assert same_bits(ops.matmul(a, b), a @ b)
    assert same_bits(ops.einsum("bij,bjk->bik", a, b), torch.einsum("bij,bjk->bik", a, b))
    assert same_bits(ops.add_product(a, a, b, 2, 3), torch.baddbmm(a, a, b, beta=2, alpha=3))
    assert same_bits(ops.add_product(a[0], a[0], b[0]), torch.addmm(a[0], a[0], b[0]))
    assert same_bits(ops.float_linear(a, b[0]), F.linear(a, b[0]))


@pytest.mark.parametrize(
    ("equation", "a", "b"),
    [
        ("bij,bjk->bik", (1, 3, 8), (4, 8, 5)),
        ("bij,bjk->bik", (4, 3, 8), (1, 8, 5)),
        ("bij,bjk->bik", (2, 3, 8), (2, 1, 5)),
        ("bij,bjk->bik", (2, 3, 1), (2, 8, 5)),
        ("bij,bjk->kbi", (1, 3, 1), (4, 8, 5)),
        ("abij,abjk->abik", (2, 1, 3, 8), (1, 4, 8, 5)),
        ("bij,bjk->bik", (1, 1, 1), (1, 1, 1)),
        ("i,i->", (1,), (4,)),
    ],
)
def test_a_size_of_one_broadcasts_in_an_einsum(equation, a, b):
    a, b = torch.randn(a), torch.randn(b)
    expected = torch.einsum(equation, a, b)
    assert ops.einsum(equation, a, b).shape == expected.shape
    assert torch.allclose(ops.einsum(equation, a, b), expected, atol=1e-5)


@pytest.mark.parametrize(("a", "b"), [((2, 3, 8), (3, 8, 5)), ((2, 3, 8), (2, 7, 5)), ((3, 8), (2, 8, 5))])
def test_operands_that_do_not_fit_an_einsum_are_torchs_error(a, b):
    with pytest.raises(RuntimeError, match="einsum"):
        ops.einsum("bij,bjk->bik", torch.randn(a), torch.randn(b))


@pytest.mark.filterwarnings("ignore:This overload of")
@pytest.mark.parametrize("name", ["addmm", "baddbmm"])
@pytest.mark.parametrize(
    "order",
    [
        lambda f, x, y: f(0.5, x, 3.0, y, x),
        lambda f, x, y: f(0.5, x, y, x),
        lambda f, x, y: getattr(x, f.__name__)(0.5, 3.0, y, x),
        lambda f, x, y: getattr(x, f.__name__)(0.5, y, x),
    ],
)
def test_beta_and_alpha_by_position_mean_what_they_mean_to_torch(name, order):
    def multiply(x, y):
        x, y = (x, y) if name == "addmm" else (x[None], y[None])
        return order(getattr(torch, name), x, y)

    x, y = torch.randn(6, 6), torch.randn(6, 6)
    quantized = quantize(Product(multiply), x, y, batch_invariant=True)
    assert same_bits(quantized(x, y), multiply(quantized.get_submodule("linear")(x), y))


CALLS = {
    "matmul": (lambda a: torch.matmul(a, a), lambda a: ops.matmul(a, a)),
    "einsum": (lambda a: torch.einsum("bij,bjk->bik", a, a), lambda a: ops.einsum("bij,bjk->bik", a, a)),
    "addmm": (lambda a: torch.addmm(a[0], a[0], a[1]), lambda a: ops.add_product(a[0], a[0], a[1])),
    "baddbmm": (lambda a: torch.baddbmm(a, a, a), lambda a: ops.add_product(a, a, a)),
    "linear": (lambda a: F.linear(a, a[0], a[0, 0]), lambda a: ops.float_linear(a, a[0], a[0, 0])),
    "linear, no bias": (lambda a: F.linear(a, a[0]), lambda a: ops.float_linear(a, a[0])),
    "attention": (
        lambda a: F.scaled_dot_product_attention(a[None], a[None], a[None]),
        lambda a: ops.attention(a[None], a[None], a[None]),
    ),
    "attention, masked": (
        lambda a: F.scaled_dot_product_attention(a[None], a[None], a[None], torch.eye(6, dtype=a.dtype)),
        lambda a: ops.attention(a[None], a[None], a[None], torch.eye(6, dtype=a.dtype)),
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_gives_torchs_dtype(name, dtype):
    torchs, ours = CALLS[name]
    a = torch.randn(2, 6, 6).to(dtype)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected, got = torchs(a), ours(a)
        assert got.dtype == expected.dtype == (torch.bfloat16 if enabled and dtype is torch.float32 else dtype)
        tolerance = 3e-2 if got.dtype is torch.bfloat16 else 1e-5
        assert torch.allclose(got, expected, rtol=tolerance, atol=10 * tolerance)


def test_attention_of_float64_is_torchs():
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64).unbind(0)
    assert same_bits(ops.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    big = [x * 1e25 for x in (q, k, v)]  # beyond float32 once multiplied
    assert same_bits(ops.attention(*big), F.scaled_dot_product_attention(*big))


def heads(b, h, t, e, order):
    """Return (B, H, T, E) that lies in memory in an order of B, H, T, E."""
    sizes = (b, h, t, e)
    return torch.randn([sizes[i] for i in order]).permute([order.index(i) for i in range(4)])


ORDERS = {"heads": (0, 1, 2, 3), "tokens": (0, 2, 1, 3), "batch inside": (2, 0, 1, 3), "columns": (0, 1, 3, 2)}
MASKS = {
    "none": lambda q, k: None,
    "2-D": lambda q, k: torch.zeros(q, k),
    "bool": lambda q, k: torch.ones(q, k, dtype=torch.bool),
    "row": lambda q, k: torch.zeros(1, k),
    "3-D": lambda q, k: torch.zeros(3, q, k),
    "4-D": lambda q, k: torch.zeros(2, 1, 1, k),
    "trained": lambda q, k: torch.zeros(q, k, requires_grad=True),
}


def attend_both_ways(q, k, v, mask):
    """Return ours, called at once and as the registered operator, and torch's."""
    with torch.no_grad():
        ours = ops.attention(q, k, v, mask), ops.OVERLOADS["attention"](q, k, v, mask)
    return *ours, F.scaled_dot_product_attention(q, k, v, mask)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("outputs", [8, 16])
@pytest.mark.parametrize("length", [1, 5])
def test_attention_has_torchs_strides(mask, outputs, length):
    for of_query in ORDERS.values():
        for of_key in ORDERS.values():
            q, k, v = heads(2, 3, length, 8, of_query), heads(2, 3, 6, 8, of_key), heads(2, 3, 6, outputs, (0, 2, 1, 3))
            once, registered, torchs = attend_both_ways(q, k, v, MASKS[mask](length, 6))
            assert once.stride() == registered.stride() == torchs.stride()
            assert torch.allclose(once, torchs, atol=1e-5)


@pytest.mark.parametrize(
    ("q", "k"),
    [
        ((5, 8), (6, 8)), ((3, 5, 8), (3, 6, 8)), ((2, 2, 3, 5, 8), (2, 2, 3, 6, 8)), ((2, 3, 5, 8), (1, 3, 6, 8)),
        ((2, 3, 5, 8), (2, 1, 6, 8)), ((1, 3, 5, 8), (2, 3, 6, 8)), ((2, 3, 5, 8), (2, 3, 0, 8)), ((0, 3, 5, 8),) * 2,
        ((2, 3, 0, 8), (2, 3, 6, 8)),
    ],
)  # fmt: skip
def test_attention_of_other_shapes_has_torchs_strides(q, k):
    q, k = torch.randn(q), torch.randn(k)
    once, registered, torchs = attend_both_ways(q, k, k, None)
    assert once.stride() == registered.stride() == torchs.stride()


@pytest.mark.parametrize("part", ["chunk", "expanded", "step"])
def test_attention_of_parts_of_a_tensor_has_torchs_strides(part):
    q = {
        "chunk": torch.randn(2, 5, 72).chunk(3, -1)[0].view(2, 5, 3, 8).transpose(1, 2),
        "expanded": torch.randn(2, 1, 5, 8).expand(2, 3, 5, 8),
        "step": torch.randn(2, 3, 5, 16)[..., ::2],
    }[part]
    for k in (q, torch.randn(2, 3, 5, 8)):
        once, registered, torchs = attend_both_ways(q, k, k, None)
        assert once.stride() == registered.stride() == torchs.stride()


def test_what_views_a_contiguous_result_of_attention_runs():
    def multiply(x, y):
        q = x.view(2, 4, 2, 3).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, y).view(4, 4, 5)

    x, y = torch.randn(2, 4, 6), torch.randn(2, 2, 4, 5)
    assert quantize(Product(multiply), x, y)(x, y).shape == (4, 4, 5)


def penalty(multiply, masks):
    """Return the gradients of a gradient penalty through a product of one tensor with itself and another."""
    torch.manual_seed(0)
    a, b = (torch.randn(1, 2, 4, 4, requires_grad=True) for _ in range(2))
    leaves = (a, b, *(mask.requires_grad_() for mask in masks))
    out = multiply(torch.tanh(a), b, *masks)
    found = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in found), leaves)


ATTEND = torch.ops.aten._scaled_dot_product_attention_math
PENALTIES = {
    "matmul": (lambda a, b: ops.matmul(a, b), lambda a, b: a @ b, []),
    "matmul, twice": (lambda a, b: ops.matmul(a, a) * b, lambda a, b: a @ a * b, []),
    "attention": (lambda a, b: ops.attention(a, b, b), lambda a, b: ATTEND(a, b, b)[0], []),
    "attention, causal": (
        lambda a, b: ops.attention(a, b, a, None, True, 0.3),
        lambda a, b: ATTEND(a, b, a, None, 0.0, True, None, scale=0.3)[0],
        [],
    ),
    "attention, masked": (
        lambda a, b, mask: ops.attention(a, b, b, mask),
        lambda a, b, mask: ATTEND(a, b, b, mask)[0],
        [torch.eye(4)],
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_a_gradient_has_a_gradient(name):
    ours, torchs, masks = PENALTIES[name]
    for got, expected in zip(penalty(ours, masks), penalty(torchs, masks), strict=True):
        assert expected.abs().max() > 0.01
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_the_registered_attention_has_a_gradient_with_its_defaults():
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    for options in ((), (None,), (None, True), (None, True, 0.5)):
        ours = torch.autograd.grad(torch.ops.fxquant.attention(q, q, q, *options).square().sum(), q)[0]
        mask, is_causal, scale = (*options, *(None, False, None)[len(options) :])
        torchs = F.scaled_dot_product_attention(q, q, q, mask, 0.0, is_causal, scale=scale)
        assert torch.allclose(ours, torch.autograd.grad(torchs.square().sum(), q)[0], atol=1e-4)


@pytest.mark.parametrize("name", ["matmul", "attention"])
def test_a_backward_under_autocast_keeps_the_forwards_dtype(name):
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    out = (ops.matmul(x, x) if name == "matmul" else ops.attention(x, x, x)).sum()
    (expected,) = torch.autograd.grad(out, x, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(torch.autograd.grad(out, x)[0], expected)


def of_matmul(a, b):
    return ops.matmul(a, b), torch.matmul(a, b)


def of_attention(a, b):
    return ops.attention(a, b, b), F.scaled_dot_product_attention(a, b, b)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("both", [of_matmul, of_attention])
def test_what_torch_func_transforms_is_torchs(both):
    a, b = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    for transform in (torch.vmap, lambda f: torch.vmap(f, in_dims=(0, None))):
        ours, torchs = transform(both)(a, b)
        assert torch.allclose(ours, torchs, atol=1e-5)
    ours, torchs = torch.func.jacrev(both)(a[0], b[0])
    assert torch.allclose(ours, torchs, atol=1e-5)
    assert ours.abs().max() > 0


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_forward_mode_is_torchs():
    a, tangent = torch.randn(4, 4), torch.randn(4, 4)
    ours = torch.func.jvp(lambda x: ops.matmul(x, x), (a,), (tangent,))[1]
    assert torch.allclose(ours, a @ tangent + tangent @ a, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, tangent)
        ours = torch.autograd.forward_ad.unpack_dual(ops.matmul(dual, dual)).tangent
    assert torch.allclose(ours, a @ tangent + tangent @ a, atol=1e-5)
