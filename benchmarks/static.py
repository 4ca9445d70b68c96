"""Time statically quantized networks: fxquant, float torch, torch.ao FX (oneDNN) and ONNX Runtime (QDQ).

    python -m benchmarks.static [--networks resnet18:1,mobilenetv2:8] [--sides float,torch_ao,onnx_runtime,onnx_file]
        [--threads 1] [--rounds 5] [--seconds 0.5] [--json out.json]

A network is NAME:BATCH. Inputs are channels_last, as is float's model, for torch and torch.ao; ONNX Runtime has its
own layout; onnx_runtime is its quantizer's model, onnx_file ours, written by fxquant.to_onnx. Everybody's activations
are uint8 and weights int8 a channel, with ranges from the same inputs. Each side has a process of its own, and the
processes take turns, with a pause, since threads that wait for work may spin on the cores of the next side: in each
round every side is called for a while, and the median call counts. Ratios are those of a round. Sides whose packages
are missing are left out, with a message. FXQUANT_ISA restricts fxquant alone; with
FXQUANT_RUNS=0 it goes from node to node in Python.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe_machine
from benchmarks.networks import NETWORKS, make
from benchmarks.operators import Call, Times, measure, ratios
from fxquant import convert_fx, default_static_qconfig_mapping, kernel_info, prepare_fx, to_onnx

Side = Callable[[nn.Module, Sequence[Tensor]], Callable[[Tensor], Any]]
PAUSE = 0.2  # seconds, in which the threads of the side before fall asleep
SHAPES = "resnet18:1,resnet50:1,mobilenetv2:1,mobilenetv2:8,dscnn:1"


def by_pixels(x: Tensor) -> Tensor:
    """Return the input as torch's convolutions and ours like it best."""
    return x.contiguous(memory_format=torch.channels_last)


def fxquant(model: nn.Module, data: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a model quantized by fxquant. data: what it is calibrated on."""
    prepared = prepare_fx(model, default_static_qconfig_mapping(), (data[0],))
    return convert_fx(prepared, data=[(x,) for x in data])


def float_torch(model: nn.Module, _: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the float model with its weights in channels_last."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def torch_ao(model: nn.Module, data: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a model quantized by torch.ao's FX mode, for oneDNN."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx as convert
    from torch.ao.quantization.quantize_fx import prepare_fx as prepare

    torch.backends.quantized.engine = "onednn"  # type: ignore[assignment]
    prepared = prepare(model, get_default_qconfig_mapping("onednn"), (data[0],))
    for x in data:
        prepared(x)
    quantized: nn.Module = convert(prepared)
    return quantized


def onnx_runtime(model: nn.Module, data: Sequence[Tensor]) -> Callable[[Any], Any]:
    """Return a function of an array that ONNX Runtime computes. Raises ImportError where it is not installed."""
    import onnx  # noqa: F401  (the export needs it)
    import onnxruntime
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    types = {"activation_type": quantization.QuantType.QUInt8, "weight_type": quantization.QuantType.QInt8}
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("float.onnx", "inferred.onnx", "int8.onnx")]
        axes = {"x": {0: "B"}, "y": {0: "B"}}
        names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
        torch.onnx.export(model, (data[0],), paths[0], dynamo=False, opset_version=17, **names)
        quant_pre_process(paths[0], paths[1], skip_symbolic_shape=True)
        batches = iter([{"x": x.contiguous().numpy()} for x in data])

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> Any:
                return next(batches, None)

        quantization.quantize_static(*paths[1:], Reader(), per_channel=True, **types)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        session = onnxruntime.InferenceSession(paths[2], options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})


def onnx_file(model: nn.Module, data: Sequence[Tensor]) -> Callable[[Any], Any]:
    """Return a function of an array: fxquant's own model as an ONNX file. Raises ImportError without the packages."""
    import onnxruntime
    import onnxscript  # noqa: F401  (the export needs it)

    batches = [(x,) for x in data]
    with tempfile.TemporaryDirectory() as folder:
        path, sizes = os.path.join(folder, "model.onnx"), ({0: torch.export.Dim("batch", min=1, max=256)},)
        to_onnx(fxquant(model, data), batches[0], path, dynamic_shapes=sizes, data=batches, input_names=["x"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})


SIDES: dict[str, Side] = {
    "fxquant": fxquant,
    "float": float_torch,
    "torch_ao": torch_ao,
    "onnx_runtime": onnx_runtime,
    "onnx_file": onnx_file,
}
ARRAYS = ("onnx_runtime", "onnx_file")
"""The sides that take an array."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what peers say while they quantize."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@functools.cache
def quantized(name: str, side: str) -> Callable[[Any], Any]:
    """Return a side's form of a network. Raises ImportError where its package is missing."""
    model, shape = make(name)
    with _quiet():
        return SIDES[side](model, [by_pixels(torch.randn(2, *shape)) for _ in range(2)])


def call_of(side: str, name: str, batch: int) -> Call:
    """Return a side's call of a network on one batch. Raises ImportError where its package is missing."""
    x = by_pixels(torch.randn(batch, *NETWORKS[name][1]))
    return functools.partial(quantized(name, side), x.contiguous().numpy() if side in ARRAYS else x)


@torch.no_grad()
def serve(pipe: Connection, side: str, threads: int) -> None:
    """Answer each (network, batch, seconds) with the median microseconds of a side's calls, or with what is missing.

    The answer is (time, ""), or (0.0, the package's name). None ends it.
    """
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError):  # of a benchmark that was stopped
        while (asked := pipe.recv()) is not None:
            name, batch, seconds = asked
            try:
                pipe.send((measure({side: call_of(side, name, batch)}, 1, seconds)[side][0], ""))
            except ImportError as error:
                pipe.send((0.0, error.name or str(error)))


def start(side: str, threads: int) -> Connection:
    """Return the end of a pipe to a side's own process, which serves it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs, side, threads), daemon=True).start()
    return ours


def take_turns(pipes: dict[str, Connection], name: str, batch: int, rounds: int, seconds: float) -> Times:
    """Return each side's microseconds of a round. Sides that are not here leave the pipes, with a message."""
    times: Times = {side: [] for side in pipes}
    for turn in range(rounds + 1):  # the first one prepares
        for side, pipe in list(pipes.items()):
            time.sleep(PAUSE if turn else 0)
            pipe.send((name, batch, seconds if turn else 0.0))
            found, missing = pipe.recv()
            if missing:
                print(f"{side}: left out, since there is no {missing}")
                pipes.pop(side).send(None)
                del times[side]
            elif turn:
                times[side].append(found)
    return times


def report(name: str, batch: int, times: Times) -> str:
    """Return a line of the table in docs/performance.md: fxquant's milliseconds, and the others' ratios to it."""
    cells = [f"{name}, {batch}", f"{statistics.median(times['fxquant']) / 1e3:.3g}"]
    for side in [side for side in times if side != "fxquant"]:
        found = ratios(times, side)
        cells.append(f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})")
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the networks that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=lambda text: text.split(","), default=SHAPES.split(","), help=SHAPES)
    parser.add_argument("--sides", type=lambda text: text.split(","), default=list(SIDES)[1:], help="the peers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="a side's turn (%(default)s)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    print(kernel_info(), f"\n{options.threads} thread{'s' if options.threads > 1 else ''} a side", flush=True)
    pipes = {side: start(side, options.threads) for side in ("fxquant", *options.sides)}
    results: dict[str, Times] = {}
    for shape in options.networks:
        name, _, batch = shape.partition(":")
        times = take_turns(pipes, name, int(batch or 1), options.rounds, options.seconds)
        if not results:
            print(f"\n| network, batch | {' | '.join(pipes)} |\n|{'---|' * (len(pipes) + 1)}", flush=True)
        results[shape] = times
        print(report(name, int(batch or 1), times), flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    if options.json:
        content = {"machine": describe_machine(), "microseconds": results}
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
