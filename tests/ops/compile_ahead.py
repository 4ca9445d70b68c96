"""Compile Triton's kernels for a GPU of capability 9.0, which need not be there: a program of test_triton_compiles.py.

It makes the calls of tests/ops/triton_calls.py with CPU tensors. A kernel is compiled where it would be launched, down
to the machine's code. Its output is JSON: by the name of each kernel, what its PTX has that would round otherwise.
"""

import json
import os
import re
import sys
import types

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fxquant.ops import KERNELS, gpu, triton_recurrent
from tests.ops import triton_calls

INEXACT = {"fma": r"\bfma\.rn(\.ftz)?\.f32", "flush": r"\.ftz\b", "approximation": r"\.approx\b|div\.full"}


def compile_calls():
    """Return, by the name of each kernel, what is inexact in it."""
    found: dict[str, set[str]] = {}
    triton.runtime.driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )
    )
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        text = kernel.asm["ptx"]
        assert kernel.asm["cubin"]
        found.setdefault(self.__name__, set()).update(name for name, what in INEXACT.items() if re.search(what, text))
        return kernel

    JITFunction.run = compile_only
    gpu._interprets = True
    triton_recurrent._multiprocessors = lambda _: 132
    for name, arguments in (*triton_calls.calls(), *triton_calls.recurrent_calls()):
        kernel = KERNELS[name]
        assert kernel.run_triton(kernel.arguments(*arguments)) is not None, name
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.stdout.write(json.dumps({name: sorted(what) for name, what in compile_calls().items()}))
