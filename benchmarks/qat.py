"""Time a step of quantization-aware training: fxquant's, torch.ao's and the float model's, taking turns.

    python -m benchmarks.qat [--only resnet,mobilenet] [--threads 1] [--rounds 5] [--json out.json]

A step is forward, loss, backward and an SGD update. The ratios are to the float model's step of the same round: their
median, smallest and largest; then torch.ao's step over ours, where it trains such a model. With one thread the figure
is CPU time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from benchmarks.operators import Times, measure


class Residual(nn.Module):
    """A block of two convolutions, as in ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        is_same = stride == 1 and inputs == outputs
        down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.down, self.relu = nn.Identity() if is_same else down, nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        y: torch.Tensor = self.relu(self.body(x) + self.down(x))
        return y


class Inverted(nn.Module):
    """A block with a depthwise convolution, as in MobileNetV2, with ReLU for torch.ao's sake."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU()),
            *(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        y: torch.Tensor = self.body(x)
        return y + x if self.is_residual else y


def _network(block: Callable[..., nn.Module], width: int) -> nn.Module:
    sizes = [width, width, 2 * width, 2 * width, 4 * width, 4 * width]
    blocks = [block(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(sizes)]
    stem = (nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


class Language(nn.Module):
    """An LSTM language model, for dynamic quantization: torch.ao's LSTM does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.decoder = nn.Embedding(2000, 128), nn.LSTM(128, 256, 2), nn.Linear(256, 2000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next word: (T, B) -> (T B, 2000)."""
        y: torch.Tensor = self.decoder(self.lstm(self.embedding(x))[0]).flatten(0, 1)
        return y


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet, 32 × 32, batch 16": (lambda: _network(Residual, 64), (16, 3, 32, 32)),
    "resnet, narrow, 16 × 16, batch 32": (lambda: _network(Residual, 16), (32, 3, 16, 16)),
    "mobilenet, 32 × 32, batch 16": (lambda: _network(Inverted, 24), (16, 3, 32, 32)),
    "perceptron, batch 128": (_perceptron, (128, 784)),
    "lstm, 25 words, batch 16": (Language, (25, 16)),
}


def _theirs(model: nn.Module, x: torch.Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its deprecation
        from torch.ao.quantization import get_default_qat_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_qat_fx

        prepared: nn.Module = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (x,))
    return prepared


def _step(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def run(name: str, rounds: int, seconds: float, clock: Callable[[], float]) -> Times:
    """Return each side's microseconds a step."""
    make, shape = CASES[name]
    torch.manual_seed(0)
    model = make().train()
    is_dynamic = isinstance(model, Language)
    x = torch.randint(2000, shape) if is_dynamic else torch.randn(shape)
    labels = x.flatten() if is_dynamic else torch.randint(10, shape[:1])
    mapping = fxquant.default_dynamic_qconfig_mapping() if is_dynamic else fxquant.default_qat_qconfig_mapping()
    sides = {"float": copy.deepcopy(model), "fxquant": fxquant.prepare_qat_fx(model, mapping, (x,))}
    if not is_dynamic:
        sides["torch.ao"] = _theirs(copy.deepcopy(model), x)
    return measure({side: _step(each, x, labels) for side, each in sides.items()}, rounds, seconds, clock)


def main() -> None:
    """Measure and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the beginnings of the cases' names")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="a side's turn")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    results: dict[str, Times] = {}
    for name in CASES:
        if not options.only or name.startswith(tuple(options.only.split(","))):
            times = results[name] = run(name, options.rounds, options.seconds, clock)
            line = f"{name:36s} float {statistics.median(times['float']) / 1000:8.2f} ms"
            for side, base in (("fxquant", "float"), ("torch.ao", "float"), ("torch.ao", "fxquant")):
                if side not in times:
                    continue
                found = [a / b for a, b in zip(times[side], times[base], strict=True)]
                line += f"   {side} / {base} {statistics.median(found):.2f} [{min(found):.2f}–{max(found):.2f}]"
            print(line)
    if options.json is not None:
        options.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
