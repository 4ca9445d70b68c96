"""Which kernels run: the environment's word, warnings for what is broken, and the dispatch of calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxquant import ops
from fxquant.ops import dispatch, native
from tests.native import cases
from tests.native.cases import int8, same_bits

ROOT = Path(__file__).parents[2]


def run_python(code, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code], env=env, capture_output=True, text=True, check=False, cwd=ROOT
    )


SHOW = "from fxquant.ops import kernel_info; info = kernel_info(); print(info.isa, '|', info)"


def test_an_instruction_set_can_be_forced(isa):
    result = run_python(SHOW, FXQUANT_ISA=isa)
    assert result.stdout.startswith(f"{isa} | fxquant runs on {isa} kernels"), result
    assert "Warning" not in result.stderr


def test_one_that_is_not_there_is_warned_about():
    result = run_python(SHOW, FXQUANT_ISA="z80")
    assert "RuntimeWarning: FXQUANT_ISA=z80: there is no such instruction set" in result.stderr
    assert result.stdout.startswith(native._library.active_isa())


def test_without_library_the_reference_runs_and_says_so():
    code = f"""{SHOW}
import torch
from fxquant import ops
print(ops.linear(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int8), torch.ones(1)))"""
    result = run_python(code, FXQUANT_NATIVE="0")
    assert result.stdout.startswith("None | fxquant runs on plain torch, no native kernels"), result
    assert "FXQUANT_NATIVE=0" in result.stdout
    assert "tensor([[2.]])" in result.stdout
    assert not result.stderr


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("raise ImportError('undefined symbol: nonsense')", "undefined symbol: nonsense"),
        ("interface = 0; __file__ = 'old.so'", "another version"),
    ],
)
def test_a_broken_library_is_warned_about_once(module, words):
    code = f"""
import importlib.abc, importlib.machinery, sys
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "fxquant._native" else None
    def exec_module(self, module):
        exec({module!r}, module.__dict__)
sys.meta_path.insert(0, Finder())
{SHOW}"""
    result = run_python(code)
    assert result.stderr.count("RuntimeWarning") == 1, result
    assert words in result.stderr
    assert result.stdout.startswith("None |")


@pytest.mark.parametrize(
    ("kind", "is_eager"),
    [("plain", True), ("gradient", False), ("subclass", False), ("fake", False), ("vmap", False), ("mode", False)],
)
def test_only_plain_calls_pass_the_dispatcher_by(kind, is_eager):
    x, weight = torch.randn(2, 4), int8(3, 4)
    if kind == "gradient":
        x.requires_grad_()
    if kind == "subclass":
        x = x.as_subclass(type("Marked", (torch.Tensor,), {}))
    if kind == "fake":
        with torch._subclasses.FakeTensorMode() as mode:
            x = mode.from_tensor(x)
            assert not dispatch.is_eager(x, weight)
        return
    if kind == "vmap":
        seen = []
        torch.func.vmap(lambda row: (seen.append(dispatch.is_eager(row, weight)), row)[1])(x)
        assert seen == [False]
        return
    if kind == "mode":
        with torch.overrides.TorchFunctionMode():
            assert not dispatch.is_eager(x, weight)
        return
    assert dispatch.is_eager(x, weight) == is_eager


def test_the_registered_operator_gives_the_same_bits(isa):
    x, args = torch.randn(5, 40), (int8(30, 40), torch.rand(30), torch.randn(30), True)
    with cases.kernels(isa, 1):
        assert same_bits(torch.ops.fxquant.linear(x, *args), ops.linear(x, *args))
        assert same_bits(torch.ops.fxquant.linear(x, *args), native.reference.linear(x, *args))
