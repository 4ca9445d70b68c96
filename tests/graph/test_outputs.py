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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_values_of_nested_and_sparse_tensors_are_judged():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    found = named_floats({"nested": nested, "sparse": torch.eye(2).to_sparse()})
    assert found["nested"].tolist() == [1.0] * 5
    assert found["sparse"].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_options_models_and_functions_are_no_outputs():
    def function():
        pass

    module = types.ModuleType("module")
    function.x = module.x = torch.ones(1)
    assert names(types.SimpleNamespace(x=torch.ones(1), p=0.5)) == ["x"]
    assert names((torch.nn.Linear(2, 2), Answer, function, module)) == []
    assert names({"p": 0.5}) == ["p"]


def test_iterators_of_python_give_their_first_values_too():
    assert drained(map(abs, (-1, 2))) == [1, 2]
    assert drained(filter(None, (0, 2))) == [2]
    assert drained(zip((1,), (2,), strict=True)) == [(1, 2)]


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


def error_of(*pairs, dtype=torch.float32):
    error = Error()
    for expected, got in pairs:
        error.add(torch.tensor(expected, dtype=dtype), torch.tensor(got, dtype=dtype))
    return error


def test_what_the_sums_come_to():
    error = error_of(([10.0, 0.0], [10.0, 1.0]), ([0.0], [-0.5]), ([10.0], [10.0]), ([0.0, 0.0], [0.0, 0.0]))
    assert error.max_error == 1.0
    assert math.isclose(error.sqnr_db, 10 * math.log10(200 / 1.25))
    assert math.isclose(error.relative_rms, math.sqrt(1.25 / 200))
    assert error_of(([1.0], [4.0])).max_error == 3.0
    assert (error_of(([0.0], [4.0])).sqnr_db, error_of(([0.0], [4.0])).relative_rms) == (-math.inf, math.inf)
    assert (error_of(([3.0], [3.0])).sqnr_db, error_of(([3.0], [3.0])).relative_rms) == (math.inf, 0.0)


@pytest.mark.parametrize("pairs", [(), (([], []),), (([math.nan], [1.0]),)], ids=["none", "empty", "NaN"])
def test_without_any_pair_of_values_nothing_is_known(pairs):
    error = error_of(*pairs)
    assert all(math.isnan(found) for found in (error.sqnr_db, error.relative_rms, error.max_error))


def test_float64_is_judged_in_float64():
    assert error_of(([1.0], [1 + 1e-12]), dtype=torch.float64).max_error == pytest.approx(1e-12, rel=1e-3, abs=0)


def test_large_halves_have_a_finite_sum():
    assert error_of(([6e4], [5e4]), dtype=torch.float16).signal == pytest.approx(6e4**2, rel=1e-3)
