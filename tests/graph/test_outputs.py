"""Outputs by name, and which of them can be judged."""

import collections
import dataclasses
import math
import types

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from fxquant.graph.outputs import Error, drained, named_floats, named_tensors

Pair = collections.namedtuple("Pair", "mean states")


@dataclasses.dataclass
class Answer:
    scores: torch.Tensor
    labels: torch.Tensor


class Cache:
    def __init__(self, keys):
        self.keys, self.length = keys, 3


def names(value):
    return list(named_tensors(value))


def test_a_tensor_alone_has_no_name():
    assert names(torch.ones(2)) == [""]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((torch.ones(1), [torch.ones(1), None]), ["0", "1.0"]),
        ({"a": torch.ones(1), 3: {"b": torch.ones(1)}}, ["a", "3.b"]),
        (Answer(torch.ones(1), torch.ones(1)), ["scores", "labels"]),
        (Pair(torch.ones(1), (torch.ones(1),)), ["mean", "states.0"]),
        (pack_sequence([torch.ones(2, 3)]), ["data"]),
        ((Cache([torch.ones(1)]),), ["0.keys.0"]),
        (types.SimpleNamespace(x=torch.ones(1)), ["x"]),
        ("no tensor", []),
    ],
)
def test_every_container_is_looked_into(value, expected):
    assert names(value) == expected


def test_a_container_that_holds_itself_ends():
    value = [torch.ones(1)]
    value.append(value)
    assert names(value) == ["0"]


def test_floats_are_what_can_be_judged():
    value = {"labels": torch.ones(2, dtype=torch.long), "z": torch.ones(2, dtype=torch.complex64), "loss": 0.5}
    found = named_floats({**value, "mask": torch.ones(2, dtype=torch.bool), "half": torch.ones(2).half()})
    assert list(found) == ["z", "loss", "half"]
    assert found["z"].shape == (2, 2)


def test_a_generator_gives_its_first_values():
    assert drained(x for x in range(3)) == [0, 1, 2]
    assert len(drained(iter_forever())) < 100
    assert drained((1, 2)) == (1, 2)


def iter_forever():
    while True:
        yield 1


def test_values_that_are_not_finite_in_float_have_no_error():
    error = Error()
    error.add(torch.tensor([3.0, -math.inf]), torch.tensor([2.0, -math.inf]))
    assert (error.signal, error.noise, error.largest) == (9.0, 1.0, 1.0)
    error.add(torch.tensor([1.0]), torch.tensor([math.nan]))
    assert error.sqnr_db == -math.inf
