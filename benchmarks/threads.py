"""Measure the effect of more threads on single calls, on a quiet machine and beside a process that keeps a core busy.

    python -m benchmarks.threads [--threads 1,2] [--rounds 5] [--seconds 0.3] [--only lstm] [--json out.json]

More threads should never make a call slower than one thread does, beyond noise. For each case the thread counts take
turns for several rounds, and each call is timed separately: p50 and p99 of all calls in milliseconds, and the ratio of
p50 to that of the first thread count. The encoder also has torch's own operators, which use threads of their own.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.machine import describe_machine
from benchmarks.tail import percentile
from fxquant import QConfigMapping, convert_fx, default_dynamic_qconfig, prepare_fx
from tutorials.word_language_model import torch_threads
from tutorials.word_language_model.options import thread_counts

Call = Callable[[], object]
VOCABULARY, EMBEDDED, HIDDEN, LAYERS = 33278, 512, 256, 5


class LanguageModel(nn.Module):
    """The language model of docs/performance.md with random weights, on which times do not depend."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(VOCABULARY, EMBEDDED)
        self.rnn = nn.LSTM(EMBEDDED, HIDDEN, LAYERS)
        self.decoder = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.rnn(self.encoder(words))[0])


def quantized(model: nn.Module, *inputs: torch.Tensor) -> Call:
    """Return a call of the quantized model, whose layer is inside an outer module, as in a user's model."""
    prepared = prepare_fx(nn.Sequential(model).eval(), QConfigMapping().set_global(default_dynamic_qconfig), inputs)
    converted = convert_fx(prepared)
    return lambda: converted(*inputs)


def cases() -> dict[str, Callable[[], Call]]:
    """Return the cases by name, each as a function that makes it when its turn comes."""
    words = {shape: torch.randint(VOCABULARY, shape) for shape in ((25, 1), (1, 1), (25, 16))}
    made: dict[str, Callable[[], Call]] = {}
    for (steps, batch), given in words.items():
        made[f"language model {steps}x{batch}"] = lambda given=given: quantized(LanguageModel(), given)  # type: ignore[misc]
    for rows, inputs, outputs in ((1, 64, 64), (1, 256, 1024), (16, 512, 512), (1, 256, 33278), (128, 384, 1536)):
        name = f"linear {rows}x{inputs} to {outputs}"
        made[name] = lambda r=rows, i=inputs, o=outputs: quantized(nn.Linear(i, o), torch.randn(r, i))  # type: ignore[misc]
    made["lstm 25x1, 256 units"] = lambda: quantized(nn.LSTM(256, 256), torch.randn(25, 1, 256))
    made["gru 25x8, 64 units"] = lambda: quantized(nn.GRU(64, 64), torch.randn(25, 8, 64))
    made["embedding of 400"] = lambda: quantized(nn.Embedding(VOCABULARY, 256), torch.randint(VOCABULARY, (400,)))
    made["encoder 1x16, 384 wide"] = lambda: quantized(encoder(), torch.randn(1, 16, 384))
    return made


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@contextlib.contextmanager
def company(is_busy: bool) -> Iterator[None]:
    """Keep one core busy inside the context, if asked to."""
    if not is_busy:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            time.sleep(0.2)
            yield
        finally:
            process.kill()


def time_calls(call: Call, seconds: float) -> list[float]:
    """Return the milliseconds of each call that fits into some seconds; the first ones only warm up."""
    times: list[float] = []
    end = time.perf_counter() + 1.1 * seconds
    while (begin := time.perf_counter()) < end:
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return times[len(times) // 11 :]


def measure(name: str, call: Call, threads: Sequence[int], rounds: int, seconds: float) -> list[dict[str, object]]:
    """Return a line for each thread count, on a quiet and on a busy machine."""
    rows: list[dict[str, object]] = []
    for beside in ("nothing", "a busy process"):
        times: dict[int, list[float]] = {count: [] for count in threads}
        with company(beside != "nothing"):
            for _ in range(rounds):
                for count in threads:
                    with torch_threads(count):
                        times[count] += time_calls(call, seconds)
        first = percentile(times[threads[0]], 50)
        for count, found in times.items():
            p50, p99 = percentile(found, 50), percentile(found, 99)
            row = {"case": name, "beside": beside, "threads": count, "p50": p50, "p99": p99, "ratio": p50 / first}
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=thread_counts, default="1,2", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each thread count (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of calls a turn (%(default)s)")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--json", type=Path, help="where to write the figures with the machine's description")
    options = parser.parse_args(arguments)
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        for name, make in cases().items():
            if options.only in name:
                rows += measure(name, make(), options.threads, options.rounds, options.seconds)
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    if options.json:
        content = {"machine": describe_machine(), "unit": "ms", "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
