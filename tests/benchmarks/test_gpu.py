"""The benchmark for GPUs: what it times, without one."""

import math

import pytest
import torch

from benchmarks import gpu
from fxquant.nn.base import QuantizedModule


@pytest.fixture(scope="module")
def cases():
    return list(gpu.cases(shrink=32))


def test_each_case_runs_and_its_twin_is_quantized(cases):
    assert {case.name for case in cases} == {"linear", "int4", "bert", "model", "lstm", "gru"}
    with torch.no_grad():
        for case in cases:
            if case.what.startswith(("4096", "256")) or case.name in ("bert", "model"):
                continue  # the same modules with more rows, and slow ones
            assert any(isinstance(module, QuantizedModule) for module in case.quantized.modules()), case.name
            got, expected = (
                torch.utils._pytree.tree_leaves(model(*case.inputs)) for model in (case.quantized, case.model)
            )
            assert [x.shape for x in got] == [x.shape for x in expected]


def test_only_some(cases):
    assert {case.name for case in gpu.cases(["gru"], shrink=64)} == {"gru"}
    assert len(cases) == 8 + 3 + 1 + 2 + 6 + 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_ratios_are_of_the_other_side():
    row = gpu.Row("linear", "1 x 4 to 4", "torch", 1.0, 2.0, 0.5, 0.25)
    assert row.cells[4:] == (2.0, 0.5, 0.5)
    line = gpu.table([row, gpu.Row("lstm", "", "torch", 1.0, 2.0, math.nan, math.nan)]).splitlines()[2]
    assert line.split("|")[3].strip() == "1"
