"""ONNX Runtime as a peer: the language model in ONNX form, quantized by ONNX Runtime's dynamic quantization."""

import logging
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

Hidden = tuple[Tensor, Tensor]
INPUTS = ("words", "hidden", "cell")
OUTPUTS = ("scores", "next_hidden", "next_cell")


class FlatState(nn.Module):
    """The model with its state as two arguments and two results, because ONNX has no nested tuples."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # When torch.onnx.export is done it gives the whole tree the wrapper's mode. New modules are in training mode,
        # which would switch on the dropout of the float side, and of torch.ao's, which shares the module.
        self.train(model.training)

    def forward(self, words: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, (hidden, cell) = self.model(words, (hidden, cell))
        return scores, hidden, cell


class OnnxRuntimeModel:
    """A callable like the model itself, computed by ONNX Runtime with int8 weights."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, words: Tensor, state: Hidden) -> tuple[Tensor, Hidden]:
        """Return the scores and the next state, as WordLanguageModel does."""
        arrays = (words.numpy(), state[0].numpy(), state[1].numpy())
        scores, hidden, cell = self.session.run(None, dict(zip(INPUTS, arrays, strict=True)))
        return torch.from_numpy(scores), (torch.from_numpy(hidden), torch.from_numpy(cell))


def export_quantized(model: nn.Module, example_inputs: tuple[Tensor, Hidden], path: Path) -> None:
    """Write the quantized ONNX model to `path`. Raises ImportError where onnx or onnxruntime is not installed."""
    import onnx  # noqa: F401  (torch.onnx.export needs it, and says so only after the export's work is done)
    from onnxruntime.quantization import QuantType, quantize_dynamic

    words, state = example_inputs
    axes = {"words": {0: "T", 1: "B"}, "hidden": {1: "B"}, "cell": {1: "B"}, "scores": {0: "T", 1: "B"}}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = Path(folder) / "float.onnx"
        names = {"input_names": list(INPUTS), "output_names": list(OUTPUTS), "dynamic_axes": axes}
        # The TorchScript exporter writes nn.LSTM as one LSTM node, which is what ONNX Runtime has an int8 kernel for.
        torch.onnx.export(FlatState(model), (words, *state), str(exported), opset_version=17, dynamo=False, **names)
        logging.disable(logging.WARNING)
        try:
            quantize_dynamic(exported, path, weight_type=QuantType.QInt8)
        finally:
            logging.disable(logging.NOTSET)
