"""The kernels built by other compilers, for another processor, and under ThreadSanitizer: the same bits everywhere.

harness.c runs random cases without Python and prints a hash of all results for each instruction set; one number must
come out of all builds. What this machine's tools cannot build is skipped with that reason.
"""

import os
import shutil
import subprocess

import pytest

from tests.native.build import ROOT, build

C_FILES = (path for path in (ROOT / "csrc").rglob("*.c") if path.parent.name not in ("python", "calls"))
SOURCES = [ROOT / "tests/native/harness.c", *C_FILES]

pytestmark = pytest.mark.long


def build_harness(folder, compiler, *flags, **options):
    return build(folder / "harness", compiler, SOURCES, flags, **options)


def hashes(*command):
    """Return instruction set -> hash, for those that could run."""
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    return {name: value for name, value in lines.items() if " " not in value}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build_harness(tmp_path_factory.mktemp("gcc"), "gcc", "-O1")  # half the time of -O3, as the library has it


@pytest.fixture(scope="module")
def one_hash(program):
    (value,) = set(hashes(program).values())
    return value


def test_all_instruction_sets_agree(one_hash):
    assert len(one_hash) == 16


@pytest.mark.parametrize("flags", ["-O3", "-O0"])
def test_clang_gives_the_same_bits(tmp_path, one_hash, flags):
    assert set(hashes(build_harness(tmp_path, "clang", flags)).values()) == {one_hash}


def test_arm_gives_the_same_bits(tmp_path, one_hash):
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("qemu-aarch64 is not installed")
    found = hashes("qemu-aarch64", build_harness(tmp_path, "aarch64-linux-gnu-gcc", "-static"))
    assert found == {"neon_dot": one_hash, "portable": one_hash}


@pytest.mark.parametrize("threads", ["1", "5"])
def test_more_threads_give_the_same_bits(program, one_hash, threads):
    assert set(hashes(program, "300", threads).values()) == {one_hash}


def test_the_threads_have_no_data_races(tmp_path):
    def is_kernel(source):  # which share nothing: what calls them, and the portable ones, is watched
        return "x86" in source.parts

    program = build_harness(tmp_path, "gcc", "-fsanitize=thread", "-g1", "-O1", plain=is_kernel)
    assert len(set(hashes(program, "30", "3").values())) == 1
