"""What translations build graphs with: ONNX's operators, and the model's stored tensors in the form that they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnxscript
import torch
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import ir
from onnxscript import opset21 as op

OPSET = 21
"""The opset of the files: the first whose DequantizeLinear takes 4-bit integers in blocks."""


class Model:
    """The model that is exported: its stored tensors by the names of their values in the graph.

    An ONNX value of a stored tensor, made by `store`, is made once: what two sites share is in the file once.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], ranges: Sequence[tuple[float, float]] = ()) -> None:
        self._tensors, self._ranges = tensors, iter(ranges)
        self._values: dict[tuple[Any, ...], Any] = {}

    def tensor(self, value: Any) -> torch.Tensor:
        """Return the stored tensor that a value of the graph is."""
        return self._tensors[value.name]

    def scalar(self, value: Any) -> Any:
        """Return the number that a stored tensor of one element is."""
        return self.tensor(value).item()

    def next_range(self) -> tuple[float, float]:
        """Return the measured range of the next of `bare_products`; all numbers where none is known."""
        return next(self._ranges, (-math.inf, math.inf))

    def store(self, form: str, values: Sequence[Any], make: Callable[..., Any]) -> Any:
        """Return the ONNX value of make(*tensors of the values), in a form that has a name, made once.

        make returns a tensor of torch's, or an ONNX one for dtypes that torch has not.
        """
        tensors = [self.tensor(value) for value in values]
        key = (form, *((tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in tensors))
        if key not in self._values:
            self._values[key] = constant(make(*tensors))
        return self._values[key]


def shape_of(value: Any) -> list[int]:
    """Return the shape of a weight, which is known."""
    return [int(size) for size in value.shape]


def turned(matrix: Any) -> Any:
    """Return the transpose of a stored matrix, which runtimes compute as they load: a table may have it too."""
    return op.Transpose(matrix, perm=[1, 0])


def constant(tensor: Any) -> Any:
    """Return a tensor, of torch's or ONNX's, as a value."""
    if isinstance(tensor, torch.Tensor):
        tensor = TorchTensor(tensor.detach().cpu().contiguous())
    return op.Constant(value=tensor)


def ints(*numbers: int) -> Any:
    """Return an int64 vector as a value."""
    return op.Constant(value_ints=list(numbers))


def number(value: float) -> Any:
    """Return a float32 scalar as a value."""
    return op.Constant(value_float=value)


def to_float(x: Any) -> Any:
    """Return x as float32."""
    return x if x.dtype == ir.DataType.FLOAT else cast(x, ir.DataType.FLOAT)


def cast(x: Any, dtype: Any) -> Any:
    """Return x in another dtype of ONNX's; the result knows it."""
    y = op.Cast(x, to=int(dtype))
    y.dtype = dtype
    return y


def cast_like(y: Any, x: Any) -> Any:
    """Return float32 y in the dtype of a value of the model."""
    return y if x.dtype in (None, ir.DataType.FLOAT) else cast(y, x.dtype)


def rank_of(x: Any) -> int:
    """Return how many dimensions a value of the model has."""
    return len(x.shape)


def simplify(model: Any) -> Any:
    """Return an ONNX model without what it does not need. What is computed from weights stays so: it is larger."""
    onnxscript.optimizer.optimize(model, input_size_limit=_FOLDED_BYTES, output_size_limit=_FOLDED_BYTES)
    for node in model.graph.all_nodes():  # stack traces, which name this machine's files and outweigh small models
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    return model


_FOLDED_BYTES = 64


def node(op_type: str, inputs: Sequence[Any], attributes: dict[str, Any], num_outputs: int) -> Sequence[Any]:
    """Return the outputs of an operator whose number of outputs its schema leaves open."""
    made = ir.Node(
        "", op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=num_outputs, version=OPSET
    )
    onnxscript.evaluator.default().nodes.append(made)
    outputs: Sequence[Any] = made.outputs
    return outputs


def dtype_of(dtype: torch.dtype) -> Any:
    """Return a dtype of torch's as ONNX's."""
    return _DTYPES[dtype]


_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
}


def subgraph(inputs: Sequence[Any], build: Callable[..., Sequence[Any]]) -> Any:
    """Return a graph of what build(*inputs) records; it may read values from outside of it."""
    outer = onnxscript.evaluator.default()
    inner = type(outer)(outer.opset, {})
    with onnxscript.evaluator.default_as(inner):
        outputs = build(*inputs)
    return ir.Graph(inputs, outputs, nodes=inner.nodes, name="step")


def input_of(name: str, shape: Sequence[Any] | None = None) -> Any:
    """Return a float32 input of a subgraph."""
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=None if shape is None else ir.Shape(shape))
