"""Programs of torch.export: their ATen calls become the modules and functions that the operator table knows.

`torch.export.load(path).module()` is a graph of torch.ops.aten.* over bare tensors. Where a call's tensors lie side by
side under the names that a module of torch.nn gives them (lstm.weight_ih_l0, lstm.weight_hh_l0, …), that module stands
at their path again, as in the model that was exported: mappings name it, batch norms and ReLUs fuse, and it is a site.
Other calls become the functions of torch that they are. What has no form of either kind is left alone, and reported as
any call is that reads a weight and is not quantized.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant.errors import ModelStateError
from fxquant.graph import call, edit
from fxquant.graph.constants import constant_of
from fxquant.graph.preserve.attributes import Part
from fxquant.graph.trace.tracer import SCOPE
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
"""What takes an operator's operands as they stand."""

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
_TRAINING = {
    _ATEN.dropout.default: "train",
    _ATEN.batch_norm.default: "training",
    _ATEN.native_dropout.default: "train",
    _ATEN._native_batch_norm_legit.default: "training",
    _ATEN._native_batch_norm_legit_functional.default: "training",
}
"""Operators whose operand of this name says that they run as in training."""


def is_exported(model: Any) -> bool:
    """Return whether a module is what an exported program's .module() gives, whose mode cannot be set."""
    return isinstance(model, fx.GraphModule) and any(
        k.__module__.startswith("torch.export.") for k in type(model).__mro__
    )


def adopt(model: Any) -> Any:
    """Return an exported program's module as a plain graph of torch's modules and functions; any other as it is.

    It shares the tensors. Raises ModelStateError for a program that was exported in training mode.
    """
    if not is_exported(model):
        return model
    plain = fx.GraphModule(model, copy.deepcopy(model.graph), type(model).__name__)
    _guard_sizes(plain, model.range_constraints)
    for node in plain.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            _refuse_training(node)
    raise_calls(plain, plain.graph)
    plain.graph.lint()
    plain.recompile()
    edit.carry_hooks(model, plain)
    for key, hook in [*plain._forward_hooks.items(), *plain._forward_pre_hooks.items()]:
        if hook.__module__.startswith("torch.export"):  # it reads what only its own module has
            for name in edit.HOOKS:
                getattr(plain, name).pop(key, None)
    return plain.train(False)


def raise_calls(root: nn.Module, graph: fx.Graph) -> None:
    """Let the calls of ATen operators in a graph over a root be the modules and functions of torch that they are."""
    calls = [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    for node in calls:
        _raise(root, node)
    if calls:
        edit.erase_dead(graph, [node for node in graph.nodes if node.op == "get_attr"])


def give_scopes(graph: fx.Graph) -> None:
    """Let the calls of a model that came as a graph belong to the path of the weight that they take, for a mapping."""
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and not node.meta.get(SCOPE):
            constants = [constant_of(operand) for operand in node.all_input_nodes]
            paths = [str(constant.source.target).rpartition(".")[0] for constant in constants if constant is not None]
            node.meta[SCOPE] = next(iter(paths), "")


def _guard_sizes(plain: fx.GraphModule, ranges: Any) -> None:
    """Put checks of the inputs' sizes that we can word, and pickle, in the place of torch's guards."""
    for node in [node for node in plain.graph.nodes if node.op == "call_module" and node.target == "_guards_fn"]:
        plain.graph.erase_node(node)
    inputs = [node for node in plain.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        if isinstance(node.meta.get("val"), torch.Tensor):
            sizes = tuple(_range(size, ranges) for size in node.meta["val"].shape)
            with plain.graph.inserting_after(inputs[-1]):
                plain.graph.call_function(call.check_sizes, (node, str(node.target), sizes))


def _range(size: Any, ranges: Any) -> tuple[int, int | None]:
    """Return the least and the greatest size that an input's dimension may have; None: any."""
    if isinstance(size, int):
        return size, size
    known = (ranges or {}).get(size.node.expr)
    low, high = (None, None) if known is None else (known.lower, known.upper)
    bounds: list[Any] = [low, high]
    least, greatest = (int(end) if getattr(end, "is_Integer", False) else None for end in bounds)
    return least or 0, greatest


def _refuse_training(node: fx.Node) -> None:
    operands = _operands(node)
    if operands.get(_TRAINING.get(node.target, "")) is True and operands.get("p") != 0.0:
        raise ModelStateError(
            f"this program was exported in training mode: {node.name} is {node.target} as it is in training; export "
            "model.eval() instead"
        )


def _operands(node: fx.Node) -> dict[str, Any]:
    """Return an operator's operands by the names of its schema, defaults included."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False))
    return {a.name: given.get(a.name, node.kwargs.get(a.name, a.default_value)) for a in arguments}


def _raise(root: nn.Module, node: fx.Node) -> None:
    """Let one call of an ATen operator be the module or function of torch that it is, if there is one."""
    operands = _operands(node)
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
    given = {name: operands[name] for name in ("weight", "bias") if operands[name] is not None}

    def make(weight: torch.Tensor, bias: Any = None) -> nn.Module:
        return nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")

    return _place(root, node, given, make, (operands["input"],))


def _as_embedding(root: nn.Module, node: fx.Node, operands: dict[str, Any]) -> None:
    def make(weight: torch.Tensor) -> nn.Module:
        return nn.Embedding(weight.shape[0], weight.shape[1], device="meta")

    if not _place(root, node, {"weight": operands["weight"]}, make, (operands["indices"],)):
        node.target, node.args, node.kwargs = F.embedding, (operands["indices"], operands["weight"]), {}


def _as_bags(node: fx.Node, operands: dict[str, Any]) -> None:
    """Let F.embedding_bag, which gives the bags alone, stand for an operator that gives them as the first of four."""
    parts = list(node.users)
    if all(part.target is operator.getitem and (part.args[1] == 0 or not part.users) for part in parts):
        mode, padding = _MODES[operands["mode"]], operands["padding_idx"]
        same = {name: operands[name] for name in ("per_sample_weights", "include_last_offset")}
        padding_idx = None if padding is None or padding < 0 else padding
        node.kwargs = {"offsets": operands["offsets"], "mode": mode, "padding_idx": padding_idx, **same}
        node.target, node.args = F.embedding_bag, (operands["indices"], operands["weight"])
        for part in parts:
            part.replace_all_uses_with(node)
            node.graph.erase_node(part)


def _as_convolution(root: nn.Module, node: fx.Node, operands: dict[str, Any]) -> None:
    given = {name: operands[name] for name in ("weight", "bias") if operands[name] is not None}

    def make(weight: torch.Tensor, bias: Any = None) -> nn.Module | None:
        rank, groups = weight.dim() - 2, operands["groups"]
        if operands.get("transposed") or rank not in (1, 2, 3):
            return None
        sizes = {name: _whole(operands[name], rank) for name in ("stride", "padding", "dilation")}
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        sizes.update(groups=groups, bias=bias is not None, device="meta")
        return kind(weight.shape[1] * groups, weight.shape[0], weight.shape[2:], **sizes)  # type: ignore[no-any-return]

    _place(root, node, given, make, (operands["input"],))


def _whole(size: Any, rank: int) -> Any:
    """Return a size in each dimension: ATen lets one stand for all."""
    return size if isinstance(size, str) else tuple(size) * (rank if len(size) == 1 else 1)


def _as_layer(root: nn.Module, node: fx.Node, operands: dict[str, Any], kind: type[nn.RNNBase]) -> None:
    """Let a recurrent layer stand for an operator, whose results an nn.LSTM gives as (output, (h, c))."""
    given = {str(param.target).rpartition(".")[2]: param for param in operands["params"] if isinstance(param, fx.Node)}

    def make(**params: torch.Tensor) -> nn.Module | None:
        projection = params.get("weight_hr_l0")
        options: dict[str, Any] = {"nonlinearity": "relu"} if node.target is _ATEN.rnn_relu.input else {}
        options.update({} if projection is None else {"proj_size": projection.shape[0]})
        for name, operand in (("bias", "has_biases"), ("num_layers", "num_layers")):
            options[name] = operands[operand]
        options.update({name: operands[name] for name in ("bidirectional", "batch_first")})
        first = params.get("weight_ih_l0")
        if first is None:
            return None
        recurrent: Any = kind
        layer: nn.RNNBase = recurrent(first.shape[1], first.shape[0] // _GATES[kind], device="meta", **options)
        return layer if layer._flat_weights_names == list(params) else None  # which may be shared, or in another order

    is_lstm, users = kind is nn.LSTM, list(node.users)
    if any(user.target is not operator.getitem for user in users):
        return
    states = tuple(operands["hx"]) if is_lstm else operands["hx"]
    if _place(root, node, given, make, (operands["input"], states)) and is_lstm:
        for user in users:
            index = user.args[1]
            if index != 0:
                with node.graph.inserting_before(user):
                    pair = node.graph.call_function(operator.getitem, (node, 1))
                user.args = (pair, int(str(index)) - 1)


def _as_cell(root: nn.Module, node: fx.Node, operands: dict[str, Any], kind: type[nn.RNNCellBase]) -> None:
    names = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
    given = {name: operands[operand] for name, operand in names.items() if operands[operand] is not None}

    def make(weight_ih: torch.Tensor, weight_hh: torch.Tensor, **biases: torch.Tensor) -> nn.Module:
        options: dict[str, Any] = {"nonlinearity": "relu"} if node.target is _ATEN.rnn_relu_cell.default else {}
        sizes = weight_ih.shape[1], weight_hh.shape[1]
        cell: Any = kind
        return cell(*sizes, bias=bool(biases), device="meta", **options)  # type: ignore[no-any-return]

    states = tuple(operands["hx"]) if kind is nn.LSTMCell else operands["hx"]
    _place(root, node, given, make, (operands["input"], states))


def _as_product(root: nn.Module, node: fx.Node, operands: dict[str, Any]) -> None:
    """Let a product with a matrix that is expanded to the batch say so: decompositions write x @ weight like that."""
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


def _place(
    root: nn.Module,
    node: fx.Node,
    given: dict[str, Any],
    make: Callable[..., nn.Module | None],
    args: Sequence[Any],
) -> bool:
    """Let a node call the module that holds its tensors under their names, made where it does not stand yet.

    given: the operands that are the module's tensors, by its names for them. Returns whether there is such a module:
    its tensors are parameters, all that stand at one path.
    """
    paths = {str(part.target).rpartition(".")[0] for part in given.values() if getattr(part, "op", "") == "get_attr"}
    names_fit = all(str(getattr(part, "target", "")).rpartition(".")[2] == name for name, part in given.items())
    path = paths.pop() if len(paths) == 1 else ""
    if not path or not names_fit or any(getattr(part, "op", "") != "get_attr" for part in given.values()):
        return False
    holder = root.get_submodule(path)
    tensors = dict(holder.named_parameters(recurse=False, remove_duplicate=False))
    if tensors.keys() != given.keys() or any(True for _ in holder.children()) or any(True for _ in holder.buffers()):
        return False
    module = make(**{name: tensors[name] for name in given})
    if module is None or (type(holder) not in (nn.Module, Part) and repr(holder) != repr(module)):
        return False
    if type(holder) in (nn.Module, Part):
        for name, tensor in tensors.items():
            setattr(module, name, tensor)
        edit.swap_module(root, path, module.train(False))
    node.op, node.target, node.args, node.kwargs = "call_module", path, tuple(args), {}
    return True
