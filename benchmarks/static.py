"""Time statically quantized networks: fxquant, float torch, torch.ao FX (oneDNN) and ONNX Runtime (QDQ).

    python -m benchmarks.static [--networks resnet18:1,mobilenetv2:8] [--sides float,torch_ao,onnx_runtime]
        [--threads 1] [--rounds 5] [--seconds 0.5] [--json out.json]

A network is NAME:BATCH. Inputs are channels_last, as is float's model, for torch and torch.ao; ONNX Runtime has its
own layout. Everybody's activations are uint8 and weights int8 a channel, with ranges from the same inputs. All sides
run in one process and take turns: in each round every side is called for a while, and the median call counts. Ratios
are those of a round. Sides whose packages are missing are left out, with a message. FXQUANT_ISA restricts fxquant
alone; with FXQUANT_RUNS=0 it goes from node to node in Python.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe_machine
from benchmarks.networks import NETWORKS, make
from benchmarks.operators import Call, Times, measure, ratios
from fxquant import convert_fx, default_static_qconfig_mapping, kernel_info, prepare_fx

Side = Callable[[nn.Module, Sequence[Tensor]], Callable[[Tensor], Any]]
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


SIDES: dict[str, Side] = {
    "fxquant": fxquant,
    "float": float_torch,
    "torch_ao": torch_ao,
    "onnx_runtime": onnx_runtime,
}


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
def quantized(name: str, side: str, threads: int) -> Callable[[Any], Any]:
    """Return a side's form of a network for so many threads. Raises ImportError where its package is missing."""
    assert threads == torch.get_num_threads()  # ONNX Runtime keeps the number
    model, shape = make(name)
    with _quiet():
        return SIDES[side](model, [by_pixels(torch.randn(2, *shape)) for _ in range(2)])


def calls(name: str, batch: int, sides: Sequence[str]) -> dict[str, Call]:
    """Return each side's call of a network on one batch, without the sides that are not here."""
    x, found = by_pixels(torch.randn(batch, *NETWORKS[name][1])), {}
    for side in sides:
        try:
            model = quantized(name, side, torch.get_num_threads())
        except ImportError as error:
            print(f"{side}: left out, since there is no {error.name}")
            continue
        found[side] = functools.partial(model, x.contiguous().numpy() if side == "onnx_runtime" else x)
    return found


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
    torch.set_num_threads(options.threads)
    print(kernel_info(), flush=True)
    results: dict[str, Times] = {}
    with torch.no_grad():
        for shape in options.networks:
            name, _, batch = shape.partition(":")
            called = calls(name, int(batch or 1), ["fxquant", *options.sides])
            if not results:
                print(f"\n| network, batch | {' | '.join(called)} |\n|{'---|' * (len(called) + 1)}", flush=True)
            results[shape] = measure(called, options.rounds, options.seconds)
            print(report(name, int(batch or 1), results[shape]), flush=True)
    if options.json:
        content = {"machine": describe_machine(), "microseconds": results}
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
