"""The native kernels against the reference: the same bits, on every instruction set and number of threads."""

import itertools
import math
import os

import pytest
import torch

from fxquant.ops import library
from tests.native import cases, native
from tests.native.cases import GROUPED, failures, grouped, int8, int16, kernels, same_bits
from tests.ops import reference

SETTINGS = [(isa, threads) for isa in cases.usable() for threads in (1, 2)]
COUNTS = {
    "linear": 1200,
    "linear_grouped": 1200,
    "linear_int16": 1200,
    "linear_float16": 600,
    "lstm": 120,
    "rnn": 120,
    "lstm_mixed": 120,
    "rnn_mixed": 120,
    "embedding": 150,
    "embedding_bag": 150,
}  # times ten settings


@pytest.mark.parametrize("operator", COUNTS)
def test_random_cases_give_the_references_bits(operator):
    wrong = [line for seed in range(COUNTS[operator]) for line in failures(operator, seed, SETTINGS)]
    assert not wrong, "\n".join(wrong[:20])


exhaustive = pytest.mark.skipif("FXQUANT_EXHAUSTIVE" not in os.environ, reason="hours: set FXQUANT_EXHAUSTIVE=1")


@exhaustive
def test_every_small_shape_gives_the_references_bits():
    for rows, columns in itertools.product(range(65), range(65)):
        x, weight, scale = torch.randn(rows, columns), int8(64, columns), torch.rand(64)
        for outputs in range(65):
            args = (x, weight[:outputs], scale[:outputs])
            expected = reference.linear(*args)
            for isa in cases.usable():
                with kernels(isa, 1):
                    assert same_bits(native.linear(*args), expected), (isa, rows, columns, outputs)


@exhaustive
def test_a_million_random_cases_give_the_references_bits():
    wrong = [line for seed in range(10**6) for line in failures("linear", seed, SETTINGS)]
    assert not wrong, "\n".join(wrong[:20])


def test_a_row_gives_the_same_bits_alone_and_in_any_batch(isa):
    x, weight, scale = torch.randn(70, 130), int8(100, 130), torch.rand(100)
    with kernels(isa, 1):
        together = native.linear(x, weight, scale)
        for rows in (1, 2, 3, 7, 16, 33):
            assert same_bits(native.linear(x[5 : 5 + rows], weight, scale), together[5 : 5 + rows]), rows


ROWS = {
    "permuted": torch.randn(3, 4, 5, 70).permute(1, 2, 0, 3),
    "every second": torch.randn(4, 6, 70)[:, ::2],
    "the last": torch.randn(7, 4, 70)[:, -1],
    "one again and again": torch.randn(1, 70).expand(2, 40, 70),
    "parts": torch.randn(3, 20, 90)[..., 7:77],
    "windows": torch.randn(2, 3, 200).unfold(-1, 70, 9),
    "six dimensions": torch.randn(2, 3, 2, 2, 3, 71)[..., 1:].permute(4, 2, 0, 3, 1, 5),
    "backward and one wide": torch.randn(40, 3)[:, 1:2].expand(40, 1).flip(0),
    "columns apart": torch.randn(20, 140)[:, ::2],
}


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_rows_may_lie_anywhere(isa, name, per_token):
    x = ROWS[name]
    columns = x.shape[-1]
    for weight, scale, how in (
        (int8(30, columns), torch.rand(30), ("int8", 0, 0)),
        (int16(30, columns), torch.rand(30), ("int16", 0, 0)),
        *((*grouped(row, 30, columns, 32), (row.name, 32, columns)) for row in GROUPED),
    ):
        args = (weight, scale, torch.randn(30), False, per_token, 255, *how)
        expected = reference.linear(x.contiguous(), *args)
        for threads in (1, 2):
            with kernels(isa, threads):
                assert same_bits(native.linear(x, *args), expected), (how, threads)


def test_rows_that_lie_anywhere_are_taken_at_once():
    weight, scale = int8(30, 70), torch.rand(30)
    takes = {name: run_at_once(x, weight, scale) is not None for name, x in ROWS.items() if x.shape[-1] == 70}
    assert takes == {name: name != "columns apart" for name in takes}


def run_at_once(x, weight, scale):
    return library._library.linear(True, x, weight, scale, None, False, True, 255, "int8", 0, 0)


def test_step_by_step_equals_the_whole_sequence(isa):
    weights = [int8(4 * 50, 30), int8(4 * 50, 50)]
    scales, biases = [torch.rand(200) * 0.01 for _ in weights], [torch.randn(200)]
    x, h, c = torch.randn(9, 3, 30), torch.randn(1, 3, 50), torch.randn(1, 3, 50)
    with kernels(isa, 1):
        whole = native.lstm(x, None, h, c, weights, scales, biases)
        for step in range(9):
            out, h, c = native.lstm(x[step : step + 1], None, h, c, weights, scales, biases)
            assert same_bits(out[0], whole[0][step]), step
    assert same_bits(h, whole[1])
    assert same_bits(c, whole[2])


@pytest.mark.parametrize(
    ("rows", "outputs"), [(256, 130), (300, 64), (543, 3), (48, 43_700), (70, 30_001), (513, 4160)]
)
def test_products_of_many_rows_give_the_references_bits(isa, rows, outputs):
    x, weight, scale, bias = torch.randn(rows, 70), int8(outputs, 70), torch.rand(outputs), torch.randn(outputs)
    expected = reference.linear(x, weight, scale, bias, True)
    for threads in (1, 3):
        with kernels(isa, threads):
            assert same_bits(native.linear(x, weight, scale, bias, True), expected), threads


@pytest.mark.parametrize("columns", [770, 1030])  # so long rows that the gemv takes up to 32 tokens, three at a time
def test_products_of_some_tokens_by_long_rows_give_the_references_bits(isa, columns):
    x, weight, scale = torch.randn(34, columns), int8(41, columns), torch.rand(41)
    expected = reference.linear(x, weight, scale)  # a token's outputs do not depend on the others
    for tokens in (2, 3, 4, 5, 6, 31, 32, 33, 34):
        with kernels(isa, 2):
            assert same_bits(native.linear(x[:tokens], weight, scale), expected[:tokens]), tokens


FORMS = [(1, 2100), (4, 33), (15, 100), (17, 700), (40, 1100), (300, 130), (2100, 70)]
STREAMED = [(70, 30_001), (20, 105_000)]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(
    ("row", "rows", "outputs"),
    [(row, *shape) for row in GROUPED for shape in (FORMS + STREAMED if row is GROUPED[0] else FORMS)],
    ids=str,
)
def test_grouped_products_of_each_form_give_the_references_bits(isa, row, rows, outputs, group_size):
    x, bias = torch.randn(rows, 203), torch.randn(outputs)
    args = (x, *grouped(row, outputs, 203, group_size), bias, True, True, 255, row.name, group_size, 203)
    expected = reference.linear(*args)
    for threads in (1, 3):
        with kernels(isa, threads):
            assert same_bits(native.linear(*args), expected), threads


@pytest.mark.parametrize("row", GROUPED, ids=str)
def test_a_row_by_groups_gives_the_same_bits_alone_and_in_any_batch(isa, row):
    x, how = torch.randn(70, 130), (*grouped(row, 100, 130, 64), None, False, True, 255, row.name, 64, 130)
    with kernels(isa, 1):
        together = native.linear(x, *how)
        for rows in (1, 2, 3, 7, 16, 33):
            assert same_bits(native.linear(x[5 : 5 + rows], *how), together[5 : 5 + rows]), rows


@pytest.mark.parametrize("columns", [31, 100, 203, 4100])
@pytest.mark.parametrize(("rows", "outputs"), [(1, 2100), (2, 33), (7, 100), (8, 64), (33, 130), (300, 20)])
def test_int16_products_of_each_form_give_the_references_bits(isa, rows, outputs, columns):
    x, weight = torch.randn(rows, columns), int16(outputs, columns)
    args = (x, weight, torch.rand(outputs), torch.randn(outputs), True, True, 255, "int16")
    expected = reference.linear(*args)
    for threads in (1, 3):
        with kernels(isa, threads):
            assert same_bits(native.linear(*args), expected), threads


@pytest.mark.parametrize("value", [-32768, 32767])
@pytest.mark.parametrize("columns", [255, 256, 257, 4095, 4096, 4097, 9000, 140_000])
@pytest.mark.parametrize("last", [255 / 32767, -1.0])
def test_the_greatest_int16_products_do_not_overflow(isa, value, columns, last):
    """Activations of 255 fill the low byte's sums, of -32767 the high byte's; the first sets the scale to 1 / 32767."""
    x, weight = torch.full((3, columns), last), torch.full((5, columns), value, dtype=torch.int16)
    x[:, 0] = 1.0
    expected = reference.linear(x, weight, torch.ones(5), format="int16")
    with kernels(isa, 1):
        assert same_bits(native.linear(x, weight, torch.ones(5), format="int16"), expected)
    assert bool((expected.sign() == math.copysign(1, value * last)).all())


def test_an_int16_row_gives_the_same_bits_alone_and_in_any_batch(isa):
    x, weight, scale = torch.randn(70, 130), int16(100, 130), torch.rand(100)
    with kernels(isa, 1):
        together = native.linear(x, weight, scale, format="int16")
        for rows in (1, 2, 3, 7, 16, 33):
            assert same_bits(native.linear(x[5 : 5 + rows], weight, scale, format="int16"), together[5 : 5 + rows]), (
                rows
            )


@pytest.mark.parametrize("least", [0, -128, -255])  # zero points 0, 128 and 255
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 13])
def test_every_product_of_an_activation_and_a_weight_is_exact(isa, tokens, least):
    """Each token holds whole numbers 255 apart at most, so that its scale is 1 and the sums are known."""
    every = torch.arange(256) + least, torch.arange(256).reshape(-1, 1) + torch.arange(256)  # 256 x 256 products
    ends = torch.randint(2, (256,)) * 255 + least, torch.randint(2, (256, 256)) * 255
    ends[1][0], ends[1][1] = 0, 255  # all -128, all 127: pairs of one sign, which a sum in 16 bits cannot hold
    for values, weight in (every, ends):
        weight = weight.remainder(256).sub(128).to(torch.int8)
        x = torch.stack([values.roll(i) for i in range(tokens)])
        with kernels(isa, 1):
            y = native.linear(x.float(), weight, torch.ones(256))
        assert torch.equal(y.long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("columns", [32768, 32769, 70000])  # the tiled gemm ends at 32768; 66,000 can pass 2**31
def test_very_deep_products_give_the_references_bits(isa, columns):
    x, weight, scale = torch.randn(20, columns), int8(3, columns), torch.rand(3)
    with kernels(isa, 2):
        assert same_bits(native.linear(x, weight, scale), reference.linear(x, weight, scale))


def test_a_large_product_gives_the_references_bits(isa):
    x, weight, scale, bias = torch.randn(75, 300), int8(2100, 300), torch.rand(2100), torch.randn(2100)
    with kernels(isa, 2):
        assert same_bits(native.linear(x, weight, scale, bias), reference.linear(x, weight, scale, bias))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bags_mean_and_greatest_skip_the_padding(isa, mode):
    weight, scale = torch.tensor([[1, 2], [3, -4], [5, 6]], dtype=torch.int8), torch.ones(3)
    with kernels(isa, 1):
        indices = torch.tensor([[0, 1, 2], [2, 2, 2]])
        bags = native.embedding_bag(indices, weight, scale, None, 2, mode=mode, padding_idx=2)
    expected = {"sum": [4.0, -2.0], "mean": [2.0, -1.0], "max": [3.0, 2.0]}[mode]
    assert bags.tolist() == [expected, [0.0, 0.0]]
