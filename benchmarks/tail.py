"""Measure tail latency: do calls of torch's operators, or of fxquant's, get slower when the two take turns?

    python -m benchmarks.tail [--threads 1,2] [--calls 2000] [--json out.json]

A model mixes both: a quantized linear, then torch's softmax or product. Both have threads, and if one pool were
spinning while the other works, the 99th percentile would show it. So the calls of each operator are timed one by one:
alone, in turns with the other, and, for comparison, torch's in turns with torch's own float linear.
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

Call = Callable[[], object]
ROWS, WIDTH = 64, 1024


def time_in_turn(calls: dict[str, Call], count: int) -> dict[str, list[float]]:
    """Return the microseconds of every call, with the operators in turn, after a tenth as many calls to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(count + count // 10):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(1e6 * (time.perf_counter() - begin))
    return {name: found[-count:] for name, found in times.items()}


def percentile(times: Sequence[float], percent: int) -> float:
    """Return the time that `percent` percent of the calls did not exceed."""
    ordered = sorted(times)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def operators() -> dict[str, Call]:
    """Return the calls: torch's product and softmax (MKL and OpenMP), a float and a quantized linear."""
    linear, x, scores = nn.Linear(WIDTH, WIDTH), torch.randn(ROWS, WIDTH), torch.randn(ROWS, 33278)
    quantized = DynamicQuantizedLinear.from_float(linear)
    return {"softmax": lambda: scores.softmax(1), "float linear": lambda: linear(x), "fxquant": lambda: quantized(x)}


def measure(count: int) -> list[dict[str, object]]:
    """Return a line for each operator and what it takes turns with: p50 and p99 in microseconds."""
    calls = operators()
    rows: list[dict[str, object]] = []
    for company in (["softmax"], ["fxquant"], ["softmax", "float linear"], ["softmax", "fxquant"]):
        for name, times in time_in_turn({name: calls[name] for name in company}, count).items():
            others = " + ".join(other for other in company if other != name) or "alone"
            rows.append({"operator": name, "with": others, "p50": percentile(times, 50), "p99": percentile(times, 99)})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=thread_counts, default="1,2", help="(%(default)s)")
    parser.add_argument("--calls", type=int, default=2000, help="of each operator (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the figures with the machine's description")
    options = parser.parse_args(arguments)
    rows = []
    with torch.no_grad():
        for threads in options.threads:
            with torch_threads(threads):
                rows += [{"threads": threads, **row} for row in measure(options.calls)]
    print(tabulate(rows, headers="keys", floatfmt=".1f"))
    if options.json:
        content = {"machine": describe_machine(), "unit": "us", "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
