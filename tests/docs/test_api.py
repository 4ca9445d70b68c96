"""The API reference has every public name, once, and says of each what it is."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES

_ENTRY = re.compile(r"^\.\. auto(function|class|data|module):: ([\w.]+)$", re.M)
ENTRIES = _ENTRY.findall(PAGES["docs/api.md"].read_text(encoding="utf8"))


def things_of(kind, name):
    """Return the objects that an entry documents, by name."""
    if kind == "module":
        module = importlib.import_module(name)
        return {key: value for key, value in vars(module).items() if getattr(value, "__module__", None) == name}
    room, _, key = name.rpartition(".")
    return {key: getattr(importlib.import_module(room), key)}


@pytest.mark.parametrize("package", ["fxquant", "fxquant.debug", "fxquant.tuning", "fxquant.nn"])
def test_every_public_name_is_in_the_reference_once(package):
    listed = [id(thing) for kind, name in ENTRIES for thing in things_of(kind, name).values()]
    room = importlib.import_module(package)
    counts = {name: listed.count(id(getattr(room, name))) for name in room.__all__ if name != "__version__"}
    assert {name: count for name, count in counts.items() if count != 1} == {}


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_what_is_listed_says_what_it_is(kind, name):
    if kind == "data":
        room, _, key = name.rpartition(".")
        statements = ast.parse(Path(inspect.getfile(importlib.import_module(room))).read_text(encoding="utf8")).body
        place = next(i for i, statement in enumerate(statements) if _assigns(statement, key))
        said = statements[place + 1]
        assert isinstance(said, ast.Expr)
        assert isinstance(ast.literal_eval(said.value), str)
    else:
        public = {key: thing for key, thing in things_of(kind, name).items() if key[0] != "_"}
        assert public
        assert all((thing.__doc__ or "").strip() for thing in public.values() if callable(thing))


def _assigns(statement, name):
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)
