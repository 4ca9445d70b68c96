"""Build the kernels for a test with flags of its own, outside of setup.py.

An instruction set that this machine lacks is only linked, so it is compiled without optimization and without the
sanitizers: its intrinsics take a compiler ten times as long with them, for code that nobody runs.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.native import cases

ROOT = Path(__file__).parents[2]
FLAGS = (
    *("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-pthread", "-D_GNU_SOURCE", "-Wall", "-Wextra", f"-I{ROOT / 'csrc'}"),
)


def build(
    target: Path,
    compiler: str,
    sources: Sequence[Path],
    flags: Sequence[str] = (),
    linking: Sequence[str] = (),
    plain: Callable[[Path], bool] = lambda source: bool(cases.ISAS.get(source.stem)),
) -> Path:
    """Return `target`, a program or library linked from `sources`; skip the test where there is no such compiler.

    flags: after FLAGS, for the files that are not plain and for the linker. linking: for the linker alone. plain: which
    files are compiled without optimization and without the flags; those that do not run here.
    """
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")

    def run(*arguments: str | Path) -> None:
        result = subprocess.run([compiler, *FLAGS, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    def compile_one(source: Path) -> Path:
        made = target.with_name(f"{source.parent.name}_{source.stem}.o")  # values.c is in two folders
        run(*(["-fPIC", "-O0"] if plain(source) else ["-fPIC", *flags]), "-c", source, "-o", made)
        return made

    # The slowest first: the processors then finish together.
    by_size = sorted(sources, key=lambda source: source.stem not in ("avx512_vnni", "amx"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, by_size))
    run(*flags, *objects, *linking, "-o", target, "-lm", "-ldl")
    return target
