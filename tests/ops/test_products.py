"""The operator matmul, and the gradients of products of two activations."""

import pytest
import torch

from fxquant import DTypeError, ShapeError, ops
from tests.samples import same_bits


@pytest.mark.parametrize("shapes", [((3, 4), (5, 4)), ((2, 3, 4), (3, 4, 5)), ((), (4,)), ((4,), (5, 3))])
def test_matmul_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(ShapeError, match="no product of"):
        ops.matmul(*map(torch.zeros, shapes))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.complex64, torch.complex64)])
def test_matmul_refuses_other_dtypes(dtypes):
    with pytest.raises(DTypeError, match=f"floats of one dtype, got {dtypes[0]} and {dtypes[1]}"):
        ops.OVERLOADS["matmul"](*(torch.zeros(2, 2, dtype=dtype) for dtype in dtypes))


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


@pytest.mark.parametrize("name", ["matmul", "attention"])
def test_a_backward_under_autocast_keeps_the_forwards_dtype(name):
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    out = (ops.matmul(x, x) if name == "matmul" else ops.attention(x, x, x)).sum()
    (expected,) = torch.autograd.grad(out, x, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(torch.autograd.grad(out, x)[0], expected)
