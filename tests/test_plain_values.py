"""Python values as JSON and back."""

import json
import math
from collections import OrderedDict, namedtuple

import pytest
import torch

from fxquant import CheckpointError
from fxquant.plain_values import decode, encode

VALUES = [
    None, True, False, 0, -(2**70), 1.5, 1e300, "text", "", "tensor", b"\x00\xff", [], (), {}, set(), frozenset({1}),
    [1, (2, [3, {"a": (None,)}])], {1: 2, (3, 4): "x", None: True}, {"tensor": "x"}, {"dict": [1]},
    OrderedDict([("b", 1), ("a", 2)]), torch.float16, torch.device("cpu"), torch.Size([2, 3]), {"a": {1, 2}},
    math.inf, -math.inf,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_back_as_it_was(value):
    tensors = {}
    found = decode(json.loads(json.dumps(encode(value, "place", tensors), allow_nan=False)), tensors)
    assert found == value
    assert type(found) is type(value)
    assert not tensors


def test_nan_and_the_order_of_a_dict_come_back():
    assert math.isnan(decode(encode(math.nan, "place", {}), {}))
    assert [*decode(encode({"b": 1, "a": 2}, "place", {}), {})] == ["b", "a"]


def test_tensors_are_held_apart():
    tensors, values = {}, {"a": torch.arange(3), "b": [torch.ones(2, 2)]}
    coded = encode(values, "place", tensors)
    assert sorted(tensors) == ["place.0", "place.1"]
    found = decode(json.loads(json.dumps(coded)), tensors)
    assert torch.equal(found["a"], torch.arange(3))
    assert torch.equal(found["b"][0], torch.ones(2, 2))
    assert not tensors


Point = namedtuple("Point", "x y")


class Text(str):
    pass


@pytest.mark.parametrize(
    "value", [object(), 1j, Point(1, 2), Text("a"), {"a": [Point]}, torch.nn.Parameter(torch.ones(1))]
)
def test_other_types_are_refused(value):
    with pytest.raises(
        CheckpointError, match=r"'place' holds a \S+, which a file without pickle cannot hold; let get_ex"
    ):
        encode(value, "place", {})


@pytest.mark.parametrize(
    "coded", [{"os.system": "ls"}, {"tensor": "absent"}, {}, {"a": 1, "b": 2}, {"dtype": "float17"}]
)
def test_what_encode_does_not_write_is_an_error(coded):
    with pytest.raises((LookupError, TypeError, ValueError, AttributeError)):
        decode(coded, {})
