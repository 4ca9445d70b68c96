"""Last pass: the converted model keeps only what its graph uses, and shares no tensor with the float model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx, nn

from fxquant.graph import edit
from fxquant.graph.constants import asks_kind, free_of_size, is_transposition
from fxquant.graph.preserve.bound import carry
from fxquant.graph.preserve.preserve import NOTHING_PRESERVED, Preserved


def clean(module: fx.GraphModule, source: nn.Module, preserved: Preserved = NOTHING_PRESERVED) -> fx.GraphModule:
    """Return the module rebuilt around its graph, with copies of the float tensors that it shares with the source.

    Unused submodules and tensors are dropped, except preserved ones. The user's nodes are not touched:
    convert erased its own dead ones.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not reference an nn.Module, nn.Parameter, or buffer")  # an attribute
        module.graph.lint()
    _empty_kinds(module)
    rebuilt = fx.GraphModule(module, module.graph)
    carry(module, rebuilt, preserved)
    own_tensors(rebuilt, source)
    return rebuilt


def _empty_kinds(module: fx.GraphModule) -> None:
    """Let nodes that do not use a matrix's values take an empty tensor instead, so that the matrix can go."""
    asked: dict[Any, str] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = edit.get_tensor(module, str(node.target))
        if tensor is not None and tensor.dim() > 1 and _is_asked_kind(node):
            _free_of_size(node, tensor)
            if not node.users:
                module.graph.erase_node(node)
                continue
            if node.target not in asked:
                asked[node.target] = edit.free_name(module, f"{str(node.target).replace('.', '_')}_kind")
                edit.set_tensor(module, asked[node.target], tensor.detach().new_empty(0))
            node.target = asked[node.target]


def _is_asked_kind(node: fx.Node) -> bool:
    """Return whether a constant, or its transpose, is used, and never for its values."""
    return bool(node.users) and all(
        asks_kind(user, node) or (is_transposition(user) is not None and _is_asked_kind(user)) for user in node.users
    )


def _free_of_size(node: fx.Node, tensor: torch.Tensor) -> None:
    """Replace reads of the sizes of a matrix, or of its transpose, by numbers."""
    for user in list(node.users):
        if asks_kind(user, node):
            free_of_size(user, tensor.shape)
        else:
            _free_of_size(user, tensor.t() if is_transposition(user) else tensor)
            if not user.users:
                user.graph.erase_node(user)


def own_tensors(module: nn.Module, source: nn.Module) -> None:
    """Give a module copies, tied as they were, of the tensors that it shares with a source."""
    borrowed = {t.untyped_storage().data_ptr() for t in (*source.parameters(), *source.buffers())} - {0}
    copies: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        held: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.untyped_storage().data_ptr() in borrowed:
                    tensors[name] = copies.setdefault(id(tensor), _own(tensor))


def _own(tensor: torch.Tensor) -> torch.Tensor:
    twin = tensor.detach().clone()
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
