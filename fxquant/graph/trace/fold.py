"""The end of the first pass: weights that a graph computes from constants alone are computed once.

A weight may be computed by a mask, a slice, `cat`, `stack`, a reshape or a low-rank update. If a call of the operator
table takes it, it becomes a buffer next to the first constant that it depends on, `weight_folded`. It stays computed if
it depends on an input, a buffer that forward writes to, a random number or a module with hooks.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxquant.graph import edit
from fxquant.graph.constants import peel
from fxquant.graph.plan.targets import name_operands
from fxquant.graph.preserve.preserve import Keep
from fxquant.operators import Operator, find_function_operator

SOURCE = "fxquant_source"
"""The key in node.meta for the path of the first weight that a folded one depends on, for mappings."""

NOTHING_KEPT = Keep()

_HOMES = (torch, torch.Tensor, F, torch.linalg, torch.special, torch.fft, operator)
_KNOWN = {id(value) for home in _HOMES for value in vars(home).values() if callable(value)} | {id(getattr)}
"""The ids of the functions that compute with tensors; the __name__ of some, as in torch.linalg, is not their name."""

_UNSTABLE = re.compile(r"(new_)?empty.*|rand.*|normal|bernoulli|multinomial|poisson|binomial|gumbel.*|fractional.*")
_IN_TRAINING = re.compile(r".*dropout.*|rrelu")
"""The names of functions that draw random numbers in training only."""

_NUMBERS = ("item", "tolist")
"""The methods that turn a tensor into Python numbers."""

_VIEWS = frozenset(
    """
    getattr getitem t transpose permute swapaxes swapdims movedim moveaxis adjoint to view view_as reshape
    reshape_as flatten unflatten ravel squeeze unsqueeze narrow type select split chunk unbind tensor_split expand
    expand_as diagonal as_strided unfold detach contiguous float double half bfloat16 type_as cpu cuda real positive
    alias
    """.split()  # noqa: SIM905
)
_IN_PLACE = frozenset(
    """
    setitem delitem iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor
    """.split()  # noqa: SIM905
)


def fold(
    root: nn.Module,
    graph: fx.Graph,
    operators: Sequence[Operator],
    shut: Collection[str] = (),
    keep: Keep = NOTHING_KEPT,
) -> None:
    """Replace, in place, each weight of a call that is computed from constants by its value.

    shut: the paths of modules whose calls may change their tensors. keep: says which tensors preserved code or forward
    may write to.
    """
    values = _Values(root, graph, shut, keep)
    done: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        operator = (
            find_function_operator(operators, node.target) if node.op in ("call_function", "call_method") else None
        )
        operand = name_operands(operator, node).get(operator.weights[0]) if operator is not None else None
        base = peel(operand)[0]
        if not isinstance(operand, fx.Node) or not isinstance(base, fx.Node) or base.op == "get_attr":
            continue
        if base not in done:
            tensor = values.of(base)
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dim() < 2:
                continue
            if 1 not in tensor.stride():  # such as .real: torch multiplies a copy in another order than ours
                continue
            done[base] = _place(root, graph, base, tensor)
        _replace(operand, node, base, done[base])
    graph.lint()


def _place(root: nn.Module, graph: fx.Graph, base: fx.Node, tensor: torch.Tensor) -> fx.Node:
    """Return a get_attr node, before `base`, for its value: a constant with the same memory, or a new buffer."""
    source = str(next(node for node in _sources(base) if _is_matrix(root, node)).target)
    named = (str(node.target) for node in _sources(base))
    path = next((name for name in named if _is_same(edit.get_tensor(root, name), tensor)), "")
    if not path:
        path = edit.free_name(root, f"{source}_folded")
        edit.set_tensor(root, path, tensor.detach().clone())  # in the same order in memory: the bits depend on it
    with graph.inserting_before(base):
        node = graph.create_node("get_attr", path)
    node.meta.update({**base.meta, SOURCE: source})
    return node


def _is_same(tensor: torch.Tensor | None, other: torch.Tensor) -> bool:
    """Return whether two tensors are the same view of the same memory."""
    if tensor is None or storage_of(tensor) != storage_of(other):
        return False
    views = [(t.dtype, t.shape, t.stride(), t.storage_offset(), t.is_neg()) for t in (tensor, other)]
    return views[0] == views[1]


def _replace(operand: fx.Node, user: fx.Node, base: fx.Node, folded: fx.Node) -> None:
    """Make a call read the folded weight, through the transpositions and casts that are in between."""
    chain = []
    while operand is not base:
        chain.append(operand)
        operand = operand.args[0]  # type: ignore[assignment]
    first = chain[-1] if chain else user
    first.replace_input_with(base, folded)
    _erase(base)


def _erase(node: fx.Node) -> None:
    """Erase a node if nothing uses it any more, and then its inputs likewise."""
    if not node.users and node.op != "placeholder":
        feeders = node.all_input_nodes
        node.graph.erase_node(node)
        for feeder in feeders:
            _erase(feeder)


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the constants that a node is computed from, in order."""
    if node.op == "get_attr":
        yield node
    for feeder in node.all_input_nodes:
        yield from _sources(feeder)


def _is_matrix(root: nn.Module, node: fx.Node) -> bool:
    tensor = edit.get_tensor(root, str(node.target))
    return tensor is not None and tensor.dim() > 1


class _Values:
    """The values of the nodes that depend on constants alone, and never vary."""

    def __init__(self, root: nn.Module, graph: fx.Graph, shut: Collection[str], keep: Keep) -> None:
        self.root, self.known = root, dict[fx.Node, Any]()
        self.constant: set[fx.Node] = set()
        changing, hidden = written(root, graph), tuple(f"{path}." for path in shut)
        self.shut = frozenset(shut)
        for node in graph.nodes:
            if node.op == "get_attr":
                tensor = edit.get_tensor(root, str(node.target))
                is_set = str(node.target) in keep.written or keep.preserved.may_write(str(node.target))
                is_fixed = tensor is not None and storage_of(tensor) not in changing and not is_set
                is_constant = is_fixed and not (hidden and str(node.target).startswith(hidden))
            else:
                feeders = node.all_input_nodes
                is_constant = bool(feeders) and self.constant.issuperset(feeders) and self.is_pure(node)
            if is_constant:
                self.constant.add(node)

    def is_pure(self, node: fx.Node) -> bool:
        """Return whether a node is pure, or calls one of torch's modules without tensors, such as a dropout.

        In eval mode, those depend on their inputs alone.
        """
        if node.op != "call_module":
            return is_pure(node)
        module = self.root.get_submodule(str(node.target))
        has_tensors = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
        is_torchs = type(module).__module__.startswith("torch.nn.modules.") and not any(True for _ in module.children())
        is_stable = not _UNSTABLE.fullmatch(type(module).__name__.lower()) and not getattr(module, "inplace", False)
        is_open = node.target not in self.shut and not module.training and "forward" not in vars(module)
        return is_torchs and is_stable and is_open and not has_tensors

    def of(self, node: fx.Node) -> Any:
        """Return the value of a node, or None if it is not constant, or does not depend on a matrix.

        Also None if it cannot be computed on the meta device, as a checkpoint's load does, because its shape depends on
        values. Other uses of Python numbers are fine.
        """
        if node not in self.constant or not any(_is_matrix(self.root, source) for source in _sources(node)):
            return None
        with torch.no_grad():
            try:
                first, second = (_compute(node, self.root, {}, number) for number in (1, 2))
            except Exception:  # whatever torch raises for an operator without a meta form
                return None
            if not isinstance(first, torch.Tensor) or first.shape != second.shape:
                return None
            return _compute(node, self.root, self.known)


def _compute(node: fx.Node, root: nn.Module, known: dict[fx.Node, Any], number: int | None = None) -> Any:
    """Return the value of a constant node. number: compute without data, with this for each Python number."""
    if node not in known:
        if node.op == "get_attr":
            tensor = edit.get_tensor(root, str(node.target))
            assert tensor is not None, node.target
            known[node] = tensor if number is None else torch.empty_like(tensor, device="meta")
        else:
            values = {feeder: _compute(feeder, root, known, number) for feeder in node.all_input_nodes}
            mapped: Any = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            args, kwargs = mapped
            if node.op == "call_method" and node.target in _NUMBERS and getattr(args[0], "is_meta", False):
                args = (torch.full(args[0].shape, number or 1, dtype=args[0].dtype, device="cpu"),)
            is_method = node.op == "call_method"
            call: Any = getattr(args[0], str(node.target)) if is_method else node.target
            call = root.get_submodule(call) if node.op == "call_module" else call
            known[node] = call(*args[is_method:], **kwargs)
    return known[node]


def is_pure(node: fx.Node) -> bool:
    """Return whether a node calls a function of torch, or an operator, without writes and random numbers."""
    if node.op not in ("call_function", "call_method") or writes(node):
        return False
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    is_known = hasattr(torch.Tensor, name) if isinstance(target, str) else id(target) in _KNOWN
    return is_known and not _UNSTABLE.fullmatch(name) and not (_IN_TRAINING.fullmatch(name) and _trains(node, name))


def _trains(node: fx.Node, name: str) -> bool:
    """Return whether a call of a dropout or rrelu may draw random numbers: its `training` is not False."""
    place, default = (3, False) if name == "rrelu" else (2, True)
    positional = node.args[place] if len(node.args) > place else default
    return node.kwargs.get("training", node.kwargs.get("train", positional)) is not False


def writes(node: fx.Node) -> bool:
    """Return whether a node's call writes into one of its operands, by its name, or its `inplace` or `out`."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    if getattr(operator, name, None) is node.target:
        return name in _IN_PLACE
    return name.endswith("_") and not name.endswith("__")


def storage_of(tensor: torch.Tensor) -> int:
    """Return the identity of a tensor's memory, on the meta device too; 0 for a tensor without a storage."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse or wrapped one
        return 0


def written(root: nn.Module, graph: fx.Graph) -> set[int]:
    """Return the storages of the constants that forward writes to, directly or through a view."""
    storages: set[int] = set()
    for node in filter(writes, graph.nodes):
        place = node.kwargs.get("out") or next(iter((*node.args, *node.kwargs.values())), None)
        for part in pytree.tree_leaves(place):
            while isinstance(part, fx.Node) and part.op in ("call_function", "call_method") and _may_view(part):
                part = part.args[0] if part.args else None
            is_constant = isinstance(part, fx.Node) and part.op == "get_attr"
            tensor = edit.get_tensor(root, str(part.target)) if is_constant else None
            if tensor is not None:
                storages.add(storage_of(tensor))
    return storages


def _may_view(node: fx.Node) -> bool:
    """Return whether the result of a call may be its first operand, or a view of it."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return writes(node) or name in _VIEWS
