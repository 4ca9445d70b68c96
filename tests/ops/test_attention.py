"""The operator attention: its strides, its gradients, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import DTypeError, ShapeError, ops
from tests.samples import quantize


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


class Product(nn.Module):
    """A product behind one quantized layer."""

    def __init__(self, multiply):
        super().__init__()
        self.linear, self.multiply = nn.Linear(6, 6), multiply

    def forward(self, x, y):
        return self.multiply(self.linear(x), y)


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


def test_the_registered_attention_has_a_gradient_with_its_defaults():
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    for options in ((), (None,), (None, True), (None, True, 0.5)):
        ours = torch.autograd.grad(torch.ops.fxquant.attention(q, q, q, *options).square().sum(), q)[0]
        mask, is_causal, scale = (*options, *(None, False, None)[len(options) :])
        torchs = F.scaled_dot_product_attention(q, q, q, mask, 0.0, is_causal, scale=scale)
        assert torch.allclose(ours, torch.autograd.grad(torchs.square().sum(), q)[0], atol=1e-4)
