"""Constants in a graph: a parameter or buffer, or its transpose, or a cast of it, which are as constant."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

_SWAPS = ("transpose", "swapaxes", "swapdims", "movedim", "moveaxis")
_TURNS = ("t", "adjoint")  # the conjugate of a real number is the number
_ATTRIBUTES = {"T": True, "mT": True, "H": True, "mH": True, "data": False}
_SAME = ("detach", "contiguous")

_KINDS = ("dtype", "device", "layout", "is_cuda")
_SIZES = ("shape", "ndim")
_SIZERS = ("size", "dim", "ndimension", "numel", "nelement")
_MAKERS = ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
_LIKES = {"zeros_like": "new_zeros", "ones_like": "new_ones", "empty_like": "new_empty", "full_like": "new_full"}
_LIKENERS = ("to", "type_as")
_CASTS = ("float", "double", "half", "bfloat16")


class Constant(NamedTuple):
    """A constant in a graph: the get_attr node of a tensor, whether it is that matrix's transpose, and casts of it.

    casts: the nodes that give it in another floating-point dtype, perhaps an input's (w.to(x.dtype)), in their order.
    """

    source: fx.Node
    is_transposed: bool
    casts: tuple[fx.Node, ...] = ()


def constant_of(operand: Any) -> Constant | None:
    """Return the constant behind an operand's transpositions and casts, or None."""
    base, is_transposed, casts = peel(operand)
    return Constant(base, is_transposed, casts) if isinstance(base, fx.Node) and base.op == "get_attr" else None


def peel(operand: Any) -> tuple[Any, bool, tuple[fx.Node, ...]]:
    """Return what is transposed and cast to give an operand, whether it is transposed, and the casts."""
    is_transposed = False
    casts: list[fx.Node] = []
    while True:
        is_turned = is_transposition(operand)
        if is_turned is None and not is_cast(operand):
            return operand, is_transposed, tuple(reversed(casts))
        if is_turned is None:
            casts.append(operand)
        operand, is_transposed = operand.args[0], is_transposed != bool(is_turned)


def method_of(node: Any) -> str:
    """Return the name of the tensor method that a node calls, also as a function (torch.t), or ""."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    if isinstance(node.target, str):
        return node.target
    name = getattr(node.target, "__name__", "")
    is_torchs = any(getattr(home, name, None) is node.target for home in (torch, torch.Tensor))
    return name if is_torchs else ""


def is_transposition(operand: Any) -> bool | None:
    """Return whether a node gives a matrix transposed (w.t(), w.T, torch.transpose(w, 0, 1), …), or as it is.

    As it is: w.contiguous(), w.detach(), w.data, w.permute(0, 1). None for anything else.
    """
    if not isinstance(operand, fx.Node) or not operand.args or operand.op not in ("call_function", "call_method"):
        return None
    if operand.target is getattr:
        return _ATTRIBUTES.get(str(operand.args[1]))
    name = method_of(operand)
    if name in _SAME:
        return False
    dims = pytree.tree_leaves((operand.args[1:], operand.kwargs))
    if not all(isinstance(dim, int) and -2 <= dim < 2 for dim in dims):
        return None
    order = [dim % 2 for dim in dims]
    if name == "permute" and sorted(order) == [0, 1]:
        return bool(order == [1, 0])
    if name in _SWAPS and len(order) == 2:
        return bool(order[0] != order[1])
    return True if name in _TURNS else None


def is_cast(operand: Any) -> bool:
    """Return whether a node gives a tensor in another floating-point dtype, a fixed one or another tensor's.

    w.float(), w.to(torch.float16), w.to(x.dtype), w.to(x), w.type_as(x), w.to(x.device, x.dtype).
    """
    name = method_of(operand)
    if name in _CASTS:
        return len(operand.args) == 1
    if name not in (*_LIKENERS, "type") or not operand.args or not isinstance(operand.args[0], fx.Node):
        return False
    named = (part for key, part in operand.kwargs.items() if key in ("dtype", "device", "other"))
    wanted = [*operand.args[1:], *named]
    return bool(wanted) and all(_is_kind(part) for part in wanted)


def _is_kind(part: Any) -> bool:
    """Return whether an argument of `.to` is a floating-point dtype or taken from another tensor."""
    if isinstance(part, torch.dtype):
        return part.is_floating_point
    return isinstance(part, (fx.Node, bool))


def asks_kind(node: fx.Node, operand: fx.Node) -> bool:
    """Return whether a node uses an operand's shape, dtype or device, but not its values: w.device, w.new_zeros(3),
    zeros_like(w), x.to(w).
    """
    if node.target is getattr:
        return node.args[1] in (*_KINDS, *_SIZES)
    name = method_of(node)
    place = 0 if name in (*_MAKERS, *_SIZERS, *_LIKES) else 1 if name in _LIKENERS else None
    return [i for i, arg in enumerate(node.args) if arg is operand] == [place] and operand not in node.kwargs.values()


def free_of_size(node: fx.Node, shape: torch.Size) -> None:
    """Insert the sizes into a node that `asks_kind` of a tensor of this shape, so that it needs only the tensor's dtype
    and device. Then an empty tensor may take its place.
    """
    name = method_of(node)
    if name in _LIKES:
        rest = {key: part for key, part in node.kwargs.items() if key != "memory_format"}
        node.op, node.target, node.kwargs = "call_method", _LIKES[name], rest
        node.args = (node.args[0], tuple(shape), *node.args[1:])
    elif name in _SIZERS or (node.target is getattr and node.args[1] in _SIZES):
        like = torch.empty(shape, device="meta")
        value = getattr(like, name)(*node.args[1:], **node.kwargs) if name else getattr(like, str(node.args[1]))
        value = tuple(value) if isinstance(value, torch.Size) else value
        for user in list(node.users):
            user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: value if n is node else n)
        node.graph.erase_node(node)


def transpose(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return a new node, where the graph inserts now, that transposes a matrix."""
    return graph.call_method("t", (node,))


def recast(graph: fx.Graph, node: fx.Node, casts: tuple[fx.Node, ...]) -> fx.Node:
    """Return a new node, where the graph inserts now, that casts another as some casts do."""
    for cast in casts:
        node = graph.create_node(cast.op, cast.target, (node, *cast.args[1:]), dict(cast.kwargs))
        node.meta.update(cast.meta)
    return node
