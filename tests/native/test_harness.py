"""The kernels built by other compilers, for another processor, and under ThreadSanitizer: the same bits everywhere.

harness.c runs random cases without Python and prints a hash of all results for each instruction set; one number must
come out of all builds. What this machine's tools cannot build is skipped with that reason.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = {"module.c", "tensors.c", "call_linear.c", "call_recurrent.c", "call_embedding.c"}  # written for Python
SOURCES = [ROOT / "tests/native/harness.c", *(path for path in (ROOT / "csrc").glob("*.c") if path.name not in PYTHON)]
FLAGS = "-std=c11 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -pthread -D_GNU_SOURCE -Wall -Wextra"


def build(folder, compiler, *flags):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")

    def run(*arguments):
        command = [compiler, *FLAGS.split(), *flags, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source, made: run("-c", source, "-o", made), SOURCES, objects))
    run(*objects, "-o", folder / "harness", "-lm")
    return str(folder / "harness")


def hashes(*command):
    """Return instruction set -> hash, for those that could run."""
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    return {name: value for name, value in lines.items() if " " not in value}


@pytest.fixture(scope="module")
def one_hash(tmp_path_factory):
    (value,) = set(hashes(build(tmp_path_factory.mktemp("gcc"), "gcc")).values())
    return value


def test_all_instruction_sets_agree(one_hash):
    assert len(one_hash) == 16


@pytest.mark.parametrize("flags", ["-O3", "-O0"])
def test_clang_gives_the_same_bits(tmp_path, one_hash, flags):
    assert set(hashes(build(tmp_path, "clang", flags)).values()) == {one_hash}


def test_arm_gives_the_same_bits(tmp_path, one_hash):
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("qemu-aarch64 is not installed")
    found = hashes("qemu-aarch64", build(tmp_path, "aarch64-linux-gnu-gcc", "-static"))
    assert found == {"neon_dot": one_hash, "portable": one_hash}


def test_more_threads_give_the_same_bits(tmp_path, one_hash):
    program = build(tmp_path, "gcc", "-O2")
    for threads in ("1", "5"):
        assert set(hashes(program, "300", threads).values()) == {one_hash}


def test_the_threads_have_no_data_races(tmp_path):
    program = build(tmp_path, "gcc", "-fsanitize=thread", "-g1", "-O1")
    assert len(set(hashes(program, "30", "3").values())) == 1
