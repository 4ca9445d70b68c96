"""Bars as long as their values."""

import math
import xml.etree.ElementTree as ET

import pytest

from fxquant.debug.report.charts import Bar, bar_chart

SVG = "{http://www.w3.org/2000/svg}"


def bars_of(*bars):
    root = ET.fromstring(bar_chart("a <title>", ("first", "second"), bars, lambda value: f"{value:g} <dB>"))
    groups = root.findall(f"{SVG}g")
    return root, [[float(rect.get("width")) for rect in group.findall(f"{SVG}rect")] for group in groups]


def test_widths_are_proportional():
    _, widths = bars_of(Bar("a", 40.0, 20.0), Bar("b", 10.0, 30.0))
    unit = widths[0][0] / 40
    assert unit > 0
    assert [pair for row in widths for pair in row] == pytest.approx(
        [40 * unit, 20 * unit, 10 * unit, 30 * unit], abs=0.1
    )


def test_what_is_not_known_has_no_width_and_what_is_exact_all():
    _, widths = bars_of(Bar("a", math.nan, math.inf), Bar("b", 8.0, -3.0))
    assert widths == [[0.0, widths[1][0]], [widths[1][0], 0.0]]


def test_bars_stay_inside_and_every_one_is_named_whole():
    name = "a.very.long.path." * 5 + "<end>"
    root, widths = bars_of(Bar(name, 1.0, 2.0))
    (longest,) = [r for r in root.findall(f"{SVG}g/{SVG}rect") if float(r.get("width")) == max(widths[0])]
    assert float(longest.get("x")) + max(widths[0]) + 70 < float(root.get("width"))  # 70: room for "2 <dB>"
    assert root.find(f"{SVG}g/{SVG}title").text == f"{name}: 1 <dB>, 2 <dB>"
