"""The documentation says what the code does."""

import importlib
import importlib.util
import pathlib
from xml.etree import ElementTree

import pytest

from docs import make_coverage, make_pictures

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", ["operators", "torch_ao_names"])
def test_a_page_is_made_from_its_tables(page):
    spec = importlib.util.spec_from_file_location(f"make_{page}", DOCS / f"make_{page}.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert (DOCS / f"{page}.md").read_text(encoding="utf8") == maker.page(), f"run docs/make_{page}.py"


def test_the_picture_of_a_diff_is_made_from_a_real_one():
    assert make_pictures.PICTURE.read_text(encoding="utf8") == make_pictures.picture(make_pictures.told()), (
        "run python -m docs.make_pictures"
    )


@pytest.mark.parametrize("path", sorted((DOCS / "pictures").glob("*.svg")), ids=lambda path: path.stem)
def test_a_picture_has_a_title_stands_on_a_page_and_is_small(path):
    root = ElementTree.fromstring(path.read_text(encoding="utf8"))
    assert root.find("{http://www.w3.org/2000/svg}title").text
    assert path.stat().st_size < 12_000
    assert any(f"pictures/{path.name})" in page.read_text(encoding="utf8") for page in DOCS.glob("*.md"))


def test_coverage_page_is_made_from_the_architectures():
    told = make_coverage.PAGE.read_text(encoding="utf8").splitlines()
    made = make_coverage.page().splitlines()
    assert len(told) == len(made), "run python -m docs.make_coverage"
    for line, expected in zip(told, made, strict=True):
        (line, near), (expected, measured) = (text.rstrip(" |").rpartition(" | ")[::2] for text in (line, expected))
        assert line == expected, "run python -m docs.make_coverage"
        # Another machine's random weights differ in their last bits: another draw of the noise, here of few outputs.
        assert near == measured or abs(int(near) - int(measured)) <= 6, "run python -m docs.make_coverage"


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_table_of_transformers_is_made_from_its_models(name):
    pytest.importorskip("transformers", reason="the table is of its models", minversion="5.0")
    maker = importlib.import_module("docs.make_transformers_coverage")
    _, _, table = make_coverage.PAGE.read_text(encoding="utf8").partition(make_coverage.TRANSFORMERS)
    made, line = maker.cells(name), next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    told = line.strip("| ").split(" | ")
    assert told[:5] == made[:5], "run python -m docs.make_transformers_coverage"
    assert abs(int(told[5]) - int(made[5])) <= 6, "run python -m docs.make_transformers_coverage"
