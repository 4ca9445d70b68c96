"""Measure the cost of a fixed order of sums: encoders with batch_invariant=None (ours) and False (torch's products).

    python -m benchmarks.batch_invariance [--threads 1,2] [--rounds 7] [--json out.json]

The two models take turns in one process, call by call. A figure is the ratio of their times in a round, and the median
over the rounds; above 1 ours is slower. Two encoders have MiniLM's size (384 wide, 12 heads, 6 layers), one with its
attention written out and one of torch's modules; the third model is one nn.MultiheadAttention, 512 wide.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import describe_machine
from fxquant import convert_fx, default_dynamic_qconfig_mapping, prepare_fx
from tutorials.word_language_model import torch_threads
from tutorials.word_language_model.options import thread_counts

WIDTH, HEADS, LAYERS = 384, 12, 6
BATCHES, LENGTHS = (1, 8, 32), (16, 64, 128)


class WrittenOut(nn.Module):
    """An encoder layer whose attention is written out: x @ y, softmax, x @ y."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        """Return (B, T, WIDTH)."""
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(WIDTH / HEADS)).softmax(-1)
        x = self.norm_1(x + self.out((weights @ v).transpose(1, 2).flatten(2)))
        return self.norm_2(x + self.down(nn.functional.gelu(self.up(x))))


class Alone(nn.Module):
    """Self-attention by one nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(512, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        """Return (B, T, 512)."""
        return self.attention(x, x, x, need_weights=False)[0]


def models() -> dict[str, tuple[nn.Module, int]]:
    """Return the float models and their widths."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, activation="gelu", batch_first=True)
    return {
        "written out": (nn.Sequential(*(WrittenOut() for _ in range(LAYERS))), WIDTH),
        "nn.TransformerEncoder": (nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False), WIDTH),
        "nn.MultiheadAttention": (Alone(), 512),
    }


def ratios(ours: Callable[[], object], torchs: Callable[[], object], rounds: int) -> list[float]:
    """Return the ratio of the times of each round, which has as many calls as fit into a fifth of a second."""
    begin = time.perf_counter()
    ours(), torchs()
    calls = max(2, int(0.2 / max(time.perf_counter() - begin, 1e-6)))
    found = []
    for _ in range(rounds):
        times = [[], []]  # type: list[list[float]]
        for call in range(calls):
            for side in (0, 1) if call % 2 else (1, 0):
                begin = time.perf_counter()
                (ours, torchs)[side]()
                times[side].append(time.perf_counter() - begin)
        found.append(statistics.median(times[0]) / statistics.median(times[1]))
    return found


def measure(threads: int, rounds: int) -> Iterator[dict[str, object]]:
    """Yield a line for each model and shape, as soon as it is measured: the median, smallest and largest ratio."""
    for name, (model, width) in models().items():
        example = torch.randn(2, 16, width)
        ours, torchs = (
            convert_fx(prepare_fx(model.eval(), default_dynamic_qconfig_mapping(), example, batch_invariant=asked))
            for asked in (None, False)
        )
        for batch in BATCHES:
            for length in LENGTHS:
                x = torch.randn(batch, length, width)
                found = ratios(lambda: ours(x), lambda: torchs(x), rounds)  # noqa: B023 - called in this turn
                row = {"threads": threads, "model": name, "batch": batch, "length": length}
                yield {**row, "ours / torch": statistics.median(found), "least": min(found), "greatest": max(found)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print line by line, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=thread_counts, default="1,2", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of a fifth of a second each (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the figures with the machine's description")
    options = parser.parse_args(arguments)
    rows = []
    with torch.no_grad():
        for threads in options.threads:
            with torch_threads(threads):
                for row in measure(threads, options.rounds):
                    line = " ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values())
                    print(line if rows else "# " + ", ".join(row) + "\n" + line, flush=True)
                    rows.append(row)
    if options.json:
        content = {"machine": describe_machine(), "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
