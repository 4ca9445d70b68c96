"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: no byte past a tensor's end is read or written."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest

from tests.native.build import ROOT, build

# Null pointers and the ends of objects are AddressSanitizer's too; asking twice doubles what a compiler needs.
FLAGS = (
    *("-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=undefined"),
    # Not optimized: compiling is most of the time, and nothing that would be wrong is optimized away.
    *("-fno-omit-frame-pointer", "-g1", "-O0", "-fwrapv", "-fvisibility=hidden"),
    *("--param", "asan-instrumentation-with-call-threshold=0"),  # calls compile in half the time of inline checks
)
RUN = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("fxquant._native", sys.argv[1])
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("fxquant._native", loader))
loader.exec_module(module)
sys.modules["fxquant._native"] = module
from tests.native import cases
assert cases.LIBRARY is module
sys.argv = ["cases", "all", sys.argv[2], "--count", sys.argv[3]]
cases.main()
"""


def preload(compiler):
    """Return the address sanitizer's library, or None where the compiler has none."""
    result = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    path = result.stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the preloading is Linux's")
def test_random_cases_touch_no_memory_but_their_own(tmp_path):
    compiler = shutil.which("gcc")
    library = preload(compiler) if compiler else None
    if library is None:
        pytest.skip("no gcc with AddressSanitizer here")
    sources, include = sorted((ROOT / "csrc").rglob("*.c")), f"-I{sysconfig.get_path('include')}"
    made = build(tmp_path / "_native.so", compiler, sources, (*FLAGS, include), ("-shared",))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    count = os.environ.get("FXQUANT_SANITIZED_CASES", "30")
    command = [sys.executable, "-c", RUN, made, "5000", count]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert " 0 failures" in result.stdout
