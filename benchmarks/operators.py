"""Time the quantized operators over a grid of shapes, against float torch and torch.ao, as ratios.

    python benchmarks/operators.py [--threads 1] [--rounds 7] [--grid small|encoder|lstm|all|sizes] [--json out.json]

Every row's sides take turns in one process, `rounds` times, and each figure is a median: on a shared machine only such
ratios mean anything. A ratio above 1 says how many times faster fxquant is; the least and the greatest of the rounds
stand beside it. FXQUANT_ISA=avx2 and the like measure other kernels.

--grid sizes is fxquant against float alone, over rows and sizes; in fxquant/debug/speed.json it is what
`fxquant.explain` looks up. --json has the least of the rounds, what a call takes undisturbed.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import describe_machine
from fxquant.eager import quantize_dynamic
from fxquant.nn import DynamicQuantizedLinear, DynamicQuantizedLSTM, QuantizedEmbedding
from fxquant.ops import kernel_info

Call = Callable[[], Any]
SIDES = ("fxquant", "float", "torch_ao")
LINEARS = {
    "small": [(m, k, n) for m in (1, 16, 256) for k, n in ((16, 16), (64, 64), (256, 256), (1024, 1024), (4096, 4096))],
    "encoder": [(m, k, n) for m in (16, 64, 128, 512) for k, n in ((384, 384), (384, 1536), (1536, 384))],
}
LSTMS = [
    (t, b, i, h) for t, b in ((1, 1), (25, 1), (25, 16)) for i, h in ((16, 16), (64, 64), (256, 256), (1024, 1024))
]
SIZES = [(rows, size) for size in (16, 32, 64, 128, 256, 1024, 4096) for rows in (1, 16, 256)]
LARGEST = {"linear": 4096, "embedding": 4096, "embedding_bag": 4096}
"""The greatest size; elsewhere 1024, beyond which a call takes long and float has lost already."""
MACHINE = ("cpu", "cores_usable", "flags", "kernel", "torch", "fxquant", "date")


def sized(operator: str, rows: int, size: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return a float module of size inputs and outputs, and what it is called with: so many rows, one sequence."""
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


def sized_rows() -> Iterator[tuple[str, dict[str, Call]]]:
    """Yield "operator rowsxsize", and what float and fxquant call."""
    for operator in ("linear", "embedding", "embedding_bag", "lstm", "rnn", "cell", "attention"):
        for rows, size in SIZES:
            if size <= LARGEST.get(operator, 1024):
                module, inputs = sized(operator, rows, size)
                own = quantize_dynamic(module.eval())
                calls = {"fxquant": functools.partial(own, *inputs), "float": functools.partial(module, *inputs)}
                yield f"{operator} {rows}x{size}", calls


def torch_ao(module: nn.Module) -> nn.Module:
    """Return torch.ao's dynamic form of a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holder = torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {type(module)}, dtype=torch.qint8)
    return holder[0]


def rows(grid: str) -> Iterator[tuple[str, dict[str, Call]]]:
    """Yield each row's name and what its sides call."""
    for name in ("small", "encoder"):
        for m, k, n in LINEARS[name] if grid in (name, "all") else ():
            linear, x = nn.Linear(k, n), torch.randn(m, k)
            yield f"linear {m}x{k}x{n}", sides(linear, DynamicQuantizedLinear.from_float(linear), x)
    for t, b, i, h in LSTMS if grid in ("lstm", "all") else ():
        lstm, x = nn.LSTM(i, h), torch.randn(t, b, i)
        yield f"lstm {t}x{b} {i}->{h}", sides(lstm, DynamicQuantizedLSTM.from_float(lstm), x)
    for count in (1, 25, 4096) if grid == "all" else ():
        table, x = nn.Embedding(33278, 512), torch.randint(33278, (count,))
        quantized = QuantizedEmbedding.from_float(table)
        yield f"embedding {count}x512", {"fxquant": lambda q=quantized, x=x: q(x), "float": lambda t=table, x=x: t(x)}


def sides(module: nn.Module, quantized: nn.Module, x: torch.Tensor) -> dict[str, Call]:
    """Return the calls to compare."""
    peer = torch_ao(module)
    return {"fxquant": lambda: quantized(x), "float": lambda: module(x), "torch_ao": lambda: peer(x)}


def measure(calls: dict[str, Call], rounds: int, seconds: float = 0.02) -> dict[str, list[float]]:
    """Return each side's microseconds a call, one figure a round, the sides taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            single, begin = [], time.perf_counter()
            while not single or time.perf_counter() - begin < seconds:
                start = time.perf_counter()
                call()
                single.append(time.perf_counter() - start)
            times[name].append(statistics.median(single) * 1e6)
    return times


def report(name: str, times: dict[str, list[float]]) -> str:
    """Return a line: fxquant's time and the other sides' ratios to it, paired round by round."""
    own = times["fxquant"]
    line = f"{name:28s} {statistics.median(own):10.1f} us"
    for side in SIDES[1:]:
        if side in times:
            ratios = [theirs / ours for theirs, ours in zip(times[side], own, strict=True)]
            line += f"   {side} {statistics.median(ratios):6.2f} [{min(ratios):.2f}–{max(ratios):.2f}]"
    return line


def main() -> None:
    """Measure and print the rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--grid", choices=("small", "encoder", "lstm", "all", "sizes"), default="all")
    parser.add_argument("--json", help="also write each side's least round, in us, to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    print(kernel_info(), flush=True)
    results = {}
    with torch.no_grad():
        for name, calls in sized_rows() if args.grid == "sizes" else rows(args.grid):
            times = measure(calls, args.rounds)
            results[name] = {side: round(min(figures), 2) for side, figures in times.items()}
            print(report(name, times), flush=True)
    if args.json:
        write(args.json, args.threads, results)


def write(path: str, threads: int, results: dict[str, dict[str, float]]) -> None:
    """Write the command, the machine and each row's figures, a row a line."""
    described = describe_machine()
    machine = {**{name: described[name] for name in MACHINE}, "threads": threads}
    head = json.dumps({"command": " ".join(["python -m benchmarks.operators", *sys.argv[1:]]), "machine": machine})
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(sides)}" for name, sides in results.items())
    Path(path).write_text(f'{head[:-1]},\n"rows": {{\n{lines}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
