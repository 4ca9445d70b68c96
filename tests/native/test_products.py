"""Products of two activations and attention: near the exact ones, and a row's bits depend on that row alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.native import native
from tests.native.cases import kernels, same_bits, usable
from tests.ops import reference

PRODUCTS = [  # of a and b, without their batches
    (1, 1, 1),
    (1, 70, 5),
    (5, 1, 33),
    (7, 64, 1),
    (9, 8, 9),
    (13, 300, 70),
    (50, 33, 129),
    (3, 0, 4),
    (0, 3, 4),
    (3, 4, 0),
]
BATCHES = [((), ()), ((2, 3), (2, 3)), ((2, 1), (3,)), ((), (4,)), ((5, 2), ()), ((0, 2), (2,))]


def operands(shape, outer=((), ())):
    rows, depth, columns = shape
    return torch.randn(*outer[0], rows, depth), torch.randn(*outer[1], depth, columns)


def places(x):
    """Yield the same values elsewhere: transposed, every second of a larger tensor, not aligned."""
    yield x.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    yield wide[..., ::2]
    flat = x.new_zeros(x.numel() + 1)
    flat[1:] = x.reshape(-1)
    yield flat[1:].view(x.shape)


@pytest.mark.parametrize("shape", PRODUCTS)
@pytest.mark.parametrize("outer", BATCHES)
def test_a_product_is_exact_but_for_the_roundings_of_its_sums(isa, shape, outer):
    a, b = operands(shape, outer)
    exact = a.double() @ b.double()
    slack = (a.double().abs() @ b.double().abs()) * shape[1] * 2**-24  # each of K multiply-adds rounds once
    with kernels(isa, 3):
        got = native.matmul(a, b)
    assert got.shape == exact.shape
    assert ((got - exact).abs() <= slack).all()
    assert ((reference.matmul(a, b) - exact).abs() <= 2 * slack).all()  # which rounds each product too


@pytest.mark.parametrize("shape", PRODUCTS)
def test_every_instruction_set_thread_and_place_in_memory_gives_the_same_bits(shape):
    a, b = operands(shape, ((2,), (2,)))
    with kernels("portable", 1):
        expected = native.matmul(a, b)
    for isa in usable():
        for threads in (1, 2, 7):
            with kernels(isa, threads):
                assert same_bits(native.matmul(a, b), expected), (isa, threads)
        for x, y in zip(places(a), places(b), strict=True):
            with kernels(isa, 2):
                assert same_bits(native.matmul(x, b), expected)
                assert same_bits(native.matmul(a, y), expected)


def test_an_element_depends_on_its_row_and_its_column_alone(isa):
    a, b = operands((60, 40, 150), ((3, 2), (3, 2)))
    with kernels(isa, 2):
        together = native.matmul(a, b)
        for rows in (slice(5, 6), slice(7, 10), slice(1, 14), slice(3, 40)):
            for columns in (slice(0, 1), slice(17, 40), slice(60, 150)):
                part = native.matmul(a[1:2, 1:, rows].contiguous(), b[1:2, 1:, :, columns].contiguous())
                assert same_bits(part, together[1:2, 1:, rows, columns])


def test_vectors_are_multiplied_as_torch_does(isa):
    with kernels(isa, 1):
        for a, b in (((5,), (5,)), ((5,), (5, 3)), ((3, 5), (5,)), ((2, 3, 5), (5,)), ((5,), (2, 5, 3))):
            x, y = torch.randn(a), torch.randn(b)
            assert torch.allclose(native.matmul(x, y), x @ y, atol=1e-5)
            assert native.matmul(x, y).shape == (x @ y).shape


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(isa, value):
    a, b = torch.ones(20, 30), torch.ones(30, 20)
    a[3, 7] = value
    with kernels(isa, 1):
        y = native.matmul(a, b)
    assert torch.equal(y[[2, 4]], torch.full((2, 20), 30.0))
    assert same_bits(y[3], torch.full((20,), value))


ATTENTIONS = [  # batch, heads, queries, keys, depth, outputs
    (1, 1, 1, 1, 1, 1),
    (2, 3, 9, 9, 8, 8),
    (2, 2, 1, 40, 16, 16),
    (3, 2, 50, 70, 24, 20),
    (1, 2, 100, 300, 32, 64),
    (2, 1, 5, 17, 70, 130),
    (2, 2, 3, 0, 4, 5),
    (2, 2, 0, 3, 4, 5),
    (0, 2, 3, 3, 4, 5),
]


def attended(shape):
    batch, heads, queries, keys, depth, outputs = shape
    q, k = torch.randn(batch, heads, queries, depth), torch.randn(batch, heads, keys, depth)
    return q, k, torch.randn(batch, heads, keys, outputs)


def masks(batch, heads, queries, keys):
    yield None
    added = torch.randn(batch, 1, 1, keys)
    if keys > 3:
        added[..., keys - 2 :] = -torch.inf
    yield added
    seen = torch.rand(batch, heads, queries, keys) > 0.3
    if keys:
        seen[..., 0] = True
    yield seen
    yield torch.randn(queries, keys)


def near(got, expected, scores, keys):
    """Return whether two attentions differ by no more than what their sums may round.

    A score is wrong by at most E 2^-24 of what its products are in all, and so by that much each weight's exponent.
    """
    slack = (2 * scores + keys + 60) * 2**-24  # the series of exp: 4e-7, some 7 units of 2^-24, and its argument's
    return ((got.double() - expected.double()).abs() <= 2 * slack * expected.abs().amax().clamp(min=1)).all()


@pytest.mark.parametrize("shape", ATTENTIONS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_torchs_but_for_rounding(isa, shape, is_causal):
    q, k, v = attended(shape)
    for mask in masks(*shape[:4]) if not is_causal else [None]:
        exact = F.scaled_dot_product_attention(
            *(x.double() for x in (q, k, v)),
            mask if mask is None or mask.dtype == torch.bool else mask.double(),
            is_causal=is_causal,
        )
        total = float((q.abs() @ k.abs().transpose(-2, -1)).amax()) if shape[3] and q.numel() else 0.0
        with kernels(isa, 2):
            got = native.attention(q, k, v, mask, is_causal)
        plain = reference.attention(q, k, v, mask, is_causal)
        assert got.shape == plain.shape == exact.shape
        assert got.stride() == plain.stride() == exact.stride()
        if got.numel():
            bound = v.abs().amax() if v.numel() else torch.tensor(0.0)
            exact = exact.nan_to_num(0.0)
            assert near(got / bound.clamp(min=1), exact / bound.clamp(min=1), total * shape[4], shape[3])
            assert near(plain / bound.clamp(min=1), exact / bound.clamp(min=1), total * shape[4], shape[3])


def test_every_instruction_set_and_thread_attends_with_the_same_bits():
    for shape in ATTENTIONS:
        q, k, v = attended(shape)
        for mask in masks(*shape[:4]):
            results = []
            for isa in usable():
                for threads in (1, 2, 7):
                    with kernels(isa, threads):
                        results.append(native.attention(q, k, v, mask))
                with kernels(isa, 2):
                    results.append(native.attention(*(next(places(x)) for x in (q, k, v)), mask))
            assert all(same_bits(result, results[0]) for result in results)


def test_a_sequence_is_attended_with_the_same_bits_alone_padded_and_step_by_step(isa):
    q, k, v = attended((3, 2, 70, 70, 24, 20))
    with kernels(isa, 2):
        together = native.attention(q, k, v)
        causal = native.attention(q, k, v, None, True)
        assert same_bits(native.attention(*(x[1:2].contiguous() for x in (q, k, v))), together[1:2])
        for length in (1, 15, 16, 33, 69):
            short = [x[:, :, :length].contiguous() for x in (q, k, v)]
            alone = native.attention(*short)
            mask = torch.where(torch.arange(70) < length, 0.0, -torch.inf)
            assert same_bits(native.attention(q, k, v, mask)[:, :, :length], alone)
            assert same_bits(native.attention(*short, None, True), causal[:, :, :length])
            last = native.attention(q[:, :, length - 1 : length], *short[1:])  # a step with the earlier keys kept
            assert same_bits(last, causal[:, :, length - 1 : length])


def test_a_query_that_sees_no_key_gets_zeros(isa):
    q, k, v = attended((1, 1, 4, 9, 8, 8))
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[2] = False
    with kernels(isa, 1):
        got = native.attention(q, k, v, mask)
    assert torch.equal(got[0, 0, 2], torch.zeros(8))
    assert torch.equal(reference.attention(q, k, v, mask)[0, 0, 2], torch.zeros(8))
    assert got[0, 0, [0, 1, 3]].abs().amin() > 0


def test_nan_stays_in_its_query(isa):
    q, k, v = attended((1, 1, 20, 9, 8, 8))
    with kernels(isa, 1):
        clean = native.attention(q, k, v)
        q[0, 0, 5, 3] = math.nan
        got = native.attention(q, k, v)
    others = [i for i in range(20) if i != 5]
    assert got[0, 0, 5].isnan().all()
    assert reference.attention(q, k, v)[0, 0, 5].isnan().all()
    assert same_bits(got[0, 0, others], clean[0, 0, others])
