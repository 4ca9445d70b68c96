"""The code of what is not traced."""

import importlib.util
import linecache
import sys

import pytest
from torch import nn

from fxquant.graph.fingerprint.architecture import describe, differences

SOURCE = '''
import torch
from torch import nn

SCALE = 2.0


def scaled(x):
    """A doc."""
    return x * SCALE


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        # a comment
        return self.tail(scaled(self.linear(x)))

    def tail(self, x):
        return x.mean(1)
'''


@pytest.fixture
def make(tmp_path):
    """Return what makes a Head of some source, of a package's version."""

    def made(source, version=None):
        path = tmp_path / "a_package.py"
        path.write_text(source)
        linecache.clearcache()
        spec = importlib.util.spec_from_file_location("a_package", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["a_package"] = module
        spec.loader.exec_module(module)
        if version is not None:
            module.__version__ = version
        return describe(module.Head())

    yield made
    sys.modules.pop("a_package", None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a comment", "# another"),
        ('"""A doc."""', "'''Another.'''"),
        ("x * SCALE", "(\n        x\n        *   SCALE\n    )"),
        ("def tail(self, x):", "def tail(self, x: torch.Tensor) -> torch.Tensor:"),
        ("def tail(", "def unused(self):\n        return 1\n\n    def tail("),
    ],
)
def test_form_and_comments_do_not_count(make, old, new):
    assert SOURCE.replace(old, new) != SOURCE
    assert differences(make(SOURCE), make(SOURCE.replace(old, new))) == ([], [])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scaled(self.linear(x))", "self.linear(x)"),
        ("x * SCALE", "x / SCALE"),
        ("SCALE = 2.0", "SCALE = 3.0"),
        ("x.mean(1)", "x.sum(1)"),
    ],
    ids=["forward", "function", "constant", "method"],
)
def test_code_counts_where_nothing_is_traced(make, old, new):
    (told,), _ = differences(make(SOURCE), make(SOURCE.replace(old, new)))
    assert told == "the model: its forward, or what that calls, has other code than the file's model"


def test_another_release_of_a_package_is_only_told(make):
    certain, (told,) = differences(make(SOURCE, "1.0"), make(SOURCE.replace("mean(1)", "mean(dim=1)"), "1.1"))
    assert not certain
    assert told == "the model: the code of a_package 1.1 differs from that of 1.0"


def test_code_without_source_is_not_compared():
    namespace = {"nn": nn, "__name__": "nowhere"}
    exec(compile(SOURCE, "nowhere.py", "exec"), namespace)
    assert describe(namespace["Head"]()).modules[""].code == ""
    assert describe(namespace["Head"]()).modules[""].type == "Head"
