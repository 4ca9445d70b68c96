"""Sizes for people and names that fit."""

import pytest

from fxquant.debug.table import html_table, megabytes, shorten


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (48_123, "48.1 kB"),
        (100_000, "0.10 MB"),
        (113_943_234, "113.94 MB"),
    ],
)
def test_megabytes(count, text):
    assert megabytes(count) == text


def test_a_long_name_loses_its_beginning():
    assert shorten("encoder.layers.0.linear", 10) == "….0.linear"
    assert len(shorten("x" * 50, 10)) == 10
    assert shorten("short", 10) == "short"


def test_html_is_escaped():
    html = html_table([("<script>",)], ("<b>",), "<i>")
    assert "<script>" not in html
    assert "<b>" not in html
    assert "&lt;i&gt;" in html
