"""Calls of ATen operators become the modules and functions of torch that the operator table knows.

`torch.export.load(path).module()` is a graph of torch.ops.aten.* over bare tensors. If a call's tensors lie side by
side under the names that a module of torch.nn gives them (lstm.weight_ih_l0, lstm.weight_hh_l0, …), that module is put
at their path again, as in the exported model: mappings can name it, batch norms and ReLUs are fused, and it is a site.
Other calls become functions of torch. A call without either form is left as it is, and reported like any call that
reads a weight and is not quantized.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant.graph import edit
from fxquant.graph.constants import constant_of
from fxquant.graph.preserve.attributes import Part
from fxquant.graph.trace.aten_values import lift_value
from fxquant.nn.fused import expanded_bmm

_ATEN: Any = torch.ops.aten

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    _ATEN.linear.default: F.linear,
    _ATEN.matmul.default: torch.matmul,
    _ATEN.mm.default: torch.mm,
    _ATEN.addmm.default: torch.addmm,
    _ATEN.relu.default: torch.relu,
    _ATEN.t.default: torch.t,
    _ATEN.transpose.int: torch.transpose,
    _ATEN.permute.default: torch.permute,
    _ATEN.detach.default: torch.detach,
}
"""Functions that take an operator's operands as they are."""

_LAYERS: dict[Any, type[nn.RNNBase]] = {
    _ATEN.lstm.input: nn.LSTM,
    _ATEN.gru.input: nn.GRU,
    _ATEN.rnn_tanh.input: nn.RNN,
    _ATEN.rnn_relu.input: nn.RNN,
}
_CELLS: dict[Any, type[nn.RNNCellBase]] = {
    _ATEN.lstm_cell.default: nn.LSTMCell,
    _ATEN.gru_cell.default: nn.GRUCell,
    _ATEN.rnn_tanh_cell.default: nn.RNNCell,
    _ATEN.rnn_relu_cell.default: nn.RNNCell,
}
_CONVOLUTIONS = (
    *(_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default),
    *(_ATEN.conv1d.padding, _ATEN.conv2d.padding, _ATEN.conv3d.padding),
    _ATEN.convolution.default,
)
_GATES: dict[type[nn.Module], int] = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
_MODES = ("sum", "mean", "max")


def lift_calls(root: nn.Module, graph: fx.Graph) -> None:
    """Replace the calls of ATen operators in a graph by the modules and functions of torch that they stand for."""
    calls = [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    for node in calls:
        _lift(root, node, operands_of(node))
    for node in [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]:
        lift_value(root, node, operands_of(node))
    if calls:
        edit.erase_dead(graph, [node for node in graph.nodes if node.op == "get_attr"])


def operands_of(node: fx.Node) -> dict[str, Any]:
    """Return the operands of an ATen operator by the names in its schema, defaults included."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    positional = dict(zip((argument.name for argument in arguments), node.args, strict=False))
    return {a.name: positional.get(a.name, node.kwargs.get(a.name, a.default_value)) for a in arguments}


def _lift(root: nn.Module, node: fx.Node, operands: dict[str, Any]) -> None:
    """Replace one call, if it stands for a module or function of torch."""
    if node.target is _ATEN.linear.default and _as_linear(root, node, operands):
        return
    if node.target in _FUNCTIONS:
        node.target = _FUNCTIONS[node.target]
    elif node.target in _CONVOLUTIONS:
        _as_convolution(root, node, operands)
    elif node.target in _LAYERS:
        _as_layer(root, node, operands, _LAYERS[node.target])
    elif node.target in _CELLS:
        _as_cell(root, node, operands, _CELLS[node.target])
    elif node.target is _ATEN.embedding.default:
        _as_embedding(root, node, operands)
    elif node.target in (_ATEN.embedding_bag.padding_idx, _ATEN._embedding_bag.default):
        _as_bags(node, operands)
    elif node.target is _ATEN.einsum.default:
        node.target, node.args, node.kwargs = torch.einsum, (operands["equation"], *operands["tensors"]), {}
    elif node.target is _ATEN.bmm.default:
        _as_product(root, node, operands)


def _as_linear(root: nn.Module, node: fx.Node, operands: dict[str, Any]) -> bool:
    def make(weight: torch.Tensor, bias: Any = None) -> nn.Module:
        return nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")

    return _place(root, node, _tensors(operands, "weight", "bias"), make, (operands["input"],))


def _as_embedding(root: nn.Module, node: fx.Node, operands: dict[str, Any]) -> None:
    def make(weight: torch.Tensor) -> nn.Module:
        return nn.Embedding(weight.shape[0], weight.shape[1], device="meta")

    if not _place(root, node, _tensors(operands, "weight"), make, (operands["indices"],)):
        node.target, node.args, node.kwargs = F.embedding, (operands["indices"], operands["weight"]), {}


def _as_bags(node: fx.Node, operands: dict[str, Any]) -> None:
    """Replace an operator by F.embedding_bag, which gives only the bags, the first of the operator's four results."""
    parts = list(node.users)
    if all(part.target is operator.getitem and (part.args[1] == 0 or not part.users) for part in parts):
        mode, padding = _MODES[operands["mode"]], operands["padding_idx"]
        same = {name: operands[name] for name in ("offsets", "per_sample_weights", "include_last_offset")}
        node.kwargs = {"mode": mode, "padding_idx": None if padding is None or padding < 0 else padding, **same}
        node.target, node.args = F.embedding_bag, (operands["indices"], operands["weight"])
        for part in parts:
            part.replace_all_uses_with(node)
            node.graph.erase_node(part)


def _as_convolution(root: nn.Module, node: fx.Node, operands: dict[str, Any]) -> None:
    def make(weight: torch.Tensor, bias: Any = None) -> nn.Module | None:
        rank, groups = weight.dim() - 2, operands["groups"]
        if operands.get("transposed") or rank not in (1, 2, 3):
            return None
        sizes = {name: _whole(operands[name], rank) for name in ("stride", "padding", "dilation")}
        convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        sizes.update(groups=groups, bias=bias is not None, device="meta")
        return convolution(weight.shape[1] * groups, weight.shape[0], weight.shape[2:], **sizes)  # type: ignore[no-any-return]

    _place(root, node, _tensors(operands, "weight", "bias"), make, (operands["input"],))


def _whole(size: Any, rank: int) -> Any:
    """Return a size for each dimension: in ATen, one may stand for all."""
    return size if isinstance(size, str) else tuple(size) * (rank if len(size) == 1 else 1)


def _as_layer(root: nn.Module, node: fx.Node, operands: dict[str, Any], layer_type: Any) -> None:
    """Replace an operator by a recurrent layer; an nn.LSTM gives its results as (output, (h, c))."""
    params = {str(param.target).rpartition(".")[2]: param for param in operands["params"] if isinstance(param, fx.Node)}

    def make(**params: torch.Tensor) -> nn.Module | None:
        first, projection = params.get("weight_ih_l0"), params.get("weight_hr_l0")
        if first is None:
            return None
        options = {name: operands[name] for name in ("num_layers", "bidirectional", "batch_first")}
        options.update({"nonlinearity": "relu"} if node.target is _ATEN.rnn_relu.input else {})
        options.update({} if projection is None else {"proj_size": projection.shape[0]})
        sizes = first.shape[1], first.shape[0] // _GATES[layer_type]
        layer: nn.RNNBase = layer_type(*sizes, bias=operands["has_biases"], device="meta", **options)
        return layer if layer._flat_weights_names == list(params) else None  # some may be shared, or in another order

    users = list(node.users)
    if any(user.target is not operator.getitem for user in users):
        return
    is_lstm = layer_type is nn.LSTM
    states = tuple(operands["hx"]) if is_lstm else operands["hx"]
    if _place(root, node, params, make, (operands["input"], states)) and is_lstm:
        for user in users:
            index = user.args[1]
            if index != 0:
                with node.graph.inserting_before(user):
                    pair = node.graph.call_function(operator.getitem, (node, 1))
                user.args = (pair, int(str(index)) - 1)


def _as_cell(root: nn.Module, node: fx.Node, operands: dict[str, Any], cell_type: Any) -> None:
    names = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
    tensors = {name: operands[operand] for name, operand in names.items() if operands[operand] is not None}

    def make(weight_ih: torch.Tensor, weight_hh: torch.Tensor, **biases: torch.Tensor) -> nn.Module:
        options = {"nonlinearity": "relu"} if node.target is _ATEN.rnn_relu_cell.default else {}
        sizes = weight_ih.shape[1], weight_hh.shape[1]
        return cell_type(*sizes, bias=bool(biases), device="meta", **options)  # type: ignore[no-any-return]

    states = tuple(operands["hx"]) if cell_type is nn.LSTMCell else operands["hx"]
    _place(root, node, tensors, make, (operands["input"], states))


def _as_product(root: nn.Module, node: fx.Node, operands: dict[str, Any]) -> None:
    """Replace a product with a matrix that is expanded to the batch: decompositions write x @ weight like that."""
    matrix, shape = operands["mat2"], getattr(operands["mat2"].meta.get("val"), "shape", ())
    above = []  # the nodes that expand it
    while isinstance(matrix, fx.Node) and matrix.target in (_ATEN.view.default, _ATEN.expand.default):
        above.append(matrix)
        matrix = matrix.args[0]
    constant = constant_of(matrix)
    tensor = None if constant is None else edit.get_tensor(root, str(constant.source.target))
    if constant is None or tensor is None or tensor.dim() != 2 or not above:
        return
    if tuple(shape[1:]) == tuple(tensor.t().shape if constant.is_transposed else tensor.shape):
        node.target, node.args = expanded_bmm, (operands["self"], matrix)
        for feeder in above:
            if not feeder.users:
                node.graph.erase_node(feeder)


def _tensors(operands: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the operands of these names, without those that are None."""
    return {name: operands[name] for name in names if operands[name] is not None}


def _place(
    root: nn.Module, node: fx.Node, tensors: dict[str, Any], make: Callable[..., nn.Module | None], args: Sequence[Any]
) -> bool:
    """Call the module that holds a call's tensors under their names; put one that `make` gives there if there is none.

    tensors: the operands that are the module's tensors, by its names for them. Returns whether there is such a module:
    the operands must be parameters, and all the tensors at one path.
    """
    if any(getattr(operand, "op", "") != "get_attr" for operand in tensors.values()):
        return False
    places = {name: str(operand.target).rpartition(".") for name, operand in tensors.items()}
    path, *others = {place[0] for place in places.values()} or {""}
    if not path or others or any(place[2] != name for name, place in places.items()):
        return False
    holder = root.get_submodule(path)
    parameters = dict(holder.named_parameters(recurse=False, remove_duplicate=False))
    has_more = any(True for _ in holder.children()) or any(True for _ in holder.buffers())
    if parameters.keys() != tensors.keys() or has_more:
        return False
    module = make(**{name: parameters[name] for name in tensors})
    is_bare = type(holder) in (nn.Module, Part)
    if module is None or not (is_bare or repr(holder) == repr(module)):
        return False
    if is_bare:
        for name, parameter in parameters.items():
            setattr(module, name, parameter)
        edit.swap_module(root, path, module.train(False))
    node.op, node.target, node.args, node.kwargs = "call_module", path, tuple(args), {}
    return True
