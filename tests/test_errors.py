"""Errors: one base, and messages that name what is near."""

import inspect

import pytest

from fxquant import FxQuantError, errors
from fxquant.errors import nearest


def test_every_error_is_an_fxquant_error():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    assert len(kinds) >= 11
    assert all(issubclass(kind, FxQuantError) for kind in kinds)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [("ShapeError", ValueError), ("DTypeError", TypeError), ("IndexRangeError", IndexError)],
)
def test_errors_about_tensors_are_what_torch_would_raise_too(kind, builtin):
    assert issubclass(getattr(errors, kind), builtin)


def test_nearest_suggests_close_names():
    assert nearest("decodr", ["encoder", "decoder", "rnn"]).startswith("; did you mean 'decoder'")


def test_nearest_lists_what_there_is_when_nothing_is_close():
    assert nearest("zzz", ["b", "a"]) == "; there are 'a', 'b'"


def test_nearest_shortens_a_long_list():
    assert nearest("zzz", [f"m{i}" for i in range(20)]).endswith(", … (20 in all)")


def test_nearest_of_nothing():
    assert nearest("zzz", []) == "; there is none"
