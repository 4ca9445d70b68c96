"""Measure the machine's limits: the speed of reading and writing memory, and of multiplying integers.

    python -m benchmarks.roofline [--threads 1,2] [--json out.json]

A read figure is the best call of torch's own readers (dot, sum, int8 amax) over a buffer of that size; a write figure
is that of zeroing one. These are rates that ordinary code reaches, not the limits of the hardware, especially within
L2. The sizes stand for L2, L3 and memory on machines like that of docs/performance.md. A shared L3 leaves only what the
other guests do not use. The product is fxquant's largest linear, from float to float, including quantization.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.machine import describe_machine
from fxquant.nn import DynamicQuantizedLinear
from tutorials.word_language_model import torch_threads
from tutorials.word_language_model.options import thread_counts

LEVELS = {"L2": 1 << 20, "L3": 16 << 20, "DRAM": 1 << 30}
PRODUCT = (512, 4096, 4096)


def rates(seconds: float = 0.1) -> dict[str, float]:
    """Return GB/s read and written at each level, and the largest product's GMAC/s, with torch's current threads."""
    found = {}
    for level, n_bytes in LEVELS.items():
        buffer = torch.zeros(n_bytes // 4)
        found[f"read {level}, GB/s"] = n_bytes / 1e9 / min(best_seconds(c, seconds) for c in readers(buffer))
        found[f"write {level}, GB/s"] = n_bytes / 1e9 / best_seconds(buffer.zero_, seconds)
    rows, inputs, outputs = PRODUCT
    linear, x = DynamicQuantizedLinear.from_float(nn.Linear(inputs, outputs)), torch.randn(rows, inputs)
    return {**found, "int8 product, GMAC/s": rows * inputs * outputs / 1e9 / best_seconds(lambda: linear(x), seconds)}


def readers(buffer: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """Return calls that read every byte of the buffer once."""
    integers = buffer.view(torch.int8)
    return [lambda: torch.dot(buffer, buffer), buffer.sum, integers.amax]


def best_seconds(call: Callable[[], object], seconds: float) -> float:
    """Return the shortest time of a call, of at least three: other work on the machine can only add to it."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=thread_counts, default="1,2", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the figures with the machine's description")
    options = parser.parse_args(arguments)
    found = {}
    with torch.no_grad():
        for threads in options.threads:
            with torch_threads(threads):
                found[threads] = rates(options.seconds)
    names = list(next(iter(found.values())))
    headers = ["", *(f"{threads} thread(s)" for threads in found)]
    print(tabulate([[name, *(column[name] for column in found.values())] for name in names], headers, floatfmt=".1f"))
    if options.json:
        content = {"machine": describe_machine(), "rates": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
