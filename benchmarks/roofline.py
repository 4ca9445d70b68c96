"""Measure the share of the machine's own limits that fxquant's kernels reach, for every instruction set that runs here.

    python -m benchmarks.roofline [--threads 1,2] [--isas avx512_vnni,avx2] [--rounds 5] [--json out.json]

The limits: products of int8 out of registers alone, with the instruction that the kernels use, and reading the caches
and memory (benchmarks/limits.c). An operator's share is its products per second over the peak, and that of one row its
bytes of weights per second over L3's rate. Operators are whole calls: from float to float, with quantization. Each
instruction set has a process of its own (FXQUANT_ISA), in which limits and operators take turns, and a figure is the
median of the rounds. Of AVX2's three loops `maddubs` is the peak: two bytes' products, added to int32. `madd`, of
int16, is what is exact for all bytes, and `maddubs_int16` leaves out the step to int32.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.limits import LEVELS, PEAKS, peak, reading, usable_isas, writing
from benchmarks.machine import describe_machine
from benchmarks.operators import Call, measure
from fxquant import kernel_info, quantize_dynamic
from tutorials.word_language_model import torch_threads
from tutorials.word_language_model.options import thread_counts

HIDDEN, LAYERS, STEPS, BATCH = 256, 5, 25, 16
LINEARS = ((25, 256, 33278), (400, 256, 33278), (128, 1536, 384), (512, 1024, 4096))
ONE_ROW = (1, 256, 33278)
_BESIDE_A_WEIGHT = 8  # bytes an output: its scale and its bias
ROW = "one row, of L3"


@dataclass(frozen=True)
class Operator:
    """One operator: what is called, and how many products, or bytes of weights, a call takes."""

    name: str
    call: Call
    units: int
    is_bound_by_reading: bool = False


@dataclass(frozen=True)
class Share:
    """What an operator reaches: GMAC/s or GB/s, round by round, and the limit measured in the same round."""

    isa: str
    threads: int
    operator: str
    microseconds: list[float]
    reached: list[float]
    limits: list[float]

    @property
    def percent(self) -> float:
        """The median share."""
        return 100 * statistics.median(a / b for a, b in zip(self.reached, self.limits, strict=True))


def operators() -> list[Operator]:
    """Return the operators of docs/performance.md's table."""
    made = []
    for rows, inputs, outputs in LINEARS:
        name = f"linear {rows}×{inputs} → {outputs}"
        made.append(Operator(name, _quantized(nn.Linear(inputs, outputs), rows, inputs), rows * inputs * outputs))
    lstm = nn.LSTM(2 * HIDDEN, HIDDEN, LAYERS)
    products = STEPS * BATCH * sum(weight.numel() for name, weight in lstm.named_parameters() if "weight" in name)
    name = f"lstm {2 * HIDDEN} → {HIDDEN}, {LAYERS} layers, {STEPS}×{BATCH}"
    made.append(Operator(name, _quantized(lstm, STEPS, BATCH, 2 * HIDDEN), products))
    rows, inputs, outputs = ONE_ROW
    call = _quantized(nn.Linear(inputs, outputs), rows, inputs)
    return [*made, Operator(ROW, call, (inputs + _BESIDE_A_WEIGHT) * outputs, is_bound_by_reading=True)]


def _quantized(module: nn.Module, *shape: int) -> Call:
    return functools.partial(quantize_dynamic(module.eval()), torch.randn(shape))


def shares(isa: str, threads: int, rounds: int, seconds: float) -> list[Share]:
    """Return each operator's share with the kernels in use, whose instruction set this is."""
    made = operators()
    times: dict[str, list[float]] = {operator.name: [] for operator in made}
    peaks, l3 = [], []
    for _ in range(rounds):
        peaks.append(peak(PEAKS[isa][0], threads, seconds))
        l3.append(reading("L3", threads, seconds))
        for operator in made:
            times[operator.name] += measure({operator.name: operator.call}, 1, seconds)[operator.name]
    return [
        Share(
            isa,
            threads,
            operator.name,
            times[operator.name],
            [operator.units / (1e3 * us) for us in times[operator.name]],
            l3 if operator.is_bound_by_reading else peaks,
        )
        for operator in made
    ]


def memory_and_peaks(isas: Sequence[str], threads: int, rounds: int, seconds: float) -> dict[str, float]:
    """Return the machine's limits, GB/s and GMAC/s, each the median of the rounds."""
    calls: dict[str, Callable[[], float]] = {}
    for level in LEVELS:
        calls[f"read {level}, GB/s"] = functools.partial(reading, level, threads, seconds)
        calls[f"write {level}, GB/s"] = functools.partial(writing, level, threads, seconds)
    for isa in isas:
        for name in PEAKS.get(isa, ()):
            calls[f"{name}, GMAC/s"] = functools.partial(peak, name, threads, seconds)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(call())
    return {name: statistics.median(rates) for name, rates in found.items()}


def in_a_process(isa: str, arguments: Sequence[str]) -> list[Share]:
    """Return the shares that a process with these kernels finds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "shares.json"
        command = [sys.executable, "-m", "benchmarks.roofline", *arguments, f"--here={file}"]
        root = Path(__file__).resolve().parents[1]
        subprocess.run(command, check=True, env={**os.environ, "FXQUANT_ISA": isa}, cwd=root)
        return [Share(**share) for share in json.loads(file.read_text(encoding="utf8"))]


def render(found: Sequence[Share], limits: dict[int, dict[str, float]]) -> str:
    """Return the tables of docs/performance.md: the limits by threads; the shares by instruction set and threads."""
    names = list(next(iter(limits.values())))
    headers = ["", *(f"{threads} thread{'s' * (threads > 1)}" for threads in limits)]
    rows = [[name, *(f"{column[name]:.3g}" for column in limits.values())] for name in names]
    columns = list(dict.fromkeys((share.isa, share.threads) for share in found))
    by_place = {(share.operator, share.isa, share.threads): f"{share.percent:.0f} %" for share in found}
    lines = [
        [operator, *(by_place[operator, isa, threads] for isa, threads in columns)]
        for operator in dict.fromkeys(share.operator for share in found)
    ]
    titles = ["share of the peak", *(f"{isa}, {threads}" for isa, threads in columns)]
    return "\n\n".join(_table(*table) for table in ((rows, headers), (lines, titles)))


def _table(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--threads", type=thread_counts, default="1,2", help="(%(default)s)")
    option("--isas", type=lambda text: text.split(","), help="instruction sets (all that run here and have a peak)")
    option("--rounds", type=int, default=5, help="(%(default)s)")
    option("--seconds", type=float, default=0.1, help="for each figure in each round (%(default)s)")
    option("--json", type=Path, help="where to write the figures with the machine's description")
    option("--here", type=Path, help=argparse.SUPPRESS)  # the shares of this process's kernels, for in_a_process
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    options = parse_arguments(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    torch.manual_seed(0)
    if options.here:
        found = []
        with torch.no_grad():
            for threads in options.threads:
                with torch_threads(threads):
                    found += shares(kernel_info().isa or "", threads, options.rounds, options.seconds)
        options.here.write_text(json.dumps([asdict(share) for share in found]), encoding="utf8")
        return
    isas = options.isas or [isa for isa in usable_isas() if isa in PEAKS]
    limits = {count: memory_and_peaks(isas, count, options.rounds, options.seconds) for count in options.threads}
    found = [share for isa in isas for share in in_a_process(isa, given)]
    print(render(found, limits))
    if options.json:
        content = {"machine": describe_machine(), "limits": limits, "shares": [asdict(share) for share in found]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
