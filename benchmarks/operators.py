"""Time every operator of the table over a grid of sizes, as ratios to float torch and torch.ao.

    python -m benchmarks.operators [--grid sizes|encoder] [--operators linear,lstm] [--threads 1] [--rounds 5]
        [--json out.json] [--plot out.svg]

A case is called with a number of rows: tokens, or sequences of 8 steps, or bags of 8. Its weights are size × size
(embedding tables 4096 × size). The sides of a case take turns in one process, `rounds` times, and each figure is a
median: on a shared machine only such ratios are meaningful. A ratio above 1 says how many times faster fxquant is; the
smallest and largest ratio of the rounds follow it. The JSON file accumulates: cases that are not measured again keep
their figures, and the plot shows all of them (--rounds 0 only draws). FXQUANT_ISA=avx2 and the like measure other
kernels.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.static_operators import STATIC, Static
from fxquant import (
    QConfig,
    QConfigMapping,
    convert_fx,
    default_dynamic_qconfig,
    default_static_qconfig_mapping,
    prepare_fx,
    quantize_dynamic,
)
from fxquant.ops import kernel_info

Call = Callable[[], Any]
Case = tuple[nn.Module, tuple[Any, ...]]
Times = dict[str, list[float]]
SIDES = ("fxquant", "float", "torch_ao")
SIZES, ROWS, STEPS, TABLE = (16, 64, 256, 1024, 4096), (1, 16, 256), 8, 4096
ENCODER = [(rows, i, o) for rows in (16, 64, 128, 512) for i, o in ((384, 384), (384, 1536), (1536, 384))]
MOST_MACS = 20e9  # per call: beyond, float takes over a second, and the result is clear


class Constant(nn.Module):
    """A model that calls a function on its input and a matrix of its own."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], size: int) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(size, size)), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)


class Conv1D(nn.Module):
    """A stand-in for transformers.pytorch_utils.Conv1D, for machines without it; the table recognizes it by name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


class SelfAttention(nn.Module):
    """Self-attention by one nn.MultiheadAttention of four heads."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(size, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _rows(make: Callable[[int], nn.Module]) -> Callable[[int, int], Case]:
    return lambda rows, size: (make(size), (torch.randn(rows, size),))


def _sequences(kind: Callable[[int, int], nn.Module]) -> Callable[[int, int], Case]:
    return lambda rows, size: (kind(size, size), (torch.randn(STEPS, rows, size),))


def _constant(function: Callable[..., torch.Tensor]) -> Callable[[int, int], Case]:
    return _rows(lambda size: Constant(function, size))


# For each operator of the table, cases by name: what makes (float module, inputs) from (rows, size).
CASES: dict[str, dict[str, Callable[[int, int], Case]]] = {
    "linear": {
        "linear": _rows(lambda size: nn.Linear(size, size)),
        "matmul": _constant(operator.matmul),
        "mm": _constant(torch.mm),
        "addmm": _constant(lambda x, w: torch.addmm(w[0], x, w)),
        "einsum": _constant(lambda x, w: torch.einsum("...i,oi->...o", x, w)),
    },
    "transposed_linear": {"transposed_linear": _rows(lambda size: Conv1D(size, size))},
    "convolution": {  # smaller ones stay float
        "convolution": lambda rows, size: (
            nn.Conv1d(max(size, 512), max(size, 512), 1),
            (torch.randn(1, max(size, 512), rows),),
        )
    },
    "attention": {"attention": lambda rows, size: (SelfAttention(size), (torch.randn(STEPS, rows, size),))},
    "lstm": {"lstm": _sequences(nn.LSTM)},
    "rnn": {"gru": _sequences(nn.GRU), "rnn": _sequences(nn.RNN)},
    "cell": {
        "lstm_cell": _rows(lambda size: nn.LSTMCell(size, size)),
        "gru_cell": _rows(lambda size: nn.GRUCell(size, size)),
        "rnn_cell": _rows(lambda size: nn.RNNCell(size, size)),
    },
    "embedding": {"embedding": lambda rows, size: (nn.Embedding(TABLE, size), (torch.randint(TABLE, (rows,)),))},
    "embedding_bag": {  # mode sum: torch.ao's bag gives sums for every mode
        "embedding_bag": lambda rows, size: (
            nn.EmbeddingBag(TABLE, size, mode="sum"),
            (torch.randint(TABLE, (rows, STEPS)),),
        )
    },
    **STATIC,
}
MAKERS = {name: make for cases in CASES.values() for name, make in cases.items()}


def torch_ao(module: nn.Module) -> nn.Module | None:
    """Return torch.ao's dynamic form of a module, or None where it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import float_qparams_weight_only_qconfig
        from torch.ao.quantization import quantize_dynamic as quantize
        from torch.ao.quantization.quantization_mappings import get_default_dynamic_quant_module_mappings

        kinds = get_default_dynamic_quant_module_mappings()
        if type(module) not in kinds:
            return None
        is_table = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        spec = {type(module): float_qparams_weight_only_qconfig} if is_table else {type(module)}
        return quantize(nn.Sequential(module), spec)[0]


def sides(module: nn.Module, inputs: tuple[Any, ...], qconfig: QConfig = default_dynamic_qconfig) -> dict[str, Call]:
    """Return the calls to compare: modules are called directly, functions, with this qconfig, within their graph."""
    if isinstance(module, Static):
        prepared = prepare_fx(module.eval(), default_static_qconfig_mapping(), inputs)
        models = {"fxquant": convert_fx(prepared, data=[inputs]), "float": module}
    elif isinstance(module, Constant):
        mapping = QConfigMapping().set_global(qconfig)
        models = {"fxquant": convert_fx(prepare_fx(module.eval(), mapping, inputs)), "float": module}
    else:
        models = {"fxquant": quantize_dynamic(module.eval()), "float": module, "torch_ao": torch_ao(module)}
    return {name: functools.partial(model, *inputs) for name, model in models.items() if model is not None}


def macs(module: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Return the multiplications of one call: each weight with each row, if there are rows to multiply."""
    x = inputs[0]
    if isinstance(module, Static) and x.dim() == 4:
        return sum(p.numel() for p in module.parameters()) * x.numel() / x.shape[1]
    return sum(p.numel() for p in module.parameters()) * (x.numel() / x.shape[-1] if x.is_floating_point() else 0)


def cases(grid: str, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Call]]]:
    """Yield "name rows×size" and what its sides call."""
    if grid == "encoder":
        for rows, i, o in ENCODER:
            linear, inputs = nn.Linear(i, o), (torch.randn(rows, i),)
            yield f"linear {rows}x{i}x{o}", sides(linear, inputs)
        return
    for name in names:
        for rows in ROWS:
            for size in SIZES:
                module, inputs = MAKERS[name](rows, size)
                if macs(module, inputs) <= MOST_MACS:
                    yield f"{name} {rows}x{size}", sides(module, inputs)


def measure(
    calls: dict[str, Call], rounds: int, seconds: float = 0.02, clock: Callable[[], float] = time.perf_counter
) -> Times:
    """Return each side's microseconds per call, one figure per round, with the sides taking turns."""
    times: Times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            single, begin = [], time.perf_counter()
            while not single or time.perf_counter() - begin < seconds:
                start = clock()
                call()
                single.append(clock() - start)
            times[name].append(statistics.median(single) * 1e6)
    return times


def ratios(times: Times, side: str) -> list[float]:
    """Return how many times fxquant's time a side took, round by round."""
    return [theirs / ours for theirs, ours in zip(times[side], times["fxquant"], strict=True)]


def report(name: str, times: Times) -> str:
    """Return a line: fxquant's time and the other sides' ratios to it."""
    line = f"{name:28s} {statistics.median(times['fxquant']):10.1f} us"
    for side in SIDES[1:]:
        if side in times:
            found = ratios(times, side)
            line += f"   {side} {statistics.median(found):6.2f} [{min(found):.2f}–{max(found):.2f}]"
    return line


def plot(rows: dict[str, Times], path: Path) -> None:
    """Draw the ratios over the sizes: a panel for each case, a line for each number of rows, torch.ao dashed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'fxquant[tutorials]'") from error
    names = list(dict.fromkeys(name.split()[0] for name in rows))
    across = 4
    figure = Figure(figsize=(12, 2.4 * -(-len(names) // across)), layout="constrained")
    panels = figure.subplots(-(-len(names) // across), across, sharex=True, sharey=True, squeeze=False).flatten()
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(panels, names, strict=False):
        panel.set(title=name.replace("_", " "), xscale="log", yscale="log")
        panel.set_xticks(SIZES, [str(size) for size in SIZES])
        panel.set_yticks((0.5, 1, 2, 5, 10, 20), ("0.5", "1", "2", "5", "10", "20"))
        panel.minorticks_off()
        panel.axhline(1, color="black", linewidth=0.8)
        for count, color in zip(ROWS, ("tab:blue", "tab:orange", "tab:green"), strict=False):
            for side, style in (("float", "-"), ("torch_ao", "--")):
                points = [(size, rows.get(f"{name} {count}x{size}", {})) for size in SIZES]
                drawn = [(size, statistics.median(ratios(times, side))) for size, times in points if side in times]
                label = f"{side.replace('_', '.')}, {count} rows"
                panel.plot(*zip(*drawn, strict=True), style, color=color, label=label, marker=".") if drawn else None
    lines = {line.get_label(): line for panel in figure.axes for line in panel.lines if line.get_marker() == "."}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3)
    figure.supylabel("time over fxquant's, by size")
    figure.savefig(path, format="svg", metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=("sizes", "encoder"), default="sizes")
    parser.add_argument("--operators", type=lambda text: text.split(","), default=list(MAKERS), help=",".join(MAKERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="add all figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios of --grid sizes to this SVG file")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(kernel_info(), flush=True)
    results: dict[str, Times] = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text(encoding="utf-8"))["rows"]
    with torch.no_grad():
        for name, calls in cases(options.grid, options.operators) if options.rounds else ():
            results[name] = measure(calls, options.rounds)
            print(report(name, results[name]), flush=True)
    if options.json:
        content = {"kernels": str(kernel_info()), "rows": results}
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if options.plot:
        plot({name: times for name, times in results.items() if name.count("x") == 1}, options.plot)


if __name__ == "__main__":
    main()
