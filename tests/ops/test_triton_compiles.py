"""Triton's kernels compile for a GPU that need not be there, to arithmetic that rounds as the references do."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

import fxquant
from tests.ops.kernels_on_gpu import needs_triton

OPS = pathlib.Path(fxquant.__file__).parent / "ops"
ROOT = OPS.parents[1]


def kernel_names():
    """Return the names of all functions that Triton compiles and that are launched: those whose names end so."""
    return {
        node.name
        for path in OPS.glob("triton_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


@pytest.mark.long
@needs_triton
def test_each_kernel_compiles_for_capability_90_to_exact_arithmetic(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.ops.compile_ahead"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found.keys() == kernel_names(), "tests/ops/triton_calls.py must call each kernel"
    assert not {name: what for name, what in found.items() if what}
