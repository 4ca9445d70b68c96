"""Which schemes may be tried, and the best mixtures of them."""

import pytest

from fxquant import (
    QConfigError,
    suggest_mapping,
)
from fxquant.tuning.ladder import LADDER
from tests.debug.measure.test_sensitivity import data, model

__all__ = ["data", "model"]  # fixtures


@pytest.mark.parametrize("schemes", [("int5",), ("int8", "float17"), "int8"])
def test_another_scheme_is_an_error(model, data, schemes):
    with pytest.raises(QConfigError, match="schemes is a tuple of some of " + ", ".join(map(repr, LADDER))):
        suggest_mapping(model, data, budget=1.0, schemes=schemes)


def test_no_scheme_is_an_error(model, data):
    with pytest.raises(QConfigError, match="schemes is empty"):
        suggest_mapping(model, data, budget=1.0, schemes=())
