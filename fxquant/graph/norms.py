"""Layers of torch put back at the paths of their tensors, for calls of functions that read these."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant.graph import edit

_NORMS: dict[int, type[_BatchNorm]] = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_STATISTICS = ("running_mean", "running_var")


def restore_norm(root: nn.Module, graph: fx.Graph, node: fx.Node, rank: int, kept: Collection[int] = ()) -> bool:
    """Let a node call the normalization that its F.batch_norm is, and return whether it is one.

    rank: that of what it normalizes. kept: the ids of modules that must stay as they are.
    """
    given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    x, tensors = given.arguments["input"], {name: given.arguments[name] for name in (*_STATISTICS, "weight", "bias")}
    training, eps, momentum = (given.arguments[name] for name in ("training", "eps", "momentum"))
    path = owner_of(root, graph, tensors, node, {"num_batches_tracked"})
    if rank not in _NORMS or path is None or id(root.get_submodule(path)) in kept or training is not False:
        return False
    if isinstance(eps, fx.Node) or isinstance(momentum, fx.Node) or any(tensors[name] is None for name in _STATISTICS):
        return False
    owner: Any = root.get_submodule(path)
    layer = _NORMS[rank](len(owner.running_mean), eps, momentum, device="meta").eval()
    for name in ("weight", "bias"):
        layer.register_parameter(name, owner._parameters.get(name))
    for name in (*_STATISTICS, "num_batches_tracked"):
        layer.register_buffer(name, owner._buffers.get(name))
    _drop_rank_checks(graph, x, rank)
    put_layer(root, graph, path, layer, node, x, tensors.values())
    return True


def _drop_rank_checks(graph: fx.Graph, x: fx.Node, rank: int) -> None:
    """Erase assertions that a value has the rank which a normalization of it asks for anyway."""
    for asked in list(x.users):
        if asked.target is getattr and asked.args[1] == "ndim":
            for is_right in list(asked.users):
                if is_right.target is operator.eq and is_right.args == (asked, rank):
                    checks = list(is_right.users)
                    for check in checks if all(check.target is torch._assert for check in checks) else ():
                        graph.erase_node(check)
                    edit.erase_unread(graph, is_right)
            edit.erase_unread(graph, asked)


def owner_of(
    root: nn.Module, graph: fx.Graph, reads: dict[str, Any], node: fx.Node, others: Collection[str] = ()
) -> str | None:
    """Return the path of the module whose tensors a call reads by their names, if it is there for that alone.

    reads: the nodes, or None, by the tensors' names; others: those of tensors that the module may have beside them.
    """
    given = {name: read for name, read in reads.items() if read is not None}
    if not all(isinstance(n, fx.Node) and n.op == "get_attr" and list(n.users) == [node] for n in given.values()):
        return None
    paths = {str(read.target).removesuffix(f".{name}") for name, read in given.items()}
    path = next(iter(paths), "")
    if len(paths) != 1 or path in (str(read.target) for read in given.values()):
        return None
    owner = root.get_submodule(path)
    has = {name for name, _ in (*owner.named_parameters(), *owner.named_buffers())}
    places = [place for place, part in root.named_modules(remove_duplicate=False) if part is owner]
    reading = [n for n in graph.nodes if n.op == "get_attr" and str(n.target).startswith(f"{path}.")]
    is_called = any(n.op == "call_module" and n.target == path for n in graph.nodes)
    is_alone = has - set(others) == set(given) and places == [path] and len(reading) == len(given) and not is_called
    return path if is_alone and not edit.has_hooks(owner) else None


def put_layer(
    root: nn.Module, graph: fx.Graph, path: str, layer: nn.Module, node: fx.Node, x: Any, reads: Iterable[Any]
) -> None:
    """Put a plain layer at a path and let a node call it; what stood inside the layer moves beside it."""
    for other in graph.nodes:
        if other.op == "call_module" and str(other.target).startswith(f"{path}."):
            place = edit.free_name(root, str(other.target).replace(".", "_"))
            root.add_module(place, root.get_submodule(str(other.target)))
            other.target = place
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = layer
    node.op, node.target, node.args, node.kwargs = "call_module", path, (x,), {}
    edit.erase_dead(graph, [read for read in reads if read is not None])
