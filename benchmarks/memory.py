"""Measure a quantized model's memory: what it holds once loaded, and what converting takes beyond float and int8.

    python -m benchmarks.memory [--layers 24] [--width 2048] [--json out.json]

The model is a stack of Linears with random weights, several hundred MB in float. Loading and converting each run in a
fresh process, which reads its resident set (and its peak) before and after. A small model goes through the same steps
first, so that code and libraries are already in memory.

held: growth of the resident set from the empty process to the loaded model after a call, over the bytes of int8
weights and scales. extra: how far prepare_fx and convert_fx went above float + int8, over one layer's float bytes.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

import fxquant
from benchmarks.machine import describe_machine
from fxquant import QConfigMapping, convert_fx, default_dynamic_qconfig, prepare_fx


def stack(layers: int, width: int) -> nn.Module:
    """Return a sequence of square Linears."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).eval()


def quantize(model: nn.Module, width: int) -> nn.Module:
    """Return the model quantized by prepare_fx and convert_fx."""
    mapping = QConfigMapping().set_global(default_dynamic_qconfig)
    return convert_fx(prepare_fx(model, mapping, torch.zeros(1, width)))


def resident_bytes() -> int:
    """Return the resident set's size now, files mapped into memory included."""
    return int(Path("/proc/self/statm").read_text(encoding="utf8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Return the largest resident set of this program so far.

    getrusage is no help: for a new process its figure starts with the size of the process that started it.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024


def state_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's state_dict."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def measure_load(path: Path, layers: int, width: int) -> dict[str, float]:
    """Return what the checkpoint at `path` holds once it is loaded into a model without weights and called."""
    small = path.with_name("small.safetensors")
    fxquant.save(quantize(stack(1, 64), 64), small)
    fxquant.load(stack(1, 64), small)(torch.zeros(1, 64))
    with torch.device("meta"):
        skeleton = stack(layers, width)
    gc.collect()
    before = resident_bytes()
    model = fxquant.load(skeleton, path)
    model(torch.randn(1, width))
    gc.collect()
    held, ideal = resident_bytes() - before, state_bytes(model)
    return {"int8 and scales, MB": ideal / 1e6, "resident, MB": held / 1e6, "held": held / ideal}


def measure_convert(path: Path, layers: int, width: int) -> dict[str, float]:
    """Return the peak memory of prepare_fx and convert_fx, and write the checkpoint to `path`."""
    quantize(stack(1, 64), 64)
    model = stack(layers, width)
    gc.collect()
    before = resident_bytes()
    if peak_bytes() > before * 1.01:
        raise SystemExit("the process was larger before than with the float model: its peak says nothing")
    quantized = quantize(model, width)
    beyond, layer = peak_bytes() - before - state_bytes(quantized), width * width * 4
    fxquant.save(quantized, path)
    return {"float, MB": state_bytes(model) / 1e6, "beyond float + int8, MB": beyond / 1e6, "extra": beyond / layer}


STEPS = {"convert": measure_convert, "load": measure_load}


def in_fresh_process(step: str, path: Path, layers: int, width: int) -> dict[str, float]:
    """Return what a step measures in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--step", step, "--checkpoint", str(path)]
    command += ["--layers", str(layers), "--width", str(width)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures: dict[str, float] = json.loads(found)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=2048, help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the figures with the machine's description")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    size = (options.layers, options.width)
    if options.step:
        torch.set_num_threads(1)
        with torch.no_grad():
            print(json.dumps(STEPS[options.step](options.checkpoint, *size)))
        return
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            found |= in_fresh_process(step, Path(folder) / "model.safetensors", *size)
    print(tabulate(found.items(), floatfmt=".2f"))
    if options.json:
        content = {"machine": describe_machine(), "layers": size[0], "width": size[1], "figures": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
