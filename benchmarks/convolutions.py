"""Time quantized convolutions against float torch, in shapes of published models.

    python -m benchmarks.convolutions [--only whisper,resnet] [--threads 1] [--rounds 9] [--json out.json]

Each convolution is quantized whether or not the operator table would take it; a `*` marks those that it leaves float.
Both sides take turns in one process, and the ratio, float's time over ours, is taken round by round: its median,
smallest and largest. With one thread the figure is CPU time. Other work on the machine affects it less than wall-clock
time, but still competes for caches and memory, so report with a figure what else ran.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.operators import Times, measure, ratios
from fxquant.nn import DynamicQuantizedConv
from fxquant.operators.convolution import CONVOLUTION
from fxquant.ops import kernel_info

_1d, _2d = nn.Conv1d, nn.Conv2d

# name: (float module, the shape of its input)
CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "whisper-tiny.1": (_1d(80, 384, 3, 1, 1), (1, 80, 3000)),
    "whisper-tiny.2": (_1d(384, 384, 3, 2, 1), (1, 384, 3000)),
    "whisper-base.1": (_1d(80, 512, 3, 1, 1), (1, 80, 3000)),
    "whisper-base.2": (_1d(512, 512, 3, 2, 1), (1, 512, 3000)),
    "whisper-small.1": (_1d(80, 768, 3, 1, 1), (1, 80, 3000)),
    "whisper-small.2": (_1d(768, 768, 3, 2, 1), (1, 768, 3000)),
    "tacotron2": (_1d(512, 512, 5, 1, 2), (1, 512, 100)),
    "tacotron2, batch 16": (_1d(512, 512, 5, 1, 2), (16, 512, 100)),
    "wav2vec2.2": (_1d(512, 512, 3, 2), (1, 512, 3199)),
    "wav2vec2.5": (_1d(512, 512, 2, 2), (1, 512, 399)),
    "wav2vec2.6": (_1d(512, 512, 2, 2), (1, 512, 199)),
    "deepspeech2.1": (_2d(1, 32, (41, 11), (2, 2), (20, 5)), (1, 1, 161, 400)),
    "deepspeech2.2": (_2d(32, 32, (21, 11), (2, 1), (10, 5)), (1, 32, 81, 200)),
    "crnn.2": (_2d(64, 128, 3, 1, 1), (1, 64, 16, 50)),
    "crnn.3": (_2d(128, 256, 3, 1, 1), (1, 128, 8, 25)),
    "crnn.4": (_2d(256, 256, 3, 1, 1), (1, 256, 8, 25)),
    "crnn.5": (_2d(256, 512, 3, 1, 1), (1, 256, 4, 26)),
    "crnn.7": (_2d(512, 512, 2), (1, 512, 2, 26)),
    "crnn.4, batch 16": (_2d(256, 256, 3, 1, 1), (16, 256, 8, 25)),
    "resnet.stem": (_2d(3, 64, 7, 2, 3), (1, 3, 224, 224)),
    "resnet.64": (_2d(64, 64, 3, 1, 1), (1, 64, 56, 56)),
    "resnet.128": (_2d(128, 128, 3, 1, 1), (1, 128, 28, 28)),
    "resnet.256": (_2d(256, 256, 3, 1, 1), (1, 256, 14, 14)),
    "resnet.512": (_2d(512, 512, 3, 1, 1), (1, 512, 7, 7)),
    "resnet.128, batch 8": (_2d(128, 128, 3, 1, 1), (8, 128, 28, 28)),
    "resnet.512, batch 8": (_2d(512, 512, 3, 1, 1), (8, 512, 7, 7)),
    "resnet.64-128, stride 2": (_2d(64, 128, 3, 2, 1), (1, 64, 56, 56)),
    "resnet.256-512, stride 2": (_2d(256, 512, 3, 2, 1), (1, 256, 14, 14)),
    "resnet.1x1, stride 2": (_2d(256, 512, 1, 2), (1, 256, 28, 28)),
    "resnet50.64-256": (_2d(64, 256, 1), (1, 64, 56, 56)),
    "resnet50.256-1024": (_2d(256, 1024, 1), (1, 256, 14, 14)),
    "resnet50.1024-256": (_2d(1024, 256, 1), (1, 1024, 14, 14)),
    "resnet50.2048-512": (_2d(2048, 512, 1), (1, 2048, 7, 7)),
    "vgg16.2-2": (_2d(128, 128, 3, 1, 1), (1, 128, 112, 112)),
    "vgg16.3-2": (_2d(256, 256, 3, 1, 1), (1, 256, 56, 56)),
    "hifigan": (_1d(128, 128, 7, 1, 3), (1, 128, 6400)),
    "hifigan, dilation 3": (_1d(128, 128, 7, 1, 9, 3), (1, 128, 6400)),
    "pointwise 1024-64": (_1d(1024, 64, 1), (1, 1024, 1000)),
    "pointwise 64-1024": (_1d(64, 1024, 1), (1, 64, 1000)),
    "textcnn.3": (_1d(300, 100, 3), (1, 300, 50)),
    "textcnn.5": (_1d(300, 100, 5), (1, 300, 50)),
    "textcnn.3, batch 32": (_1d(300, 100, 3), (32, 300, 50)),
    "textcnn.5, batch 32": (_1d(300, 100, 5), (32, 300, 50)),
    "conformer.256-512": (_1d(256, 512, 1), (1, 256, 200)),
    "pointwise 256": (_1d(256, 256, 1), (1, 256, 200)),
    "pointwise 256, batch 16": (_1d(256, 256, 1), (16, 256, 200)),
    "pointwise 512": (_1d(512, 512, 1), (1, 512, 200)),
    "pointwise 512, one": (_1d(512, 512, 1), (1, 512, 1)),
    "tcn, dilation 4": (_1d(256, 256, 3, 1, 8, 4), (1, 256, 400)),
    "vit.patches": (_2d(3, 768, 16, 16), (1, 3, 224, 224)),
}


def report(name: str, module: nn.Module, shape: tuple[int, ...], times: Times) -> str:
    """Return a line of the table in docs/performance.md."""
    kernel = "×".join(map(str, module.kernel_size))
    taken = "" if CONVOLUTION.refuse_module(module) is None else " *"
    found = ratios(times, "float")
    sizes = f"{module.in_channels} → {module.out_channels}, {kernel}, {'×'.join(map(str, shape[2:]))}"
    spread = f"{statistics.median(found):.1f} ({min(found):.1f}–{max(found):.1f})"
    return f"| {name}{taken} | {sizes} | {statistics.median(times['fxquant']) / 1e3:.2f} | {spread} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[""], help="beginnings of names")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(kernel_info(), "\n\n| | convolution, input | fxquant, ms | float |\n|---|---|---|---|", sep="", flush=True)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    results: dict[str, Times] = {}
    with torch.no_grad():
        for name, (module, shape) in CASES.items():
            if name.startswith(tuple(options.only)):
                sides = {"fxquant": DynamicQuantizedConv.from_float(module.eval()), "float": module}
                x = torch.randn(shape)
                calls = {side: functools.partial(model, x) for side, model in sides.items()}
                results[name] = measure(calls, options.rounds, clock=clock)
                print(report(name, module, shape, results[name]), flush=True)
    if options.json:
        content = {"kernels": str(kernel_info()), "rows": results}
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
