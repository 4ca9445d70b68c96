"""A quantized model and what ONNX Runtime makes of its file."""

import pytest
import torch
from torch.utils import _pytree as pytree

import fxquant

REASON = "an optional package: pip install 'fxquant[onnx]' onnxruntime"


class Exported:
    """A model, written to an ONNX file and loaded by ONNX Runtime."""

    def __init__(self, quantized, example_inputs, path, **options):
        pytest.importorskip("onnxscript", reason=REASON)
        self.onnx = pytest.importorskip("onnx", reason=REASON)
        runtime = pytest.importorskip("onnxruntime", reason=REASON)
        self.quantized, self.path = quantized, path
        fxquant.to_onnx(quantized, example_inputs, path, **options)
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = 1, 3
        settings.optimized_model_filepath = f"{path}.optimized"
        self.session = runtime.InferenceSession(str(path), settings)

    def __call__(self, *inputs):
        """Return ONNX Runtime's results, in a list."""
        values = [value.numpy() for value in pytree.tree_leaves(inputs)]
        names = [value.name for value in self.session.get_inputs()]
        return [torch.from_numpy(y) for y in self.session.run(None, dict(zip(names, values, strict=True)))]

    def both(self, *inputs):
        """Return pairs of fxquant's result and ONNX Runtime's."""
        with torch.no_grad():
            expected = pytree.tree_leaves(self.quantized(*inputs))
        got = self(*inputs)
        assert [y.shape for y in got] == [y.shape for y in expected]
        return list(zip(expected, got, strict=True))

    def operators(self, optimized=False):
        """Return the file's operators by domain and name; optimized: what ONNX Runtime runs instead."""
        model = self.onnx.load(f"{self.path}.optimized" if optimized else self.path)
        return [f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph.node]


def error(expected, got):
    """Return the largest difference, relative to the largest value."""
    return float((expected - got).abs().max() / expected.abs().max())
