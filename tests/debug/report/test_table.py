"""Sizes for people and names that fit."""

import io
import re
import sys
import types

import pytest

from fxquant.debug.report.table import (
    html_table,
    megabytes,
    paint,
    printable,
    shorten,
    site_name,
    text_table,
    wants_color,
    wrap,
)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("utf-8", "é 4 MB → 1 MB, 4.00×"), ("ascii", "? 4 MB > 1 MB, 4.00x"), ("latin-1", "é 4 MB > 1 MB, 4.00x")],
)
def test_what_standard_output_cannot_encode_is_told_in_its_signs(monkeypatch, encoding, text):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert printable("é 4 MB → 1 MB, 4.00×") == text


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


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("some words here", 10, ["some words", "here"]),
        ("float_qparams_weight_only_qconfig_4bit", 30, ["float_qparams_weight_only_", "qconfig_4bit"]),
        ("DynamicQuantizedMultiheadAttention", 30, ["DynamicQuantizedMultihead", "Attention"]),
        ("float: a/b.py:12", 8, ["float:", "a/b.", "py:12"]),
        ("x" * 25, 10, ["x" * 10, "x" * 10, "x" * 5]),
        ("", 5, [""]),
        ("one\ntwo three", 5, ["one", "two", "three"]),
    ],
)
def test_lines_are_broken_between_words_or_at_seams(text, width, lines):
    assert wrap(text, width).split("\n") == lines


def test_a_long_word_takes_the_room_that_is_free():
    word = "float_qparams_weight_only_qconfig_4bit"
    assert word in text_table([("a", word)], ("name", "choice"), (10, 20))
    wide = text_table([("a" * 30, "b" * 30, word)], ("name", "also", "choice"), (30, 30, 20))
    assert "float_qparams_weight_only_qconfig_" in wide
    assert word not in wide
    assert max(map(len, wide.splitlines())) <= 100


def test_a_name_too_long_loses_its_beginning_in_one_line():
    table = text_table([("a_" * 60 + "end", "x" * 40)], ("name", "also"), (10, 40), names=[0])
    assert len(table.splitlines()) == 3
    assert "a_end" in table
