"""`python -m fxquant`: every operator is tried, and one that gives other bits is found and named."""

from dataclasses import replace

import pytest
import torch

from fxquant.__main__ import main
from fxquant.ops import library
from fxquant.ops.register import KERNELS
from fxquant.selftest import Tried, try_operators


@pytest.fixture(scope="module")
def tried():
    return {one.name: one for one in try_operators()}


def test_every_operator_is_called_and_right(tried):
    assert tried.keys() == KERNELS.keys()
    assert all(one.calls and not one.wrong for one in tried.values())


@pytest.mark.skipif(not library.available(), reason="the native library is not there")
def test_each_native_kernel_is_called(tried):
    bare = {name for name, one in tried.items() if not one.native}
    assert bare <= {name for name, kernel in KERNELS.items() if not kernel.is_native} | {"adaptive_pool_value"}


def test_random_numbers_of_the_process_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    try_operators()
    assert torch.equal(torch.rand(3), expected)


def test_an_operator_that_is_wrong_is_named(monkeypatch, capsys):
    kernel = KERNELS["lookup"]
    wrong = replace(kernel, reference=lambda a: kernel.reference(a) + 1)
    monkeypatch.setattr(type(wrong), "run_native", lambda self, a: self.reference(a) if self is not wrong else a.q)
    monkeypatch.setitem(KERNELS, "lookup", wrong)
    assert main() == 1
    shown = capsys.readouterr().out
    assert "WRONG: 1 of 1 calls differ" in shown
    assert "wrong: lookup; please report this" in shown


def test_all_is_well_here(capsys):
    assert main() == 0
    shown = capsys.readouterr().out
    assert f"torch {torch.__version__}" in shown
    assert "all are right" in shown


def test_one_that_was_not_called_says_so():
    assert str(Tried("a", 0, 0, 0, 0)) == "not tried"
