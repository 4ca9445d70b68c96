"""Measure the times that `fxquant.explain` looks up: float and fxquant, by operator, weights, rows and size.

    FXQUANT_ISA=avx2 python -m benchmarks.speed_table [--operators linear,cell] [--json fxquant/debug/speed.json]

Each figure is that of the fastest round, which is the time of an undisturbed call. The file has a table for each
instruction set: the one in use is written, figures of operators that are not measured stay. A table is of one machine
and one day: where they differ from those in the file, the old table goes. See fxquant/debug/regressions.py.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import describe_machine
from benchmarks.operators import MAKERS, Call, measure, report, sides
from fxquant import OPERATORS, kernel_info, quantize_dynamic
from fxquant.debug.regressions import ISAS
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
        "rnn_cell": lambda: (nn.RNNCell(size, size), (x,)),
        "attention": lambda: (nn.MultiheadAttention(size, 4), (x[:, None],) * 3),
    }[operator]()


OPERATOR = {"rnn_cell": "cell", "matmul": "linear"}  # of the table; elsewhere of the same name
MEASURED = ("linear", "matmul", "embedding", "embedding_bag", "lstm", "rnn", "cell", "rnn_cell", "attention")


def cases(names: Sequence[str] = MEASURED) -> Iterator[tuple[str, dict[str, Call]]]:
    """Yield "operator dtype rowsxsize", and what float and fxquant call."""
    for name in names:
        schemes = next(row.schemes for row in OPERATORS if row.name == OPERATOR.get(name, name))
        dtypes = [dtype for dtype, qconfig in BEST.items() if any(scheme.accepts(qconfig) for scheme in schemes)]
        for dtype, (rows, size) in itertools.product(dtypes, SHAPES):
            if size <= LARGEST.get(name, 1024):
                yield f"{name} {dtype} {rows}x{size}", _calls(name, dtype, rows, size)


def _calls(name: str, dtype: str, rows: int, size: int) -> dict[str, Call]:
    if name == "matmul":  # a call in a graph
        calls = sides(*MAKERS[name](rows, size), BEST[dtype])
        return {side: calls[side] for side in ("fxquant", "float")}
    module, inputs = case(name, rows, size)
    own = quantize_dynamic(module.eval(), {type(module): BEST[dtype]})
    return {"fxquant": functools.partial(own, *inputs), "float": functools.partial(module, *inputs)}


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", type=lambda text: text.split(","), default=MEASURED, help=",".join(MEASURED))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.02, help="a side's turn (%(default)s)")
    parser.add_argument("--json", type=Path, help="the file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    results = {}
    with torch.no_grad():
        for name, calls in cases(args.operators):
            times = measure(calls, args.rounds, args.seconds)
            results[name] = {side: round(min(figures), 2) for side, figures in times.items()}
            print(report(name, times), flush=True)
    if args.json:
        described, isa = describe_machine(), kernel_info().isa or ""
        machine = {name: described[name] for name in MACHINE}
        machine |= {"kernel": f"fxquant runs on {isa} kernels, 1 thread", "threads": 1}
        before = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
        args.json.write_text(render(add(before, isa, machine, results)), encoding="utf-8")


def add(
    tables: dict[str, Any], isa: str, machine: dict[str, object], results: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Return the tables with an instruction set's new figures, which join older ones of the same machine and day."""
    old = tables.get(isa, {"machine": {}, "rows": {}})
    is_same = _place(old["machine"]) == _place(machine)
    rows = {**(old["rows"] if is_same else {}), **results}
    command = f"FXQUANT_ISA={isa} python -m benchmarks.speed_table, the least of the rounds"
    added = {**tables, isa: {"command": command, "machine": machine, "rows": rows}}
    return {name: added[name] for name in ISAS if name in added}


def _place(machine: dict[str, Any]) -> tuple[object, ...]:
    return machine.get("cpu"), machine.get("torch"), str(machine.get("date"))[:10]


def render(tables: dict[str, Any]) -> str:
    """Return the file: each table's command and machine, then its figures, a line each."""
    parts = []
    for isa, table in tables.items():
        head = json.dumps({"command": table["command"], "machine": table["machine"]})
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(sides)}" for name, sides in table["rows"].items())
        parts.append(f'{json.dumps(isa)}: {head[:-1]},\n"rows": {{\n{lines}\n}}}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
