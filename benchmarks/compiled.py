"""Measure torch.compile of quantized models, and of their float originals, beside eager calls.

    python -m benchmarks.compiled [--rounds 7] [--seconds 0.2]

One thread. The sides take turns, in one process; a time is the median of the rounds' medians, a ratio eager / compiled,
the median of those within the rounds. "least" is what torch lets a compiled call take at least: what Inductor wrote,
called by itself, and then a compiled module that adds one to four numbers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor.output_code import CompiledFxGraph

import fxquant

Model = tuple[nn.Module, tuple[Any, ...]]


class AddOne(nn.Module):
    """What a compiled call costs by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class LanguageModel(nn.Module):
    """The word language model of docs/performance.md."""

    def __init__(self, words: int = 33278, embedding: int = 512, hidden: int = 256, layers: int = 5) -> None:
        super().__init__()
        self.encoder, self.rnn = nn.Embedding(words, embedding), nn.LSTM(embedding, hidden, layers)
        self.decoder = nn.Linear(hidden, words)

    def forward(self, words: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, hidden = self.rnn(self.encoder(words), hidden)
        return self.decoder(output), hidden


def language_model(length: int, small: bool = False) -> Model:
    """Return the model and a sequence. small: one that takes some 50 µs a step."""
    model = LanguageModel(1000, 128, 128, 2) if small else LanguageModel()
    states = (torch.zeros(model.rnn.num_layers, 1, model.rnn.hidden_size),) * 2
    return model, (torch.randint(1000, (length, 1)), states)


def encoder(width: int, length: int) -> Model:
    """Return two encoder layers of a transformer and a sequence."""
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(1, length, width),)


def mlp(width: int, batch: int) -> Model:
    """Return three layers with ReLU between them, which fxquant fuses, and a batch."""
    layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers), (torch.randn(batch, width),)


MODELS: dict[str, Callable[[], Model]] = {
    "encoder, width 128, 16 tokens": lambda: encoder(128, 16),
    "encoder, width 256, 128 tokens": lambda: encoder(256, 128),
    "word language model, 1 × 1": lambda: language_model(1),
    "word language model, 25 × 1": lambda: language_model(25),
    "a small one, 1 × 1": lambda: language_model(1, small=True),
    "MLP, width 1024, batch 64": lambda: mlp(1024, 64),
    "MLP, width 512, batch 16": lambda: mlp(512, 16),
    "MLP, width 128, batch 4": lambda: mlp(128, 4),
}


def _median_us(call: Callable[..., Any], args: tuple[Any, ...], seconds: float) -> float:
    """Return the median time of a call, called for so long."""
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        call(*args)
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def graph_of(compiled: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], object]:
    """Return a call of what Inductor writes for a module of one graph, without torch's code around it."""
    seen: list[tuple[Callable[..., object], list[object]]] = []
    call = CompiledFxGraph.__call__

    def note(graph: CompiledFxGraph, inputs: Sequence[object]) -> object:
        assert graph.current_callable is not None
        seen.append((graph.current_callable, list(inputs)))
        return call(graph, inputs)

    with mock.patch.object(CompiledFxGraph, "__call__", note):
        compiled(*args)
    ((graph, inputs),) = seen
    return lambda: graph(list(inputs))


def compare(model: nn.Module, args: tuple[Any, ...], rounds: int, seconds: float, finds_least: bool) -> list[str]:
    """Return the times in µs of eager calls, of compiled ones and the least for these, and eager / compiled."""
    torch.compiler.reset()  # models share code, and torch would compile the second one for all sizes
    compiled = torch.compile(model)
    sides: list[Callable[..., object]] = [model, compiled]
    if finds_least:
        graph, add_one, x = graph_of(compiled, args), torch.compile(AddOne()), torch.ones(4)
        sides.append(lambda *_: (graph(), add_one(x)))
    for side in sides * 3:
        side(*args)
    times = [[_median_us(side, args, seconds) for side in sides] for _ in range(rounds)]
    ratio = statistics.median(row[0] / row[1] for row in times)
    return [*(f"{statistics.median(column):.0f}" for column in zip(*times, strict=True)), f"{ratio:.2f}"]


def main() -> None:
    """Print the table of docs/performance.md."""
    parser = argparse.ArgumentParser(description="torch.compile of quantized models")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each side in each round")
    how = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    lines: list[list[str]] = []
    with torch.no_grad():
        for name, make in MODELS.items():
            model, args = make()
            model.eval()
            prepared = fxquant.prepare_fx(model, fxquant.default_dynamic_qconfig_mapping(), args)
            line = [name, *compare(fxquant.convert_fx(prepared), args, how.rounds, how.seconds, True)]
            lines.append([*line, *compare(model, args, how.rounds, how.seconds, False)])  # not all are one graph
    headers = ["", "int8: eager, µs", "compiled", "least", "ratio", "float: eager, µs", "compiled", "ratio"]
    print(tabulate(lines, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
