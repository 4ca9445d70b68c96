"""The machine's limits: integer products out of registers alone, and memory read and written by plain loops in C.

limits.c is compiled when it is first needed, by $CC or cc: nothing that only measures belongs into the package.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fxquant.ops import library

HERE = Path(__file__).resolve().parent
LEVELS = {"L1": 16 << 10, "L2": 512 << 10, "L3": 8 << 20, "DRAM": 256 << 20}
"""Bytes that a level is measured with, small enough for most machines' caches: of L1 and L2 a thread, else all."""

SHARED = ("L3", "DRAM")
PEAKS = {
    "amx": ("amx",),
    "avx512_vnni": ("avx512_vnni",),
    "avx_vnni": ("avx_vnni",),
    "avx2": ("maddubs", "madd", "maddubs_int16"),
    "neon_dot": ("neon_dot",),
}
"""Of each instruction set the loops of limits.c; the first one's rate is called its peak."""

_RUN_SECONDS = 0.5e-3
Work = Callable[[int], int]
"""Does something so many times, and returns how many units (multiplications, bytes) that were."""


@functools.cache
def compiled() -> ctypes.CDLL:
    """Return limits.c as a library. Raises SystemExit where there is no C compiler or it fails."""
    compiler = os.environ.get("CC", "cc")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "limits.so"
        options = ["-std=c11", "-O3", "-fPIC", "-shared", f"-I{HERE.parent / 'csrc'}", "-D_GNU_SOURCE"]
        command = [*shlex.split(compiler), *options, "-o", str(target), str(HERE / "limits.c")]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", "") or error
            raise SystemExit(
                f"the machine's limits are measured with a C compiler, and {compiler!r} failed; "
                f"install one, or name another in the environment variable CC: {why}"
            ) from error
        return ctypes.CDLL(str(target))


def _function(name: str, arguments: int) -> Callable[..., int]:
    """Return a function of the library that takes and returns 64 bits; it runs without the GIL."""
    found = getattr(compiled(), name)
    found.argtypes, found.restype = [ctypes.c_int64] * arguments, ctypes.c_int64
    return found  # type: ignore[no-any-return]


def usable_isas() -> list[str]:
    """Return the instruction sets of fxquant's kernels that can run here, best first; none without the library."""
    isas = library.function("isas")
    return [name for name, obstacle in isas() if not obstacle] if isas is not None else []


def rate(works: list[Work], seconds: float) -> float:
    """Return 1e9 units a second, summed over a thread for each work: the median of its runs, while the others run."""
    for work in works:
        work(1)  # memory is there, code is loaded
    rates = [0.0] * len(works)
    start = threading.Barrier(len(works))

    def run(index: int) -> None:
        times, count = 1, _once(works[index])
        times = max(1, round(_RUN_SECONDS / count))
        start.wait()
        found, end = [], time.perf_counter() + seconds
        while not found or time.perf_counter() < end:
            begin = time.perf_counter()
            done = works[index](times)
            found.append(done / 1e9 / (time.perf_counter() - begin))
        rates[index] = statistics.median(found)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(1, len(works))]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join()
    return sum(rates)


def _once(work: Work) -> float:
    begin = time.perf_counter()
    work(1)
    return time.perf_counter() - begin


def peak(name: str, threads: int, seconds: float) -> float:
    """Return the GMAC/s of a loop of limits.c, by its name in PEAKS."""
    loop = _function(f"fxq_peak_{name}", 1)
    return rate([lambda times: loop(4096 * times)] * threads, seconds)


def level_bytes(level: str, threads: int) -> int:
    """Return the bytes that each of the threads reads."""
    return LEVELS[level] // (threads if level in SHARED else 1) // 4096 * 4096


def reading(level: str, threads: int, seconds: float) -> float:
    """Return the GB/s that threads read from a cache, or from memory, with the machine's widest registers."""
    isas = usable_isas()
    width = "zmm" if {"amx", "avx512_vnni"} & set(isas) else "ymm" if "avx2" in isas else "words"
    return _moving(_function(f"fxq_read_{width}", 3), level, threads, seconds)


def writing(level: str, threads: int, seconds: float) -> float:
    """Return the GB/s that threads write by memset, which goes past the caches where there is much to write."""
    return _moving(_function("fxq_write", 3), level, threads, seconds)


def _moving(call: Callable[[int, int, int], int], level: str, threads: int, seconds: float) -> float:
    size = level_bytes(level, threads)
    buffers = [torch.empty(size + (2 << 20), dtype=torch.uint8) for _ in range(threads)]
    page = (2 << 20) if size >= 2 << 20 else 4096
    places = [-(-buffer.data_ptr() // page) * page for buffer in buffers]
    for place in places:
        _function("fxq_use_large_pages", 2)(place, size)
        ctypes.memset(place, 1, size)
    works = [functools.partial(lambda place, times: call(place, size, times), place) for place in places]
    return rate(works, seconds)


def rates(seconds: float = 0.05) -> dict[str, float]:
    """Return the GB/s read and written at each level, with as many threads as torch has."""
    threads = torch.get_num_threads()
    found = {}
    for level in LEVELS:
        found[f"read {level}, GB/s"] = reading(level, threads, seconds)
        found[f"write {level}, GB/s"] = writing(level, threads, seconds)
    return found
