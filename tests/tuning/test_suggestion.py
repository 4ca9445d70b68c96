"""The report of a search: text, plain values and a drawing."""

import json

from fxquant import (
    suggest_mapping,
)
from tests.debug.measure.test_sensitivity import data, model

__all__ = ["data", "model"]  # fixtures


def test_it_prints_and_gives_plain_values(model, data):
    found = suggest_mapping(model, data, budget=0.0)
    assert "within the budget of 0" in str(found)
    assert "finer: first float; alone it worsens the metric by 0." in str(found)
    assert "← suggested" in str(found)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["model"] is None
    assert told["mapping"].startswith("QConfigMapping()")
    assert len(told["rows"]) == len(found.rows)
