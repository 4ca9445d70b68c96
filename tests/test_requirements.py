"""What the Makefile installs: extras that exist, all of it pinned, and for the demo no more than it imports."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML; the files are the same on every Python")
DEMO = ROOT / "tutorials" / "word_language_model"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements):
    """Return the packages' names, as imports spell them."""
    return {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in requirements}


def test_every_requirement_is_pinned():
    pinned = names(line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned |= names(re.findall(r" (\S+==\S+)", (ROOT / "Makefile").read_text(encoding="utf8")))
    needed = names([*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)])
    assert needed | {"setuptools", "wheel"} <= pinned


def test_make_installs_extras_that_exist():
    installed = re.findall(r"\[([\w,]+)\]'", (ROOT / "Makefile").read_text(encoding="utf8"))
    assert {extra for group in installed for extra in group.split(",")} == set(EXTRAS)


def test_the_demo_installs_what_it_imports():
    trees = [ast.parse(path.read_text(encoding="utf8")) for path in DEMO.glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    imported = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"fxquant"}
    assert imported <= names([*PROJECT["dependencies"], *EXTRAS["demo"]])
    assert names(EXTRAS["demo"]) <= imported | {"numpy"}  # which torch needs for a tensor's .numpy()
