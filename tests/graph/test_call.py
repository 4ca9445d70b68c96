"""The arguments of the example call and of batches."""

import pytest

from fxquant import ExampleInputsError, prepare_fx
from tests.graph.trace.test_signature import KeywordOnly, x_
from tests.samples import everything


@pytest.mark.parametrize("kwargs", [{"mask": 1}, {"x": 1, "y": 2}])
def test_keywords_that_do_not_fit_are_an_error(kwargs):
    with pytest.raises(
        ExampleInputsError, match=r"and the keywords '.*, but forward is KeywordOnly\(x: torch.Tensor, \*"
    ):
        prepare_fx(KeywordOnly().eval(), everything(), kwargs)


def test_example_kwargs_is_a_dict():
    with pytest.raises(ExampleInputsError, match="example_kwargs must be a dict of keyword arguments, got Tensor"):
        prepare_fx(KeywordOnly().eval(), everything(), x_(), example_kwargs=x_())
