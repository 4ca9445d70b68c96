"""The equations of docs/numerics.md have names, and whatever cites one uses a name that is there."""

import re

from tests.docs.blocks import PAGES, ROOT

PAGE = PAGES["docs/numerics.md"].read_text(encoding="utf8")
NAMES = re.findall(r"\\tag\{([^}]*)\}", PAGE)
SECTIONS = re.findall(r"^#{2,} (.+)$", PAGE, re.M)
SOURCES = {
    path: path.read_text(encoding="utf8")
    for room in ("fxquant", "csrc")
    for path in (ROOT / room).rglob("*")
    if path.suffix in {".py", ".c", ".h", ".cpp"}
}
_CITED = re.compile(r'numerics\.md((?:,? (?:and )?"[^"]+")+)')


def cited(text):
    """Return the names that a text cites behind `docs/numerics.md`, wherever its lines are broken."""
    text = re.sub(r"\n[ \t]*(?:\*|//|#)?[ \t]*", " ", text)
    return [name for names in _CITED.findall(text) for name in re.findall('"([^"]+)"', names)]


def test_every_equation_has_a_name_of_its_own_and_no_number():
    assert PAGE.count("\n$$ ") == len(NAMES) > 20
    assert len(set(NAMES)) == len(NAMES)
    assert not [name for name in NAMES if re.search(r"^\d|\d$", name)]


def test_the_page_itself_names_equations_that_it_has():
    emphasized = re.findall(r"(?<!\*)\*([^*\n]+(?:\n[^*\n]+)?)\*(?!\*)", re.sub(r"\$[^$]*\$", "", PAGE))
    words = {name.replace("\n", " ") for name in emphasized} - {"GPTQ", "QuantEase"}
    assert {word for word in words if "Quantization and Training" not in word} <= set(NAMES)


def test_what_the_code_cites_is_on_the_page():
    found = {(name, path.name) for path, text in SOURCES.items() for name in cited(text)}
    assert {name for name, _ in found} >= {"int8 output", "LSTM"}
    assert [place for place in found if place[0] not in {*NAMES, *SECTIONS}] == []


def test_the_code_cites_no_equation_by_number():
    assert [str(path) for path, text in SOURCES.items() if re.search(r"\beqs?\.\s+\d", text)] == []


def test_a_broken_line_hides_no_name():
    assert cited('see docs/numerics.md, "a b"\n * and "c".') == ["a b", "c"]
    assert cited('docs/numerics.md,\n    "a\n    b".') == ["a b"]
