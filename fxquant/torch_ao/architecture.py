"""The float architecture of a model of torch.ao's.

Nothing of torch.ao is imported: its modules are recognized by name, its packed objects by the plain state that they
pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxquant.errors import TorchAoError
from fxquant.graph import edit
from fxquant.nn.fused import ConvReLU1d, ConvReLU2d, ConvReLU3d, LinearReLU
from fxquant.torch_ao.packed import state_of
from fxquant.torch_ao.static import (
    DEQUANTIZE,
    STATIC_FORMS,
    STATIC_LATER,
    Functional,
    Lifting,
    Scales,
    convolution_forms,
    note_scale,
    qparams_of,
)


def _linear(layer_type: type[nn.Linear]) -> Callable[[Any], nn.Module]:
    return lambda old: layer_type(old.in_features, old.out_features, old.bias() is not None, device="meta")


def _with(layer_type: Callable[..., nn.Module], *options: str) -> Callable[[Any], nn.Module]:
    return lambda old: layer_type(**{name: getattr(old, name) for name in options}, device="meta")


_WITH_RELU: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (ConvReLU1d, ConvReLU2d, ConvReLU3d)}
_SIZES = ("input_size", "hidden_size", "bias")
_LAYERS = (*_SIZES, "num_layers", "batch_first", "bidirectional")  # dropout is for training
_TABLE = ("num_embeddings", "embedding_dim")
_FLOAT_FORMS: dict[str, Callable[[Any], nn.Module]] = {
    "nn.quantized.dynamic.modules.linear.Linear": _linear(nn.Linear),
    "nn.intrinsic.quantized.dynamic.modules.linear_relu.LinearReLU": _linear(LinearReLU),
    "nn.quantized.dynamic.modules.rnn.LSTM": _with(nn.LSTM, *_LAYERS),
    "nn.quantized.dynamic.modules.rnn.GRU": _with(nn.GRU, *_LAYERS),
    "nn.quantized.dynamic.modules.rnn.LSTMCell": _with(nn.LSTMCell, *_SIZES),
    "nn.quantized.dynamic.modules.rnn.GRUCell": _with(nn.GRUCell, *_SIZES),
    "nn.quantized.dynamic.modules.rnn.RNNCell": _with(nn.RNNCell, *_SIZES, "nonlinearity"),
    "nn.quantized.modules.linear.Linear": _linear(nn.Linear),
    "nn.intrinsic.quantized.modules.linear_relu.LinearReLU": _linear(LinearReLU),
    "nn.quantized.modules.embedding_ops.Embedding": _with(nn.Embedding, *_TABLE),
    "nn.quantized.modules.embedding_ops.EmbeddingBag": _with(nn.EmbeddingBag, *_TABLE, "mode", "include_last_offset"),
    "quantization.stubs.QuantStub": nn.Identity,
    "quantization.stubs.DeQuantStub": nn.Identity,
    **convolution_forms(_WITH_RELU),
    **STATIC_FORMS,
}
"""How the float module is made from each module of torch.ao, by its class's name below torch.ao."""

_STATIC = {
    *STATIC_FORMS,
    *convolution_forms(_WITH_RELU),
    "nn.quantized.modules.linear.Linear",
    "nn.intrinsic.quantized.modules.linear_relu.LinearReLU",
}
"""Those of static models."""

_STATIC_CALLS = ("quantized.linear", "quantized.linear_relu")
_CALLS = {
    "quantized.linear_dynamic": nn.Linear,
    "quantized.linear_relu_dynamic": LinearReLU,
    "quantized.linear_dynamic_fp16": nn.Linear,
    "quantized.linear_relu_dynamic_fp16": LinearReLU,
    "quantized.linear": nn.Linear,
    "quantized.linear_relu": LinearReLU,
}
"""The float module that replaces the packed weight of each of torch.ao's operators in a graph."""


def architecture_of(quantized: nn.Module, scales: Scales) -> nn.Module:
    """Return the float architecture of a torch.ao model: its weights have shapes, and no data.

    scales: gets what a static one says about its values, whose architecture has marks.
    """
    return _Forms(scales).of(edit.mirror(quantized), "").eval()


def marked(model: nn.Module, state: Mapping[str, Any], scales: Scales) -> nn.Module:
    """Return a float model with marks where a state_dict of torch.ao's eager mode has scales; itself if it has none."""
    modules = dict(model.named_modules())
    found = {}
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        qparams: Any = state.get(f"{prefix}scale"), state.get(f"{prefix}zero_point")
        if all(isinstance(part, torch.Tensor) and part.numel() == 1 for part in qparams):
            is_dynamic = isinstance(module, nn.Linear) and (float(qparams[0]), int(qparams[1])) == (1.0, 0)
            found.update({} if is_dynamic else {path: qparams_of(*qparams)})
    if not found:
        return model
    root = edit.mirror(model)
    for path, module in list(root.named_modules()):
        name, prefix = type(module).__name__, f"{path}." if path else ""
        is_functional = name == "FloatFunctional"
        if path in found:
            scales.of[f"{prefix}mark" if is_functional else path] = found[path]
            scales.used |= {f"{prefix}scale", f"{prefix}zero_point"}
        if any(True for _ in module.parameters(recurse=False)) and path in found:
            scales.products.add(path)
        elif name == "DeQuantStub":
            scales.of[path] = None
        if name in ("QuantStub", "DeQuantStub") or is_functional:
            edit.swap_module(root, path, Functional() if is_functional else nn.Identity())
    return root


class _Forms:
    """Makes the float form of a mirror's modules, whose children are replaced in place."""

    def __init__(self, scales: Scales) -> None:
        self._scales = scales
        self._done: dict[int, tuple[nn.Module, nn.Module]] = {}

    def of(self, module: nn.Module, path: str) -> nn.Module:
        """Return the float form of a module."""
        if id(module) in self._done:
            return self._done[id(module)][1]
        name = f"{type(module).__module__}.{type(module).__name__}"
        result, inner = module, name.removeprefix("torch.ao.")
        if name.startswith("torch.ao.") and inner in _FLOAT_FORMS:
            result = _FLOAT_FORMS[inner](module)
            edit.carry_hooks(module, result)
            if inner == DEQUANTIZE:
                self._scales.of[path] = None
            elif inner in _STATIC:
                note_scale(module, path, self._scales)
        elif name.startswith("torch.ao.nn.intrinsic.modules.fused."):  # a float chain that torch.ao fused and left
            result = nn.Sequential(*module.children())
            edit.carry_hooks(module, result)
        elif name.startswith(("torch.ao.nn.", "torch.ao.quantization.")):
            raise TorchAoError(f"{path!r} is {name}. {STATIC_LATER}")
        else:
            for child, part in module._modules.items():
                if part is not None:
                    module._modules[child] = self.of(part, f"{path}.{child}" if path else child)
            result = self._lift(module, path) if isinstance(module, fx.GraphModule) else module
        self._done[id(module)] = (module, result)  # the old one too, so that its id is not reused
        return result

    def _lift(self, module: fx.GraphModule, path: str) -> nn.Module:
        """Return a graph whose calls of torch.ao's operators are float, of modules at the packed weights' names."""
        lifting = Lifting(module, path, self._scales)
        for node in list(module.graph.nodes):
            target = str(node.target)
            if lifting.lift(node) or node.op != "call_function" or not target.startswith("quantized."):
                continue
            if target not in _CALLS:
                raise TorchAoError(f"{node.name!r} in {path or 'the graph'} calls torch.ops.{target}. {STATIC_LATER}")
            self._lift_product(lifting, module, path, node)
        for node in reversed(module.graph.nodes):
            if node.op == "get_attr" and not node.users:
                module.graph.erase_node(node)
        return fx.GraphModule(module, module.graph, type(module).__name__)  # without torch.ao's hooks

    def _lift_product(self, lifting: Lifting, module: fx.GraphModule, path: str, node: fx.Node) -> None:
        target, operands = str(node.target), node.args
        packed: Any = operands[1]
        name = str(packed.target)
        weight, bias = state_of(getattr(module, name), name)
        outputs, inputs = weight.shape
        delattr(module, name)
        module.add_submodule(name, _CALLS[target](inputs, outputs, bias is not None, device="meta"))
        with module.graph.inserting_before(node):
            made = module.graph.call_module(name, operands[:1])
            if target in _STATIC_CALLS:
                self._scales.products.add(f"{path}.{name}" if path else name)
                made = lifting.mark(made, node.name, operands[2:4])
            node.replace_all_uses_with(made)
        module.graph.erase_node(node)
