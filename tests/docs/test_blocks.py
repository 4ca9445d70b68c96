"""Every code block of the README and the documentation does what its page says."""

import importlib.util
import re

import pytest

from tests.docs.blocks import PAGES, ROOT, Block, blocks_of, matches, run

WITH_PYTHON = [page for page, path in PAGES.items() if any(block.language == "python" for block in blocks_of(path))]
NEEDS = {"docs/huggingface.md": ("transformers", "peft")}
"""What a page's code imports beside fxquant."""

LANGUAGES = {"python", "console", "text"}


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs_and_gives_what_it_shows(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package, reason=f"{page} shows it")
    monkeypatch.chdir(tmp_path)
    run(blocks_of(PAGES[page]), page)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_only_blocks_that_are_tested_or_directives(page):
    others = {block.language for block in blocks_of(PAGES[page])} - LANGUAGES
    assert all(re.fullmatch(r"\{[a-z-]+\}.*", language) for language in others), others


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_names_exists(page):
    text = PAGES[page].read_text(encoding="utf8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf8"), re.M))
    for target in re.findall(r"(?:`|^\$ )make ([a-z]+)", text, re.M):
        assert target in targets, f"{page}: the Makefile has no target {target}"
    for module in re.findall(r"(?:`|^\$ )python -m ([\w.]+)", text, re.M):
        assert importlib.util.find_spec(module) is not None, f"{page}: there is no module {module}"
    for script in re.findall(r"(?:`|^\$ )python ([\w/]+\.py)", text, re.M):
        assert (ROOT / script).is_file(), f"{page}: there is no {script}"


def fail_in(*blocks):
    with pytest.raises(AssertionError) as failed:
        run(list(blocks), "page.md")
    return str(failed.value)


def test_blocks_share_names_and_what_is_printed_is_compared():
    run([Block("python", "a = 1\n", 1), Block("python", "print('a is', a)\n", 4, "a is 7\n")], "page.md")
    assert "but it gives\na is 1" in fail_in(Block("python", "print('a is', 1)\n", 3, "b is 1\n"))


def test_an_error_that_the_page_does_not_show_fails_with_the_pages_line():
    told = fail_in(Block("python", "1 / 0\n", 12))
    assert told.startswith("page.md, line 12: warns or raises")
    assert "ZeroDivisionError: division by zero" in told
    run([Block("python", "1 / 0\n", 12, "ZeroDivisionError: division …\n")], "page.md")


def test_a_warning_that_the_page_does_not_show_fails():
    code = "import warnings\nwarnings.warn('watch out')\n"
    assert "UserWarning: watch out" in fail_in(Block("python", code, 1))
    run([Block("python", code, 1, "UserWarning: watch out\n")], "page.md")


@pytest.mark.parametrize(
    ("told", "shown", "expected"),
    [
        ("a  12.5 MB\n", "a 9 MB", True),
        ("----- ---", "--  ----", True),
        ("start, much, end", "start … end", True),
        ("start, much", "start … end", False),
        ("one (1)", "one [1]", False),
    ],
)
def test_words_must_agree_and_numbers_may_differ(told, shown, expected):
    assert matches(told, shown) is expected


def test_a_text_block_is_output_only_right_under_its_code(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\na\n```\n\n```text\nb\n```\n\n```{code-block} python\nc\n```\nprose\n```text\nd\n```\n")
    found = [(block.language, block.code, block.line, block.shown) for block in blocks_of(page)]
    assert found[0] == ("python", "a\n", 2, "b\n")
    assert found[2] == ("python", "c\n", 10, None)
