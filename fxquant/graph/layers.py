"""Before chains are fused: what a layer's own forward writes with functions becomes a plain layer's call again.

Convolutions that pad as TensorFlow does are subclasses whose forward pads and calls F.conv2d, and normalizations that
do their activation too are subclasses that call F.batch_norm: those of EfficientNet and of timm's networks. As plain
layers one can be folded into the other.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant.graph.norms import owner_of, put_layer, restore_norm
from fxquant.graph.plan.targets import name_operands
from fxquant.operators.base import Operator
from fxquant.operators.static import STATIC_CONVOLUTION, STATIC_LINEAR

_SPELT = "_fxquant_spelt"
_PRODUCTS = {function: row for row in (STATIC_CONVOLUTION, STATIC_LINEAR) for function in row.functions}
_RANKS: dict[Any, int] = {
    **dict.fromkeys((F.conv1d, nn.Conv1d, nn.ConvTranspose1d), 3),
    **dict.fromkeys((F.conv2d, nn.Conv2d, nn.ConvTranspose2d), 4),
    **dict.fromkeys((F.conv3d, nn.Conv3d, nn.ConvTranspose3d), 5),
}


def restore_layers(
    module: fx.GraphModule, kept: Collection[int] = (), only: Collection[str] | None = None
) -> frozenset[str]:
    """Rewrite such calls in place, a normalization and the product that it follows; return the nodes' names.

    kept: the ids of modules that must stay as they are. only: the paths of products to restore; None: all.
    """
    restored = []
    for node in list(module.graph.nodes):
        if node.target is F.batch_norm and (rank := _rank_of(module, node)):
            restored += [node] if restore_norm(module, module.graph, node, rank, kept) else []
    for node in list(module.graph.nodes):
        row = _PRODUCTS.get(node.target) if node.op == "call_function" else None
        if row is not None and _is_normed(module, node) and _restore_product(module, row, node, kept, only):
            restored.append(node)
    return frozenset(node.name for node in restored)


def spelt_as(module: nn.Module) -> Any:
    """Return the function that the user's model calls where a product was restored, whose entries decide; else None."""
    return vars(module).get(_SPELT)


def _rank_of(module: fx.GraphModule, node: fx.Node) -> int:
    """Return the rank of the values that a convolution gives, which a node reads; 0 where there is none."""
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node):
        return 0
    made = module.get_submodule(str(x.target)) if x.op == "call_module" else x.target
    return next((rank for kind, rank in _RANKS.items() if made is kind or type(made) is kind), 0)


def _is_normed(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a BatchNorm, and nothing else, reads a node."""
    users = list(node.users)
    called = module.get_submodule(str(users[0].target)) if len(users) == 1 and users[0].op == "call_module" else None
    return isinstance(called, _BatchNorm)


def _restore_product(
    module: fx.GraphModule, row: Operator, node: fx.Node, kept: Collection[int], only: Collection[str] | None
) -> bool:
    """Let a node call the layer that its product is, and return whether it is one."""
    operands = name_operands(row, node)
    reads = {name: operands.pop(name, None) for name in ("weight", "bias")}
    path = owner_of(module, module.graph, reads, node)
    if path is None or id(module.get_submodule(path)) in kept or (only is not None and path not in only):
        return False
    if any(isinstance(value, fx.Node) for name, value in operands.items() if name != "input"):
        return False
    owner = module.get_submodule(path)
    tensors = {name: getattr(owner, name) for name, read in reads.items() if read is not None}
    assert row.stand_in is not None, row.name
    layer = row.stand_in(node.target, {**operands, **tensors})
    for name, tensor in tensors.items():  # the same objects: a trained model's optimizer has them
        layer.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False))
    vars(layer)[_SPELT] = node.target
    put_layer(module, module.graph, path, layer, node, operands["input"], reads.values())
    return True
