"""Measure the times that `fxquant.explain` looks up: float and fxquant, by operator, weights, rows and size.

    python -m benchmarks.speed_table [--threads 1] [--rounds 5] [--json fxquant/debug/speed.json]

Each figure is that of the fastest round, which is the time of an undisturbed call. See fxquant/debug/regressions.py.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks.machine import describe_machine
from benchmarks.operators import Call, measure, report
from fxquant import OPERATORS, quantize_dynamic
from fxquant.qconfig import BEST

SHAPES = [(rows, size) for size in (16, 32, 64, 128, 256, 1024, 4096) for rows in (1, 16, 256)]
LARGEST = {"linear": 4096, "embedding": 4096, "embedding_bag": 4096}
"""The greatest size; elsewhere 1024, beyond which a call takes long and float has lost already."""
MACHINE = ("cpu", "cores_usable", "flags", "kernel", "torch", "fxquant", "date")


def case(operator: str, rows: int, size: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return a float module with `size` inputs and outputs, and its input: one sequence of so many rows."""
    x, indices = torch.randn(rows, size), torch.randint(4096, (rows, 8))
    return {
        "linear": lambda: (nn.Linear(size, size), (x,)),
        "embedding": lambda: (nn.Embedding(4096, size), (indices[:, 0].contiguous(),)),
        "embedding_bag": lambda: (nn.EmbeddingBag(4096, size), (indices,)),
        "lstm": lambda: (nn.LSTM(size, size), (x[:, None],)),
        "rnn": lambda: (nn.GRU(size, size), (x[:, None],)),
        "cell": lambda: (nn.LSTMCell(size, size), (x,)),
        "attention": lambda: (nn.MultiheadAttention(size, 4), (x[:, None],) * 3),
    }[operator]()


def cases() -> Iterator[tuple[str, dict[str, Call]]]:
    """Yield "operator dtype rowsxsize", and what float and fxquant call."""
    for operator in ("linear", "embedding", "embedding_bag", "lstm", "rnn", "cell", "attention"):
        schemes = next(row.schemes for row in OPERATORS if row.name == operator)
        dtypes = [dtype for dtype, qconfig in BEST.items() if any(scheme.accepts(qconfig) for scheme in schemes)]
        for dtype, (rows, size) in itertools.product(dtypes, SHAPES):
            if size <= LARGEST.get(operator, 1024):
                module, inputs = case(operator, rows, size)
                own = quantize_dynamic(module.eval(), {type(module): BEST[dtype]})
                calls = {"fxquant": functools.partial(own, *inputs), "float": functools.partial(module, *inputs)}
                yield f"{operator} {dtype} {rows}x{size}", calls


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="the file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    results = {}
    with torch.no_grad():
        for name, calls in cases():
            times = measure(calls, args.rounds)
            results[name] = {side: round(min(figures), 2) for side, figures in times.items()}
            print(report(name, times), flush=True)
    if args.json:
        write(args.json, args.threads, results)


def write(path: Path, threads: int, results: dict[str, dict[str, float]]) -> None:
    """Write the command, the machine and the figures of each number of rows, one per line."""
    described = describe_machine()
    machine = {**{name: described[name] for name in MACHINE}, "threads": threads}
    head = json.dumps({"command": " ".join(["python -m benchmarks.speed_table", *sys.argv[1:]]), "machine": machine})
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(sides)}" for name, sides in results.items())
    path.write_text(f'{head[:-1]},\n"rows": {{\n{lines}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
