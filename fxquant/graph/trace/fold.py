"""First pass, at its end: weights that a graph computes from constants alone are computed once.

A mask times a weight, a slice, `cat`, `stack`, a reshape, a low-rank update: what a call of the operator table takes as
its weight becomes a buffer beside the first constant it is made of, `weight_folded`. Where an input, a buffer that
forward writes to, a random number or a module with hooks has part in it, it stays as it is.
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
from fxquant.operators import Operator, find_function_row

SOURCE = "fxquant_source"
"""The key in the meta of a folded weight's node: the path of the first weight that it was made of, for mappings."""

NOTHING_KEPT = Keep()

_HOMES = (torch, torch.Tensor, F, torch.linalg, torch.special, operator)
_UNSTABLE = re.compile(
    r"(new_)?empty.*|rand.*|normal|bernoulli|multinomial|poisson|binomial|.*dropout.*|rrelu|gumbel.*"
)
_VIEWS = (
    *(
        "getattr",
        "getitem",
        "t",
        "transpose",
        "permute",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "adjoint",
        "to",
    ),
    *(
        "view",
        "view_as",
        "reshape",
        "reshape_as",
        "flatten",
        "unflatten",
        "ravel",
        "squeeze",
        "unsqueeze",
        "narrow",
        "type",
    ),
    *("select", "split", "chunk", "unbind", "tensor_split", "expand", "expand_as", "diagonal", "as_strided", "unfold"),
    *(
        "detach",
        "contiguous",
        "float",
        "double",
        "half",
        "bfloat16",
        "type_as",
        "cpu",
        "cuda",
        "real",
        "positive",
        "alias",
    ),
)
_IN_PLACE = (
    *(
        "setitem",
        "delitem",
        "iadd",
        "iand",
        "iconcat",
        "ifloordiv",
        "ilshift",
        "imatmul",
        "imod",
        "imul",
        "ior",
        "ipow",
    ),
    *("irshift", "isub", "itruediv", "ixor"),
)


def fold(
    root: nn.Module,
    graph: fx.Graph,
    operators: Sequence[Operator],
    shut: Collection[str] = (),
    keep: Keep = NOTHING_KEPT,
) -> None:
    """Replace in place each weight of a call that is computed from constants by what it comes to.

    shut: the paths of modules whose tensors may change when they are called. keep: says which tensors preserved code or
    forward may write to.
    """
    values = _Values(root, graph, shut, keep)
    done: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        row = find_function_row(operators, node.target) if node.op in ("call_function", "call_method") else None
        operand = name_operands(row, node).get(row.weights[0]) if row is not None else None
        base = peel(operand)[0]
        if not isinstance(operand, fx.Node) or not isinstance(base, fx.Node) or base.op == "get_attr":
            continue
        if base not in done:
            tensor = values.of(base)
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dim() < 2:
                continue
            done[base] = _place(root, graph, base, tensor.contiguous())
        _replace(operand, node, base, done[base])
    graph.lint()


def _place(root: nn.Module, graph: fx.Graph, base: fx.Node, tensor: torch.Tensor) -> fx.Node:
    """Return a get_attr node, before a node, of what that was found to give."""
    source = str(next(node for node in _sources(base) if _is_matrix(root, node)).target)
    path = edit.free_name(root, f"{source}_folded")
    edit.set_tensor(root, path, tensor.detach().clone())
    with graph.inserting_before(base):
        node = graph.create_node("get_attr", path)
    node.meta.update({**base.meta, SOURCE: source})
    return node


def _replace(operand: fx.Node, user: fx.Node, base: fx.Node, folded: fx.Node) -> None:
    """Let a call take its weight, by the transpositions and casts there are, of the folded one."""
    chain = []
    while operand is not base:
        chain.append(operand)
        operand = operand.args[0]  # type: ignore[assignment]
    first = chain[-1] if chain else user
    first.replace_input_with(base, folded)
    _erase(base)


def _erase(node: fx.Node) -> None:
    """Erase a node that nothing uses any more, and what fed only it."""
    if not node.users and node.op != "placeholder":
        feeders = node.all_input_nodes
        node.graph.erase_node(node)
        for feeder in feeders:
            _erase(feeder)


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the constants that a node is computed from, in the order in which it names them."""
    if node.op == "get_attr":
        yield node
    for feeder in node.all_input_nodes:
        yield from _sources(feeder)


def _is_matrix(root: nn.Module, node: fx.Node) -> bool:
    tensor = edit.get_tensor(root, str(node.target))
    return tensor is not None and tensor.dim() > 1


class _Values:
    """Computes what nodes give that depend on constants alone, the same way each time."""

    def __init__(self, root: nn.Module, graph: fx.Graph, shut: Collection[str], keep: Keep) -> None:
        self.root, self.known = root, dict[fx.Node, Any]()
        self.constant: set[fx.Node] = set()
        changing, hidden = written(root, graph), tuple(f"{path}." for path in shut)
        for node in graph.nodes:
            if node.op == "get_attr":
                tensor = edit.get_tensor(root, str(node.target))
                is_set = str(node.target) in keep.written or keep.preserved.may_write(str(node.target))
                is_fixed = tensor is not None and storage_of(tensor) not in changing and not is_set
                is_constant = is_fixed and not (hidden and str(node.target).startswith(hidden))
            else:
                feeders = node.all_input_nodes
                is_constant = bool(feeders) and self.constant.issuperset(feeders) and is_pure(node)
            if is_constant:
                self.constant.add(node)

    def of(self, node: fx.Node) -> Any:
        """Return the value of a node, None where it is no constant, or no matrix has part in it.

        None too for what depends on values so that a checkpoint's load, on the meta device, could not do it.
        """
        if node not in self.constant or not any(_is_matrix(self.root, source) for source in _sources(node)):
            return None
        with torch.no_grad():
            try:
                _compute(node, self.root, {}, on_meta=True)
            except Exception:  # whatever torch says of an operator that has no meta form
                return None
            return _compute(node, self.root, self.known)


def _compute(node: fx.Node, root: nn.Module, known: dict[fx.Node, Any], on_meta: bool = False) -> Any:
    """Return the value of a constant node; on_meta: without data."""
    if node not in known:
        if node.op == "get_attr":
            tensor = edit.get_tensor(root, str(node.target))
            assert tensor is not None, node.target
            known[node] = torch.empty_like(tensor, device="meta") if on_meta else tensor
        else:
            values = {feeder: _compute(feeder, root, known, on_meta) for feeder in node.all_input_nodes}
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            is_method = isinstance(node.target, str)
            call: Any = getattr(args[0], str(node.target)) if is_method else node.target
            known[node] = call(*args[is_method:], **kwargs)
    return known[node]


def is_pure(node: fx.Node) -> bool:
    """Return whether a node calls a function of torch's, or an operator, that writes nothing and draws nothing."""
    if node.op not in ("call_function", "call_method") or writes(node):
        return False
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    is_known = (
        hasattr(torch.Tensor, name)
        if isinstance(target, str)
        else target is getattr or any(getattr(home, name, None) is target for home in _HOMES)
    )
    return is_known and not _UNSTABLE.fullmatch(name)


def writes(node: fx.Node) -> bool:
    """Return whether a node's call writes into one of its operands, as its name, or `inplace` or `out`, says."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    if getattr(operator, name, None) is node.target:
        return name in _IN_PLACE
    return name.endswith("_") and not name.endswith("__")


def storage_of(tensor: torch.Tensor) -> int:
    """Return what tensors that share memory have in common."""
    return int(tensor.untyped_storage()._cdata)


def written(root: nn.Module, graph: fx.Graph) -> set[int]:
    """Return the storages of those constants that forward writes to, in themselves or a view of them."""
    found: set[int] = set()
    for node in filter(writes, graph.nodes):
        place = node.kwargs.get("out") or next(iter((*node.args, *node.kwargs.values())), None)
        for part in pytree.tree_leaves(place):
            while isinstance(part, fx.Node) and part.op in ("call_function", "call_method") and _may_view(part):
                part = part.args[0] if part.args else None
            is_constant = isinstance(part, fx.Node) and part.op == "get_attr"
            tensor = edit.get_tensor(root, str(part.target)) if is_constant else None
            if tensor is not None:
                found.add(storage_of(tensor))
    return found


def _may_view(node: fx.Node) -> bool:
    """Return whether what a call gives may be its first operand, or a view of it."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return writes(node) or name in _VIEWS
