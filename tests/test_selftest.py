"""`python -m fxquant`: every operator is tried, and one that gives other bits is found and named."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fxquant.__main__ import main
from fxquant.ops import library
from fxquant.ops.register import KERNELS
from fxquant.selftest import Tried, try_operators
from tests.ops.kernels_on_gpu import DEVICE, needs_triton, triton_kernels  # noqa: F401


@pytest.fixture(scope="module")
def tried():
    return {one.name: one for one in try_operators()}


def test_every_operator_is_called_and_right(tried):
    assert tried.keys() == KERNELS.keys()
    assert all(one.calls and not one.wrong for one in tried.values())


@pytest.mark.skipif(not library.available(), reason="the native library is not there")
def test_each_native_kernel_is_called(tried):
    assert {name for name, one in tried.items() if not one.native} <= {"adaptive_pool_value"}


def test_it_does_not_import_torch_s_compiler():
    script = "import sys, fxquant.selftest as s; s.try_operators(); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


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


@needs_triton
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_triton_kernels_are_tried(triton_kernels):  # noqa: F811
    tried = {one.name: one for one in try_operators(torch.device(DEVICE), on_gpu=True)}
    assert not any(one.wrong for one in tried.values())
    assert {name for name, one in tried.items() if one.native} == {
        name for name, kernel in KERNELS.items() if kernel.on_gpu is not None
    }


def test_a_gpu_has_a_column_of_its_own(monkeypatch, capsys):
    asked = []

    def try_it(device=None, on_gpu=False):
        asked.append((device, on_gpu))
        return [Tried("lookup", 1, 1, 0, int(on_gpu))]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("fxquant.__main__.try_operators", try_it)
    monkeypatch.setattr("fxquant.__main__.kernel_info", lambda: "kernels")
    assert main() == 1
    assert asked == [(None, False), (torch.device("cuda", 0), True)]
    shown = capsys.readouterr().out
    assert "on its GPU" in shown
    assert "wrong: lookup;" in shown
