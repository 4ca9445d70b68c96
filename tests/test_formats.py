"""The table of formats: each row's storage, packing and names hang together."""

import copy
import pickle

import pytest
import torch

from fxquant.formats import FORMATS, INT3, INT4, INT8, INT16, UINT4, Activation, format_of

INTEGERS = [row for row in FORMATS if row.limits is not None]


@pytest.mark.parametrize("field", ["name", "suffix"])
def test_no_two_formats_share_what_tells_them_apart(field):
    assert len({getattr(row, field) for row in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize("row", FORMATS, ids=repr)
def test_a_row_is_found_by_its_name_and_stays_itself_in_a_copy(row):
    assert format_of(row.name) is row
    assert copy.deepcopy(row) is row
    assert pickle.loads(pickle.dumps(row)) is row


@pytest.mark.parametrize("columns", [0, 1, 2, 7, 8, 33])
@pytest.mark.parametrize("row", INTEGERS, ids=repr)
def test_packed_integers_come_back(row, columns):
    low, high = row.limits
    q = torch.randint(low, high + 1, (3, columns))
    q[:1], q[1:2] = low, high
    stored = row.pack(q.to(torch.int16 if row is INT16 else torch.int8 if low < 0 else torch.uint8))
    assert (stored.dtype, stored.shape) == (row.storage, (3, row.stored_columns(columns)))
    assert torch.equal(row.unpack(stored, columns).long(), q)


@pytest.mark.parametrize("row", INTEGERS, ids=repr)
def test_the_limits_take_the_bits(row):
    low, high = row.limits
    assert 2 ** (row.bits - 1) <= high - low < 2**row.bits


def test_four_bits_lie_two_a_byte_the_first_in_the_low_half():
    assert UINT4.pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0x21, 0x03]]
    assert INT4.pack(torch.tensor([[-8, 7, 0]], dtype=torch.int8)).tolist() == [[0xF0, 0x08]]


def test_three_bits_lie_eight_in_three_bytes_the_first_two_cut_in_three():
    # pairs 0o52, 0o10, 0o67, 0o34 of 6 bits, low digit first; pair 0 is 0b101010: pieces 0b10, 0b10, 0b10
    values = torch.tensor([[2, 5, 0, 1, 7, 6, 4, 3]])
    assert INT3.pack(values - 4).tolist() == [[0o10 << 2 | 2, 0o67 << 2 | 2, 0o34 << 2 | 2]]
    assert INT3.pack(torch.tensor([[-3, -1]])).tolist() == [[0b01, 0b10, 0b01]]  # pair 0 is 0b011001


def test_scales_lie_by_channel_or_by_group():
    assert INT8.scale_shape(5, 100, 0) == (5,)
    assert INT4.scale_shape(5, 100, 32) == (5, 4)
    assert format_of("float16").scale_shape(5, 100, 0) is None


@pytest.mark.parametrize(
    ("columns", "groups", "size"), [(96, 3, 32), (96, 2, 64), (96, 1, 128), (20, 1, 32), (96, 4, 0)]
)
def test_a_group_size_follows_from_the_number_of_groups(columns, groups, size):
    assert INT4.find_group_size(columns, groups) == size


def test_what_has_a_product_says_what_it_multiplies_with():
    assert {row.name: row.activation for row in FORMATS}.items() >= {
        "int8": Activation.UINT8,
        "int16": Activation.INT16,
        "uint8": None,
        "uint4": None,
        "int4": Activation.UINT8,
        "float16": Activation.FLOAT,
        "float32": Activation.FLOAT,
    }.items()
