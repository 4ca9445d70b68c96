"""Triton's kernels of tables give the references' bits."""

import dataclasses

import pytest
import torch

from fxquant.formats import FORMATS
from tests.ops.kernels_on_gpu import DEVICE, TRUNCATES, USES_KERNELS, check, run_triton, triton_kernels  # noqa: F401

pytestmark = USES_KERNELS
TABLES = [row for row in FORMATS if row.is_table]
ROWS = 11


def table(weight_format, columns, is_affine=False):
    """Return (weight, scale, zero_point, columns)."""
    if weight_format.scale is None:
        return torch.randn(ROWS, columns).to(weight_format.storage), None, None, columns
    low, high = weight_format.limits
    weight = weight_format.pack(torch.randint(low, high + 1, (ROWS, columns)).to(torch.int16)).to(weight_format.storage)
    return weight, torch.rand(ROWS), torch.randn(ROWS) * 9 if is_affine else None, columns


@pytest.fixture
def assertions(monkeypatch):
    """Let the interpreter check assertions, as the kernels' launches say for a GPU."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))


@pytest.mark.parametrize("columns", [1, 7, 64])
@pytest.mark.parametrize("weight_format", TABLES, ids=str)
def test_embedding(weight_format, columns):
    for is_affine in (False, True):
        operands = table(weight_format, columns, is_affine)
        check("embedding", torch.randint(ROWS, (3, 2)), *operands, weight_format.name)
        check("embedding", torch.randint(ROWS, (4,), dtype=torch.int32), *operands, weight_format.name)


def test_a_wide_row_is_written_in_parts():
    check("embedding", torch.tensor(3), *table(TABLES[0], 1025))


@pytest.mark.parametrize("dtype", [
    torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(DEVICE == "cpu", reason=TRUNCATES)),
])  # fmt: skip
def test_other_dtypes_of_the_result(dtype):
    check("embedding", torch.randint(ROWS, (3, 2)), *table(TABLES[0], 9), "int8", dtype)


@pytest.mark.parametrize("weight_format", TABLES, ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 2, -1])
def test_bags(weight_format, mode, padding):
    operands, name = table(weight_format, 20, True), weight_format.name
    indices = torch.randint(ROWS, (3, 4))
    indices[0] = ROWS - 1
    check("embedding_bag", indices, *operands, None, mode, None, False, padding, name)
    flat, offsets = indices.flatten(), torch.tensor([0, 5, 5, 9])
    check("embedding_bag", flat, *operands, offsets, mode, None, False, padding, name)
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    check("embedding_bag", flat.int(), *operands, ends, mode, None, True, padding, name)


def test_weighted_bags():
    indices, samples = torch.randint(ROWS, (3, 4)), torch.randn(3, 4)
    check("embedding_bag", indices, *table(TABLES[0], 20), None, "sum", samples)


@pytest.mark.usefixtures("assertions")
@pytest.mark.skipif(DEVICE == "cuda", reason="the assertion leaves the process without its device")
def test_an_index_outside_of_the_table_is_an_assertion_of_the_device():
    for index in (-1, ROWS):
        with pytest.raises(Exception, match="outside of a quantized table"):
            run_triton("embedding", torch.tensor([0, index]), *table(TABLES[0], 4))
        with pytest.raises(Exception, match="outside of a quantized table"):
            run_triton("embedding_bag", torch.tensor([[0, index]]), *table(TABLES[0], 4))


@pytest.mark.usefixtures("assertions")
@pytest.mark.skipif(DEVICE == "cuda", reason="the assertion leaves the process without its device")
@pytest.mark.parametrize(
    ("offsets", "what"), [([1, 2], "first offset"), ([0, 5], "not in order"), ([0, 2, 1], "not in")]
)
def test_offsets_that_are_not_sound_are_an_assertion(offsets, what):
    with pytest.raises(Exception, match=what):
        run_triton("embedding_bag", torch.zeros(4, dtype=torch.int64), *table(TABLES[0], 4), torch.tensor(offsets))


def test_what_is_the_references():
    operands = table(TABLES[0], 4)
    assert run_triton("embedding", torch.zeros(0, dtype=torch.int64), *operands) is None
    assert run_triton("embedding_bag", torch.zeros(2, dtype=torch.int64), *operands) is None
    assert (
        run_triton("embedding_bag", torch.zeros(2, 2, dtype=torch.int64), *operands, None, "mean", torch.ones(2, 2))
        is None
    )
