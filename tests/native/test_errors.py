"""What cannot be computed is an error of ours, found before any memory is touched."""

import pytest
import torch

from fxquant import ops
from fxquant.errors import DTypeError, IndexRangeError, ShapeError
from tests.native.cases import int8
from tests.ops import reference


@pytest.mark.parametrize("index", [-1, 10, 2**40])
@pytest.mark.parametrize("call", ["embedding", "embedding_bag"])
def test_an_index_beyond_the_table_is_an_error(call, index):
    with pytest.raises(IndexRangeError, match="10 rows"):
        getattr(ops, call)(torch.tensor([[1, index]]), int8(10, 4), torch.rand(10), None, 4)


def test_a_wrong_number_of_scales_is_an_error():
    with pytest.raises(ShapeError, match=r"with scale torch.float32 \(2,\)"):
        ops.linear(torch.randn(2, 4), int8(3, 4), torch.rand(2))


def test_a_weight_of_other_integers_is_an_error():
    with pytest.raises(DTypeError, match=r"in int8: expected torch.int8 \(3, 4\) .*, got torch.int32"):
        ops.linear(torch.randn(2, 4), int8(3, 4).int(), torch.rand(3))


def test_a_wrong_number_of_biases_is_an_error():
    with pytest.raises(ShapeError, match="bias of shape"):
        ops.linear(torch.randn(2, 4), int8(3, 4), torch.rand(3), torch.rand(1))


@pytest.mark.parametrize("sizes", [[1, 2], [3, 1], [2, 0], [2, 2]])
def test_batch_sizes_that_do_not_fit_are_an_error(sizes):
    weights = [int8(8, 4), int8(8, 2)]
    state = torch.zeros(1, 2, 2)
    with pytest.raises(ShapeError, match="batch_sizes"):
        ops.lstm(torch.randn(3, 4), torch.tensor(sizes), state, state, weights, [torch.rand(8)] * 2, [])


def test_a_table_of_other_integers_is_an_error():
    with pytest.raises(DTypeError, match=r"got torch.int16"):
        ops.embedding(torch.tensor([0]), int8(3, 6).short(), torch.rand(3), None, 6)


def test_a_table_of_other_columns_is_an_error():
    with pytest.raises(ShapeError, match=r"in uint4: expected torch.uint8 \(3, 3\)"):
        ops.embedding(torch.tensor([0]), int8(3, 6).view(torch.uint8), torch.rand(3), None, 6, format="uint4")


@pytest.mark.parametrize("offsets", [[1, 2], [0, 3, 2], [0, 9]])
def test_unsound_offsets_go_to_the_reference(offsets):
    args = (torch.tensor([0, 1, 2]), int8(3, 4), torch.rand(3), None, 4, torch.tensor(offsets))
    try:
        expected = reference.embedding_bag(*args)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)):
            ops.embedding_bag(*args)
    else:
        assert torch.equal(ops.embedding_bag(*args), expected)


def test_memory_that_is_not_there_is_an_error():
    rows = torch.empty(1, dtype=torch.float32).expand(2**52, 1)  # more than a process can address, in 4 bytes
    with pytest.raises((MemoryError, RuntimeError), match=r"allocate|memory"):
        ops.linear(rows, int8(1, 1), torch.rand(1))
