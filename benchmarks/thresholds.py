"""Find where one form of an int8 product overtakes another on this machine, and from how much work threads pay.

    python -m benchmarks.thresholds [--isas avx512_vnni,avx2] [--rounds 5] [--json out.json]

A product has up to three forms (docs/kernels.md). With few tokens the gemv is the fastest, since it reads the weight as
it lies and prepares nothing. The tiled gemm reads the weight once for 16 tokens or more, but transposes each tile. The
packed gemm first copies the weight, which costs as much for one token as for a thousand, and then multiplies at the
highest rate. Each form is forced in turn, for several weights and numbers of tokens. From how many tokens a form is the
faster one, here and for all larger numbers, is printed beside what the kernels' table says (struct fxq_thresholds), and
"lost" is by how much the form that they choose is slower than the best one, where that is most. More than noise, some
5 %, is a reason to change the table. A weight that fits the L2 cache, few columns and few outputs each move these
points, so the table has a compromise. Outputs from 1 MB on are streamed past the caches, where packing pays sooner.

The second table: from how many multiplications two threads are faster than one, where the second one is awake, and
where it sleeps. fxquant shares out no work below `least_share` for each thread; above, it learns the prices as it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.limits import usable_isas
from benchmarks.machine import describe_machine
from benchmarks.operators import Call
from fxquant.nn import DynamicQuantizedLinear
from fxquant.ops import library
from tutorials.word_language_model import torch_threads

METHODS = {
    "amx": ("gemv", "tiled", "packed"),
    "avx512_vnni": ("gemv", "packed"),
    "avx_vnni": ("gemv", "packed"),
    "avx2": ("gemv", "packed"),
}
CHOSEN = "chosen"
WEIGHTS = ((384, 384), (1536, 384), (1024, 4096), (256, 33278))
"""Inputs and outputs."""

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
MOST_MACS = 1e9
SHARED_OUTPUTS = tuple(64 << i for i in range(9))  # times 8 tokens × 256 inputs: 2**17 to 2**25 multiplications
SLEEP_SECONDS = 2e-3  # after this a worker sleeps

Times = dict[int, dict[str, float]]
"""By tokens, or multiplications, the microseconds of each form, or number of threads."""


@dataclass(frozen=True)
class Crossings:
    """What was found of one weight. None: never, as far as was measured."""

    isa: str
    weight: tuple[int, int]
    tiled_from: int | None
    packed_from: int | None
    lost: float
    lost_at: int


def crossing(times: Times, form: str, others: Sequence[str]) -> int | None:
    """Return from where on a form is faster than the others at all points; None where it is not at the last one."""
    found = None
    for at in sorted(times, reverse=True):
        if form not in times[at] or times[at][form] >= min((times[at][o] for o in others), default=math.inf):
            break
        found = at
    return found


def greatest_loss(times: Times) -> tuple[float, int]:
    """Return the chosen form's time over the best one's where that is most, and where that is."""
    return max((line[CHOSEN] / min(line.values()), at) for at, line in times.items())


def crossings(isa: str, weight: tuple[int, int], times: Times) -> Crossings:
    """Return where the forms of this weight cross."""
    names = [name for name in next(iter(times.values())) if name != CHOSEN]
    tiled = crossing(times, "tiled", ["gemv"]) if "tiled" in names else None
    packed = crossing(times, "packed", [name for name in names if name != "packed"]) if "packed" in names else None
    return Crossings(isa, weight, tiled, packed, *greatest_loss(times))


@contextlib.contextmanager
def kernels(isa: str) -> Iterator[tuple[int, int, int, int]]:
    """Run on an instruction set inside the context; gives its thresholds."""
    call = functools.partial(_call, "select_isa")
    names = [name for name, _ in _call("isas")]
    before = _call("active_isa")
    call(names.index(isa))
    try:
        yield _call("thresholds")
    finally:
        _call("use_method", None)
        call(names.index(before))


def _call(name: str, *arguments: object) -> object:
    function = library.function(name)
    if function is None:
        raise SystemExit(f"thresholds are the native library's, and {library.kernel_info()}")
    return function(*arguments)


def methods(isa: str, thresholds: Sequence[int]) -> list[str]:
    """Return the forms that these kernels have; one that never pays (0) may not be there."""
    return [name for name in METHODS[isa] if name != "packed" or thresholds[1] or thresholds[2]]


def time_forms(weight: tuple[int, int], names: Sequence[str], rounds: int, seconds: float) -> Times:
    """Return the times of each form, and of the chosen one, which take turns; the least of the rounds' medians."""
    inputs, outputs = weight
    linear = DynamicQuantizedLinear.from_float(nn.Linear(inputs, outputs))
    times: Times = {}
    for tokens in TOKENS:
        if tokens * inputs * outputs > MOST_MACS:
            break
        call = functools.partial(linear, torch.randn(tokens, inputs))
        line = times[tokens] = {}
        for _, name in itertools.product(range(rounds), (*names, CHOSEN)):
            _call("use_method", None if name == CHOSEN else name)
            line[name] = min(line.get(name, math.inf), median_us(call, seconds))
        _call("use_method", None)
    return times


def median_us(call: Call, seconds: float, pause: float = 0.0) -> float:
    """Return the median microseconds of the calls that fit into some seconds, each after a pause."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        if pause:
            time.sleep(pause)
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times)


def time_sharing(rounds: int, seconds: float) -> dict[str, Times]:
    """Return, by the second thread's state, the times of one and two threads by multiplications."""
    found: dict[str, Times] = {}
    usual = _call("thresholds")[3]  # type: ignore[index]
    _call("set_least_share", 1)
    _call("use_way", "waking")
    try:
        for state, pause in (("awake", 0.0), ("asleep", SLEEP_SECONDS)):
            found[state] = {}
            for outputs in SHARED_OUTPUTS:
                call = functools.partial(
                    DynamicQuantizedLinear.from_float(nn.Linear(256, outputs)), torch.randn(8, 256)
                )
                line = found[state][8 * 256 * outputs] = {}
                for _, threads in itertools.product(range(rounds), (1, 2)):
                    with torch_threads(threads):
                        line[str(threads)] = min(line.get(str(threads), math.inf), median_us(call, seconds, pause))
    finally:
        _call("set_least_share", usual)
        _call("use_way", None)
    return found


def render(found: Sequence[Crossings], thresholds: Mapping[str, Sequence[int]]) -> str:
    """Return the table of forms."""
    rows = []
    for one in found:
        gemv, packed, streamed, _ = thresholds[one.isa]
        own = (gemv + 1 if "tiled" in METHODS[one.isa] else "", packed or "never", streamed or "never")
        measured = (one.tiled_from or "never" if "tiled" in METHODS[one.isa] else "", one.packed_from or "never")
        lost = f"{100 * (one.lost - 1):.0f} % at {one.lost_at}"
        rows.append([one.isa, "×".join(map(str, one.weight)), *measured, *own, lost])
    headers = ["kernels", "weight", "tiled from", "packed from", "table: tiled", "packed", "streamed", "lost"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def render_sharing(found: Mapping[str, Mapping[str, Times]], thresholds: Mapping[str, Sequence[int]]) -> str:
    """Return the table of threads."""
    rows = []
    for isa, states in found.items():
        points = [crossing(times, "2", ["1"]) for times in states.values()]
        rows.append([isa, *(f"{point:,}" if point else "never" for point in points), f"{2 * thresholds[isa][3]:,}"])
    headers = ["kernels", "two threads pay from: awake", "asleep", "table: 2 × least_share"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--isas", type=lambda text: text.split(","), help="instruction sets (all that run here)")
    option("--rounds", type=int, default=5, help="(%(default)s)")
    option("--seconds", type=float, default=0.006, help="for each figure in each round (%(default)s)")
    option("--json", type=Path, help="where to write the figures with the machine's description")
    options = parser.parse_args(arguments)
    found, thresholds, sharing = [], {}, {}
    times: dict[str, dict[str, Times]] = {}
    with torch.no_grad():
        for isa in options.isas or [isa for isa in usable_isas() if isa in METHODS]:
            with kernels(isa) as thresholds[isa], torch_threads(1):
                for weight in WEIGHTS:
                    measured = time_forms(weight, methods(isa, thresholds[isa]), options.rounds, options.seconds)
                    times.setdefault(isa, {})["x".join(map(str, weight))] = measured
                    found.append(crossings(isa, weight, measured))
                sharing[isa] = time_sharing(options.rounds, options.seconds)
    print(render(found, thresholds), render_sharing(sharing, thresholds), sep="\n\n")
    if options.json:
        content = {"machine": describe_machine(), "thresholds": thresholds, "crossings": [asdict(one) for one in found]}
        options.json.write_text(json.dumps({**content, "us": times, "sharing": sharing}, indent=1), encoding="utf8")


if __name__ == "__main__":
    main()
