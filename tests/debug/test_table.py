"""Sizes for people and names that fit."""

import re
import sys
import types

import pytest

from fxquant.debug.table import html_table, megabytes, paint, shorten, site_name, text_table, wants_color


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


@pytest.mark.parametrize(
    ("path", "call", "name"),
    [("rnn", "", "rnn"), ("weight", "linear_1", "weight (linear_1)"), ("", "", "(the model)")],
)
def test_site_name(path, call, name):
    assert site_name(types.SimpleNamespace(path=path, call=call)) == name


def test_html_is_escaped():
    html = html_table([("<script>",)], ("<b>",), "<i>")
    assert "<script>" not in html
    assert "<b>" not in html
    assert "&lt;i&gt;" in html


def test_paint_colours_each_line():
    assert paint("a\nb", "31") == "\x1b[31ma\x1b[0m\n\x1b[31mb\x1b[0m"
    assert paint("a", "") == "a"
    assert paint("", "31") == ""


def test_colours_do_not_move_a_table():
    plain = [("~", "a name", "words that have to be wrapped\nand a second line"), (" ", "b", "c")]
    painted = [tuple(paint(cell, "32") for cell in plain[0]), plain[1]]
    tables = [text_table(rows, ("", "name", "text"), (1, 10, 12)) for rows in (plain, painted)]
    assert tables[1] != tables[0]
    assert re.sub(r"\x1b\[\d+m", "", tables[1]) == tables[0]


@pytest.mark.parametrize(
    ("is_terminal", "environment", "expected"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_colour_is_for_terminals_whose_user_did_not_say_no(monkeypatch, is_terminal, environment, expected):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    assert wants_color() is expected


def test_without_a_standard_output_there_is_no_colour(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert wants_color() is False
