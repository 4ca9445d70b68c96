"""Compare quantized models with the ONNX files that fxquant.to_onnx writes of them, under ONNX Runtime.

    python -m benchmarks.onnx_files [--models mlp,lstm] [--threads 1] [--rounds 5] [--seconds 0.3]

For each model: the file's size over the checkpoint's, the largest difference of the outputs relative to the largest
value, fxquant's time and ONNX Runtime's, and their ratio (median of the rounds, least and greatest), the two taking
turns. Needs onnxscript and onnxruntime. Static networks: python -m benchmarks.static --sides onnx_file,onnx_runtime.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxquant
from benchmarks.networks import make
from benchmarks.operators import measure, ratios

Example = tuple[nn.Module, tuple[torch.Tensor, ...]]


class Language(nn.Module):
    """A language model of one LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(10_000, 256), nn.LSTM(256, 256, num_layers=2)
        self.decoder = nn.Linear(256, 10_000)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return the scores of (T, B) words."""
        output, _ = self.lstm(self.table(words))
        scores: torch.Tensor = self.decoder(output)
        return scores


def mlp() -> nn.Module:
    """Return three layers, 1024 wide."""
    return nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 256))


def encoder() -> nn.Module:
    """Return an encoder of MiniLM's size."""
    layer = nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


MODELS: dict[str, Callable[[], Example]] = {
    "mlp": lambda: (mlp(), (torch.randn(16, 1024),)),
    "lstm": lambda: (Language(), (torch.randint(10_000, (25, 1)),)),
    "encoder": lambda: (encoder(), (torch.randn(1, 64, 384),)),
}
QCONFIGS = {
    "int8": fxquant.default_dynamic_qconfig,
    "int4": fxquant.int4_dynamic_qconfig,
    "float16": fxquant.float16_dynamic_qconfig,
}
NETWORKS = ("resnet18", "mobilenetv2", "dscnn")


def quantized(name: str, kind: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], list[Any] | None]:
    """Return a quantized model, an example of its inputs, and a static one's calibration data."""
    torch.manual_seed(0)
    if name not in MODELS:
        model, shape = make(name)
        data = [(torch.randn(2, *shape),) for _ in range(2)]
        prepared = fxquant.prepare_fx(model, fxquant.default_static_qconfig_mapping(), data[0])
        return fxquant.convert_fx(prepared, data=data), (data[0][0][:1],), data
    model, inputs = MODELS[name]()
    mapping = fxquant.QConfigMapping().set_global(QCONFIGS[kind])
    if any(isinstance(part, nn.Embedding) for part in model.modules()):
        mapping.set_object_type(nn.Embedding, fxquant.default_dynamic_qconfig)
    return fxquant.convert_fx(fxquant.prepare_fx(model.eval(), mapping, inputs)), inputs, None


@torch.no_grad()
def line(name: str, kind: str, options: argparse.Namespace) -> str:
    """Return a line of the table in docs/performance.md."""
    import onnxruntime

    model, inputs, data = quantized(name, kind)
    with tempfile.TemporaryDirectory() as folder:
        file, checkpoint = Path(folder) / "model.onnx", Path(folder) / "model.safetensors"
        fxquant.to_onnx(model, inputs, file, data=data)
        fxquant.save(model, checkpoint)
        size = file.stat().st_size / checkpoint.stat().st_size
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = options.threads, 3
        session = onnxruntime.InferenceSession(str(file), settings)
    feed = {session.get_inputs()[0].name: inputs[0].numpy()}
    expected, got = model(*inputs), torch.from_numpy(session.run(None, feed)[0])
    difference = float((expected - got).abs().max() / expected.abs().max())
    calls = {"fxquant": lambda: model(*inputs), "file": lambda: session.run(None, feed)}
    times = measure(calls, options.rounds, options.seconds)
    found = ratios(times, "file")
    ours, theirs = (statistics.median(times[side]) / 1e3 for side in calls)
    ratio = f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"
    return f"| {name}, {kind} | {size:.3f} | {difference:.1e} | {ours:.3g} | {theirs:.3g} | {ratio} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the models that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [*MODELS, *NETWORKS]
    parser.add_argument("--models", type=lambda text: text.split(","), default=everything, help=",".join(everything))
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(QCONFIGS), help="of dynamic models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="a side's turn (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(fxquant.kernel_info())
    for name in options.models:
        for kind in options.kinds if name in MODELS else ["static"]:
            print(line(name, kind, options), flush=True)


if __name__ == "__main__":
    main()
