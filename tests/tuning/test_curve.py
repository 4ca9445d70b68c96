"""The trade-off curve as a drawing."""

from xml.etree import ElementTree

import pytest

from fxquant import (
    suggest_mapping,
)
from tests.debug.measure.test_sensitivity import data, model

__all__ = ["data", "model"]  # fixtures


@pytest.mark.parametrize("minimize", ["bytes", "ms"])
def test_the_curve_is_a_file_of_its_own(model, data, tmp_path, minimize):
    found = suggest_mapping(model, data, budget=0.005, minimize=minimize)
    found.plot(tmp_path / "curve.svg")
    drawn = ElementTree.fromstring((tmp_path / "curve.svg").read_text(encoding="utf-8"))
    circles = [part.get("class") for part in drawn.iter("{http://www.w3.org/2000/svg}circle")]
    assert len([kind for kind in circles if kind != "chosen"]) == len(found.rows)
    assert circles.count("chosen") == 1
    assert circles.count("out") == sum(not row.is_within for row in found.rows) > 0
    text = "".join(drawn.itertext())
    assert ("milliseconds" if minimize == "ms" else "MB") in text
    assert "http" not in found.figure().replace("http://www.w3.org/2000/svg", "")
