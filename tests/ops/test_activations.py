"""Products of two activations where torch's own run instead: other layouts, dtypes, transforms, forms."""

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
