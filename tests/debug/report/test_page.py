"""Colours that can be read, and files that hold all they need."""

import re
import xml.etree.ElementTree as ET

import pytest

from fxquant.debug.report.page import DARK, DECISIONS, LIGHT, drawing, page, table_page, themed, write
from fxquant.errors import ArgumentError


def luminance(color):
    """Return the relative luminance of WCAG 2.1."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_texts_have_the_contrast_that_wcag_asks_for(theme):
    grounds = [(name, f"{name}_fill") for name in DECISIONS]
    grounds += [(ink, ground) for ink in ("ink", "dim", "focus") for ground in ("paper", "same_fill")]
    assert {pair: contrast(theme[pair[0]], theme[pair[1]]) for pair in grounds if
            contrast(theme[pair[0]], theme[pair[1]]) < 4.5} == {}  # fmt: skip


def test_both_themes_have_the_same_names():
    assert LIGHT.keys() == DARK.keys()
    assert {*DECISIONS, *(f"{name}_fill" for name in DECISIONS)} < LIGHT.keys()


def test_every_decision_but_none_has_a_sign_of_its_own():
    signs = [sign for name, sign in DECISIONS.items() if name != "same"]
    assert "" not in signs
    assert len({*signs}) == len(signs)


def test_css_has_the_light_colours_and_the_dark_ones_where_asked_for():
    assert themed("a{color:$ink}") == (
        f"a{{color:{LIGHT['ink']}}}@media (prefers-color-scheme:dark){{a{{color:{DARK['ink']}}}}}"
    )


def test_pages_and_drawings_load_nothing_and_escape_their_titles():
    made = (
        page("<b>", ""),
        table_page("<b>", [("<b>", True)], [[("<b>", "<b>")]], ["<b>"]),
        drawing("<b>", 1, 2, "", ""),
    )
    for text in made:
        assert "<b>" not in text
        links = re.findall(r"(?:src|href|url|@import|fetch)\W+[^\s>]*", text)
        assert links == []
    assert ET.fromstring(made[2]).find("{http://www.w3.org/2000/svg}title").text == "<b>"


@pytest.mark.parametrize("path", ["missing/page.html", ".", 3])
def test_what_cannot_be_written_is_an_error(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=rf"^{path!r} cannot be written: .*; give a file in a folder that exists"):
        write(path, "é")


def test_write_returns_what_it_writes(tmp_path):
    assert write(tmp_path / "page", "é") == "é"
    assert (tmp_path / "page").read_text(encoding="utf-8") == "é"
    assert write(None, "é") == "é"


@pytest.mark.parametrize(
    ("text", "name", "ending"), [("<svg/>", "plot.png", ".svg"), (page("t", "b"), "d.svg", ".html")]
)
def test_a_file_is_not_named_for_what_it_is_not(tmp_path, text, name, ending):
    with pytest.raises(ArgumentError, match=rf"is written as {ending[1:]}; give it the ending {re.escape(ending)}$"):
        write(tmp_path / name, text)
    assert not list(tmp_path.iterdir())
