"""Time quantized layers and models on a CUDA device, beside torch's own: bfloat16 products, cuDNN's recurrent layers.

    python -m benchmarks.gpu [--only linear,lstm] [--rounds 20] [--json out.json]

Each case is timed as an eager call and, where a CUDA graph can hold it, as one: medians of rounds in which the sides
take turns, in one process. A ratio above 1 says how many times faster fxquant is. `call` is what an eager call costs
Python: the device is not waited for. `memory` is what torch.cuda.max_memory_allocated says of a stack of Linears.
Linear is bfloat16 on both sides (int8 weights, uint8 activations in fxquant), everything else float32. torchao's int8
dynamic quantization is a side of Linear where it is installed. The first run takes minutes: Triton compiles each
kernel in a few forms.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.machine import describe_machine
from fxquant import (
    QConfig,
    QConfigMapping,
    default_dynamic_qconfig,
    int4_dynamic_qconfig,
    kernel_info,
    quantize_dynamic,
)
from tutorials.word_language_model import WordLanguageModel

Call = Callable[[], Any]
LINEAR, ROWS, STEPS = ((4096, 4096), (4096, 11008)), (1, 16, 256, 4096), 25


@dataclass(frozen=True)
class Case:
    """A float module with an input, and its quantized twin. name: as --only takes it; what: its shape."""

    name: str
    what: str
    model: nn.Module
    inputs: tuple[Any, ...]
    quantized: nn.Module


@dataclass(frozen=True)
class Row:
    """Medians in ms: fxquant's and a side's, eager and as a CUDA graph; NaN where there is none. ratio: of the eager
    calls, graph_ratio: of the graphs.
    """

    name: str
    what: str
    side: str
    ms: float
    side_ms: float
    graph_ms: float
    side_graph_ms: float

    @property
    def cells(self) -> tuple[object, ...]:
        """Return the line of the table."""
        ratio, graph_ratio = self.side_ms / self.ms, self.side_graph_ms / self.graph_ms
        return (self.name, self.what, self.ms, f"{self.side} {self.side_ms:.3g}", ratio, self.graph_ms, graph_ratio)


def cases(only: Sequence[str] = (), shrink: int = 1) -> Iterator[Case]:
    """Yield the cases; shrink: by what sizes are divided, for tests."""
    makers = {"linear": _linears, "int4": _int4, "bert": _bert, "model": _language_model, "lstm": _lstm, "gru": _gru}
    for name, make in makers.items():
        if not only or name in only:
            yield from make(name, shrink)


def _case(name: str, what: str, model: nn.Module, inputs: tuple[Any, ...], qconfig: Any = None) -> Case:
    model = model.eval()
    return Case(name, what, model, inputs, _quantized(model, qconfig or default_dynamic_qconfig))


def _quantized(model: nn.Module, qconfig: QConfig) -> nn.Module:
    return quantize_dynamic(copy.deepcopy(model), QConfigMapping().set_global(qconfig))


def _linears(name: str, shrink: int, sizes: Any = LINEAR, rows: Any = ROWS, qconfig: Any = None) -> Iterator[Case]:
    for columns, outputs in sizes:
        model = nn.Sequential(nn.Linear(columns // shrink, outputs // shrink, bias=False, dtype=torch.bfloat16))
        for count in rows:
            x = torch.randn(count, columns // shrink, dtype=torch.bfloat16)
            yield _case(name, f"{count} x {columns} to {outputs}", model, (x,), qconfig)


def _int4(name: str, shrink: int) -> Iterator[Case]:
    yield from _linears(name, shrink, LINEAR[:1], (1, 16, 256), int4_dynamic_qconfig.with_group_size(128))


def _bert(name: str, shrink: int) -> Iterator[Case]:
    model = nn.TransformerEncoderLayer(768 // shrink, 12, 3072 // shrink, activation="gelu", batch_first=True)
    yield _case(name, "a layer, 8 x 128", model, (torch.randn(8, 128 // shrink, 768 // shrink),))


def _language_model(name: str, shrink: int) -> Iterator[Case]:
    model = WordLanguageModel(33_278 // shrink, 512 // shrink, 256 // shrink, 5).eval()
    for rows in (1, 16):
        words = torch.randint(33_278 // shrink, (STEPS, rows))
        yield _case(name, f"{STEPS} x {rows}", model, (words, model.init_hidden(rows)))


def _recurrent(name: str, shrink: int, layer: type[nn.Module]) -> Iterator[Case]:
    for size in (512, 1024):
        for rows in (1, 16, 64):
            model = nn.Sequential()
            model.add_module("layer", layer(size // shrink, size // shrink))
            yield _case(name, f"{STEPS} x {rows} x {size}", model, (torch.randn(STEPS, rows, size // shrink),))


def _lstm(name: str, shrink: int) -> Iterator[Case]:
    yield from _recurrent(name, shrink, nn.LSTM)


def _gru(name: str, shrink: int) -> Iterator[Case]:
    yield from _recurrent(name, shrink, nn.GRU)


def eager_ms(call: Call, calls: int = 10) -> float:
    """Return what a call takes, the device's work and Python's: so many one after another, then waited for."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / calls


def python_us(call: Call, calls: int = 200) -> float:
    """Return what a call takes of Python's time, the device not waited for."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    taken = time.perf_counter() - begin
    torch.cuda.synchronize()
    return 1e6 * taken / calls


def captured(call: Call) -> Call | None:
    """Return the replay of a CUDA graph of a call; None where none can hold it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        print(f"no CUDA graph: {error}", file=sys.stderr)
        torch.cuda.synchronize()
        return None
    return graph.replay


def sides_of(case: Case) -> dict[str, Call]:
    """Return the calls of a case by the names of the sides, fxquant first, on the device."""
    device = torch.device("cuda")
    inputs = torch.utils._pytree.tree_map(lambda x: x.to(device), case.inputs)
    models = {"fxquant": case.quantized.to(device), "torch": case.model.to(device)}
    if case.name == "linear":
        models |= _torchao(models["torch"])
    return {name: lambda model=model: model(*inputs) for name, model in models.items()}  # type: ignore[misc]


def _torchao(model: nn.Module) -> dict[str, nn.Module]:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return {}
    theirs = copy.deepcopy(model)
    quantize_(theirs, Int8DynamicActivationInt8WeightConfig())
    return {"torchao": theirs}


def time_case(case: Case, rounds: int) -> list[Row]:
    """Return a row for each side beside fxquant."""
    with torch.no_grad():
        calls = sides_of(case)
        for call in calls.values():
            call()
        graphs = {name: graph for name, call in calls.items() if (graph := captured(call)) is not None}
        eager: dict[str, list[float]] = {name: [] for name in calls}
        replayed: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name in calls:
                eager[name].append(eager_ms(calls[name]))
                replayed[name].append(eager_ms(graphs[name]) if name in graphs else float("nan"))
    ms = {name: statistics.median(eager[name]) for name in calls}
    graph_ms = {name: statistics.median(replayed[name]) for name in calls}
    others = [name for name in calls if name != "fxquant"]
    return [
        Row(case.name, case.what, name, ms["fxquant"], ms[name], graph_ms["fxquant"], graph_ms[name]) for name in others
    ]


def call_cost() -> dict[str, float]:
    """Return what an eager call of a small Linear costs Python, in us."""
    case = _case("call", "", nn.Sequential(nn.Linear(64, 64)), (torch.randn(2, 64),))
    with torch.no_grad():
        return {name: python_us(call) for name, call in sides_of(case).items()}


def memory() -> dict[str, float]:
    """Return the peak of the device's memory in MB: of eight Linears of 4096, float32 and quantized, and a call."""
    model = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(8))).eval()
    found = {}
    for name, one in (("float32", model), ("fxquant", _quantized(model, default_dynamic_qconfig))):
        one.to("cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            one(torch.randn(16, 4096, device="cuda"))
        found[name] = torch.cuda.max_memory_allocated() / 1e6
        one.to("cpu")
    return found


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    headers = ("case", "shape", "fxquant, ms", "other, ms", "ratio", "as a graph, ms", "ratio")
    return tabulate([row.cells for row in rows], headers=headers, tablefmt="github", floatfmt=".3g")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 where there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="linear, int4, bert, …")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    torch.zeros((), device="cuda")
    print(f"torch {torch.__version__}; {kernel_info()}")
    rows = [row for case in cases(options.only) for row in time_case(case, options.rounds)]
    more = {} if options.only else {"call_us": call_cost(), "memory_mb": memory()}
    print(table(rows))
    for name, figures in more.items():
        print(f"{name}: " + ", ".join(f"{side} {figure:.3g}" for side, figure in figures.items()))
    if options.json is not None:
        report = {"machine": describe_machine(), "rows": [asdict(row) for row in rows], **more}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
