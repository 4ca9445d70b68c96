"""Small tools on module trees and graphs that the passes share."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxquant.frames import place_of
from fxquant.graph.constants import is_cast, is_transposition
from fxquant.graph.references import copy_references, twin_of
from fxquant.nn.base import QuantizedModule

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""The attributes of a module that hold what its call runs beside forward."""

RECOMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Hooks that compute a module's weight before each call: a part of what the module computes, not a user's hook."""

RECOMPUTED_FROM = ("_g", "_v", "_orig", "_u", "_mask")
"""What such a weight's name ends with in the tensors that it is computed from."""


def mirror(root: nn.Module, device: str | None = None, hooks: bool = True, written: Collection[str] = ()) -> nn.Module:
    """Return a copy of a module tree that shares the storage of parameters and quantized weights, and nothing else.

    A table with a max_norm, which writes into its parameter at each call, is copied too, and so are the parameters that
    are named as written: those that forward writes into, and that its record, if it has one, names.
    Tied tensors stay tied; a lambda, closure or weak reference that leads to a module of the tree leads to its copy.
    What the copy's Python code assigns or appends, and what `.to` does to it, never reaches the original.
    device: "meta" for a copy without data. hooks: whether the modules keep their hooks; they always keep those that
    compute a weight.
    """
    memo: dict[int, Any] = {}
    for module, tensor in _tensors(root):
        memo[id(tensor)] = _alias(tensor, device, isinstance(module, QuantizedModule))
    for module in root.modules() if device is None else ():
        if vars(module).get("max_norm") is not None:
            memo.update((id(t), nn.Parameter(t.detach().clone(), t.requires_grad)) for t in module.parameters(False))
    record = vars(root).get("_fxquant_record")
    names = {*written, *getattr(record, "written", ())} if device is None else set()
    for name, tensor in root.named_parameters(remove_duplicate=False) if names else ():
        if name in names:  # written under torch.no_grad(), which a graph does not hold
            memo[id(tensor)] = nn.Parameter(tensor.detach().clone(), requires_grad=False)
    for module in root.modules():
        memo.update((id(t), _alias(t, None, False)) for t in vars(module).values() if isinstance(t, torch.Tensor))
    modules = [module for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)]
    for module in modules:
        if not isinstance(module, fx.GraphModule):
            memo[id(module)] = object.__new__(type(module))
    copy_references([module for module in modules if not isinstance(module, fx.GraphModule)], memo)
    for module in reversed(modules):  # children first: a GraphModule's own deepcopy reads them
        if isinstance(module, fx.GraphModule):
            quiet_copy(module, memo)
        else:
            twin = memo[id(module)]
            twin.__dict__.update({name: twin_of(value, memo) for name, value in module.__dict__.items()})
            twin.__dict__.pop("_compiled_call_impl", None)  # of module.compile(): it would run the original
    result: nn.Module = memo.get(id(root), root)
    if not hooks:
        for module in result.modules():
            for name in HOOKS:
                kept = getattr(module, name, {})
                for key in [key for key, hook in kept.items() if not isinstance(hook, RECOMPUTING)]:
                    del kept[key]
    return result


def _tensors(root: nn.Module) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    for module in root.modules():
        yield from ((module, t) for t in module._parameters.values() if t is not None)
        yield from ((module, t) for t in module._buffers.values() if t is not None)


def _alias(tensor: torch.Tensor, device: str | None, is_constant: bool) -> torch.Tensor:
    """Return the same tensor, or a copy of one that forward may write into: a counter, a cache."""
    shared = tensor.detach() if device is None else torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(shared, tensor.requires_grad and not tensor.is_inference())
    return shared if device is not None or is_constant else shared.clone()


def quiet_copy(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return a deep copy of what holds a graph, without torch's warning of how it copies an exported program's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        return copy.deepcopy(value, memo)


def copied(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return a deep copy, or the thing itself where it cannot be copied (a lock, an open file)."""
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give one module the hooks of another."""
    for name in HOOKS:
        carried = copy.copy(getattr(source, name, None)) or {}
        for key in [key for key, hook in carried.items() if isinstance(hook, RECOMPUTING)]:
            del carried[key]
        if carried:
            setattr(target, name, carried)


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling the module runs anything beside its forward."""
    return any(not isinstance(hook, RECOMPUTING) for name in HOOKS for hook in getattr(module, name, {}).values())


def swap_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, with the hooks of the one it replaces."""
    carry_hooks(root.get_submodule(path), module)
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module


def call_new_module(root: fx.GraphModule, node: fx.Node, module: nn.Module, x: Any) -> None:
    """Let a node call a module of x, which stands under the node's name."""
    path = free_name(root, node.name)
    root.add_submodule(path, module)
    node.op, node.target, node.args, node.kwargs = "call_module", path, (x,), {}


def get_tensor(root: nn.Module, path: str) -> torch.Tensor | None:
    """Return the tensor at a path, or None where there is none."""
    value: Any = root
    for name in path.split("."):
        if not hasattr(value, name):
            return None
        value = getattr(value, name)
    return value if isinstance(value, torch.Tensor) else None


def set_tensor(root: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Put a tensor at a path: a parameter if it is one, else a buffer; what was there goes."""
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    for place in (owner._parameters, owner._buffers, vars(owner)):
        place.pop(name, None)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor)


def free_name(root: nn.Module, path: str, tensor: torch.Tensor | None = None) -> str:
    """Return the path, with a number at its end if something other than the tensor is there already."""
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    number, unique = 0, name
    while hasattr(owner, unique) and (tensor is None or getattr(owner, unique) is not tensor):
        number += 1
        unique = f"{name}_{number}"
    return f"{parent}.{unique}" if parent else unique


def erase_dead(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase those constants, observers, transpositions and casts that nothing uses any more, and what fed only them."""
    for node in nodes:
        is_ours = node.op in ("get_attr", "call_module") or is_transposition(node) is not None or is_cast(node)
        if not node.users and (is_ours or node.target is getattr):
            feeders = node.all_input_nodes
            graph.erase_node(node)
            erase_dead(graph, feeders)


def erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing reads."""
    if not node.users:
        graph.erase_node(node)


def user_frame(error: BaseException) -> str:
    """Return "file.py:12, in forward: `the line`" of the user's code in which an error arose, or ""."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        place = place_of(frame.filename, frame.lineno)
        if place:
            return f"{place}, in {frame.name}: `{(frame.line or '').strip()}`"
    return ""


def node_frame(node: fx.Node) -> str:
    """Return "file.py:12" of the user's line that made a node, or ""."""
    for line in reversed((node.stack_trace or "").splitlines()):
        line = line.strip()
        if line.startswith('File "'):
            filename, _, rest = line[6:].partition('", line ')
            place = place_of(filename, rest.partition(",")[0])
            if place:
                return place
    return ""


def identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what tied tensors have in common, and no others that live at the same time."""
    return tensor.untyped_storage().data_ptr() or id(tensor), tensor.storage_offset(), tensor.shape


def sizes(tensors: Iterable[torch.Tensor]) -> dict[tuple[Any, ...], int]:
    """Return the bytes of some tensors by their identity, so that tied ones count once."""
    return {identity(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}


def byte_count(root: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, tied ones counted once."""
    return sum(sizes((*root.parameters(), *root.buffers())).values())
