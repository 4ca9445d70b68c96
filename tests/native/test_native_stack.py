"""How a stack of recurrent layers falls into calls of the library, and what they compute together."""

import pytest
import torch

from fxquant.ops import native, native_stack, reference_recurrent
from tests.native.cases import int8, kernels, same_bits

DTYPES = {"8": torch.int8, "4": torch.uint8, "f": torch.float32, "h": torch.float16}


@pytest.mark.parametrize(
    ("schemes", "directions", "expected"),
    [
        ("88 44 84", 1, [(0, 3, False, False)]),
        ("f8 88 88", 1, [(0, 3, True, False)]),
        ("88 h8 48", 1, [(0, 1, False, False), (1, 3, True, False)]),
        ("88 8f 44 88", 1, [(0, 1, False, False), (1, 2, False, True), (2, 4, False, False)]),
        ("ff 88", 1, [(0, 1, True, True), (1, 2, False, False)]),
        ("888 48h", 1, [(0, 1, False, False), (1, 2, False, True)]),
        ("88 f4 84 88", 2, [(0, 4, True, False)]),
        ("88 44 84 8h", 2, [(0, 2, False, False), (2, 4, False, True)]),
    ],
)
def test_a_stack_falls_into_as_few_stretches_as_can_be(schemes, directions, expected):
    cells = schemes.split()
    weights = [torch.empty(0, dtype=DTYPES[scheme]) for cell in cells for scheme in cell]
    assert native_stack.stretches(weights, len(cells), directions) == expected


def matrix(rows, columns, bits):
    if bits == 8:
        return int8(rows, columns), torch.rand(rows) * 0.01
    groups = (torch.randn(rows, -(-columns // 64)) * 0.05).bfloat16()
    return int8(rows, (columns + 1) // 2).view(torch.uint8), groups


@pytest.mark.parametrize("steps", [2, 9])
@pytest.mark.parametrize("batch", [1, 4, 21])
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_sequences_of_int4_weights(isa, mode, steps, batch):
    torch.manual_seed(batch)
    rows = (4 if mode == "lstm" else 3) * 130
    pairs = [matrix(rows, 75, 4), matrix(rows, 130, 4), matrix(rows, 130, 8), matrix(rows, 130, 4)]
    weights, scales = map(list, zip(*pairs, strict=True))
    biases, own = [torch.randn(rows) for _ in range(2)], [torch.randn(130) for _ in range(2)]
    x, h, c = torch.randn(steps, batch, 75), torch.randn(2, batch, 130), torch.randn(2, batch, 130)
    lstm, gru = (x, None, h, c, weights, scales, biases), (x, None, h, weights, scales, biases, own, mode)
    run, expect, args = (
        (native.lstm, reference_recurrent.lstm, lstm) if mode == "lstm" else (native.rnn, reference_recurrent.rnn, gru)
    )
    expected = expect(*args)
    for threads in (1, 2):
        with kernels(isa, threads):
            assert all(map(same_bits, run(*args), expected))
