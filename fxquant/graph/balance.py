"""Channels of a value rescaled between what gives it and what reads it: the same function, with kinder ranges.

Every factor is a power of two. So the float outputs stay the same to the bit, unless a number leaves the range of
normal floats: a scaled number has the same digits, and so have all sums and products with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant.graph import edit
from fxquant.nn.fused import WITH_RELU

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEARS = (nn.Linear, WITH_RELU[nn.Linear])
_LAYERS = (*_CONVOLUTIONS, *_LINEARS, *WITH_RELU.values())
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_ELEMENTWISE: frozenset[Any] = frozenset(
    (
        *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout),
        *(F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", F.leaky_relu, F.dropout, "contiguous"),
    )
)
"""Functions of single values with f(a x) = a f(x) for positive a."""

_SPATIAL: dict[Any, int] = {
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.ZeroPad1d, nn.Dropout1d), 1),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d, nn.Dropout2d), 2),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.ZeroPad3d, nn.Dropout3d), 3),
    **dict.fromkeys((F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d), 1),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d), 2),
    **dict.fromkeys((F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d), 3),
}
"""The same of each channel, after a convolution of that rank."""

_ROUNDS = 20
"""How often all pairs are equalized in turn: a layer between two others takes part in two."""


class Pair(NamedTuple):
    """What gives a value and what reads it, by the paths of their modules: the factors of a channel cancel out."""

    source: str
    readers: tuple[str, ...]


def find_layer_pairs(module: fx.GraphModule, fixed: frozenset[int]) -> list[Pair]:
    """Return the layers that nothing but functions with f(a x) = a f(x) is between. fixed: modules to leave, by id."""
    pairs = []
    for node, layer in _own_modules(module, _LAYERS, fixed):
        reader = _follow(module, node)
        target = None if reader is None else module.get_submodule(str(reader.target))
        if reader is None or not _is_own(module, reader, fixed):
            continue
        if isinstance(layer, _LINEARS) == isinstance(target, _LINEARS) and _outputs(layer) == _inputs(target):
            pairs.append(Pair(str(node.target), (str(reader.target),)))
    return pairs


def find_norm_pairs(module: fx.GraphModule, fixed: frozenset[int]) -> list[Pair]:
    """Return the normalizations of the last dimension that only Linear modules read. fixed: modules to leave, by id."""
    pairs = []
    for node, norm in _own_modules(module, _NORMS, fixed):
        readers = [user for user in node.users if _is_layer(module, user, _LINEARS) and _is_own(module, user, fixed)]
        if norm.weight is not None and norm.weight.dim() == 1 and readers and len(readers) == len(node.users):
            pairs.append(Pair(str(node.target), tuple(str(reader.target) for reader in readers)))
    return pairs


def equalize_pairs(module: fx.GraphModule, pairs: list[Pair]) -> None:
    """Give both layers of each pair weights of equal ranges, channel by channel, as nearly as powers of two can.

    Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction".
    """
    layers = {path: module.get_submodule(path) for pair in pairs for path in (pair.source, *pair.readers)}
    weights = {path: _weight(layer) for path, layer in layers.items()}
    shifts = [torch.zeros(_outputs(layers[pair.source]), dtype=torch.float64) for pair in pairs]
    for _ in range(_ROUNDS):
        for i, (source, (reader,)) in enumerate(pairs):
            given = _greatest(weights[source], layers[source], by_input=False)
            taken = _greatest(weights[reader], layers[reader], by_input=True)
            shift = torch.where((given > 0) & (taken > 0), (taken.log2() - given.log2()) / 2, 0.0)
            weights[source] = weights[source] * _by_output(layers[source], shift.exp2())
            weights[reader] = weights[reader] * _by_input(layers[reader], (-shift).exp2())
            shifts[i] = shifts[i] + shift
    for pair, shift in zip(pairs, shifts, strict=True):
        shift_pair(module, pair, shift.round())


def smooth_pairs(module: fx.GraphModule, peaks: dict[str, torch.Tensor], pairs: list[Pair], strength: float) -> None:
    """Shift the outliers of normalized channels into the weights of the Linears that read them.

    peaks: the greatest magnitude of each channel, by the normalization's path. Xiao et al. 2023, "SmoothQuant".
    """
    for pair in pairs:
        readers = [module.get_submodule(reader) for reader in pair.readers]
        taken = torch.stack([_greatest(_weight(reader), reader, by_input=True) for reader in readers]).amax(0)
        given = peaks[pair.source].to(taken)
        is_alive = (given > 0) & (taken > 0) & given.isfinite()
        shift = torch.where(is_alive, (1 - strength) * taken.log2() - strength * given.log2(), 0.0)
        shift_pair(module, pair, shift.round())


def shift_pair(module: fx.GraphModule, pair: Pair, shift: torch.Tensor) -> None:
    """Multiply the channels between a pair by 2 ** shift, with new modules in place of both. shift: whole numbers."""
    source = _twin(module, pair.source)
    for name in ("weight", "bias"):
        tensor = getattr(source, name, None)
        if tensor is not None:
            factor = shift.exp2().to(tensor)
            channels = _by_output(source, factor) if name == "weight" else factor
            setattr(source, name, nn.Parameter(tensor.detach() * channels, tensor.requires_grad))
    for path in pair.readers:
        reader = _twin(module, path)
        weight = reader.weight
        scaled = weight.detach() * _by_input(reader, (-shift).exp2().to(weight))
        reader.weight = nn.Parameter(scaled, weight.requires_grad)


def _weight(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.weight
    return weight.detach().to("cpu", torch.float64)


def _twin(module: fx.GraphModule, path: str) -> Any:
    """Put a copy in a module's place, which shares its tensors, and return it."""
    twin = edit.mirror(module.get_submodule(path))
    edit.swap_module(module, path, twin)
    return twin


def _outputs(layer: Any) -> int:
    return _size(layer, "out")


def _inputs(layer: Any) -> int:
    return _size(layer, "in")


def _size(layer: Any, side: str) -> int:
    return int(getattr(layer, f"{side}_features" if isinstance(layer, _LINEARS) else f"{side}_channels"))


def _groups(layer: Any) -> int:
    return 1 if isinstance(layer, _LINEARS) else int(layer.groups)


def _greatest(weight: torch.Tensor, layer: Any, by_input: bool) -> torch.Tensor:
    """Return the greatest magnitude of a layer's weights for each input, or output, channel."""
    first = isinstance(layer, _TRANSPOSED) == by_input  # whether dimension 0 holds these channels
    if first:
        return weight.abs().flatten(1).amax(1)
    by_group = weight.abs().reshape(_groups(layer), -1, weight.shape[1], math.prod(weight.shape[2:]))
    return by_group.amax((1, 3)).flatten()


def _by_input(layer: Any, factor: torch.Tensor) -> torch.Tensor:
    """Return a factor for each input channel in the shape of a layer's weight."""
    return _in_shape(layer, factor, isinstance(layer, _TRANSPOSED))


def _by_output(layer: Any, factor: torch.Tensor) -> torch.Tensor:
    """Return a factor for each output channel in the shape of a layer's weight."""
    return factor if isinstance(layer, _NORMS) else _in_shape(layer, factor, not isinstance(layer, _TRANSPOSED))


def _in_shape(layer: Any, factor: torch.Tensor, is_first: bool) -> torch.Tensor:
    weight = layer.weight
    rest = [1] * (weight.dim() - 2)
    if is_first:
        return factor.view(-1, 1, *rest)
    groups = _groups(layer)
    each = factor.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return each.reshape(weight.shape[0], weight.shape[1], *rest)


def _own_modules(module: fx.GraphModule, kinds: Any, fixed: frozenset[int]) -> Iterator[tuple[fx.Node, Any]]:
    """Yield the nodes that call modules of some types which may be changed, with these."""
    for node in module.graph.find_nodes(op="call_module", sort=True):
        if _is_layer(module, node, kinds) and _is_own(module, node, fixed):
            yield node, module.get_submodule(str(node.target))


def _is_layer(module: fx.GraphModule, node: fx.Node, kinds: Any) -> bool:
    return node.op == "call_module" and type(module.get_submodule(str(node.target))) in kinds


def _is_own(module: fx.GraphModule, node: fx.Node, fixed: frozenset[int]) -> bool:
    """Return whether this call alone uses a module, and its weight is a parameter that nothing computes."""
    layer, target = module.get_submodule(str(node.target)), str(node.target)
    calls = [n for n in module.graph.nodes if n.op == "call_module" and n.target == target]
    reads = [n for n in module.graph.find_nodes(op="get_attr") if str(n.target).startswith(f"{target}.")]
    is_plain = layer._parameters.get("weight") is not None and not layer.weight.is_meta
    return is_plain and len(calls) == 1 and not reads and id(layer) not in fixed and not edit.has_hooks(layer)


def _follow(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the layer that alone reads what a node gives, after functions that only scale with it."""
    layer: Any = module.get_submodule(str(node.target))
    rank = layer.weight.dim() - 2  # 0: the last dimension holds the channels
    while len(node.users) == 1:
        (user,) = node.users
        if not user.args or user.args[0] is not node:
            return None
        if _is_layer(module, user, _LAYERS):
            return user
        called = module.get_submodule(str(user.target)) if user.op == "call_module" else None
        kind = user.target if called is None else type(called)
        scales_along = kind in _ELEMENTWISE or _SPATIAL.get(kind) == rank
        if not scales_along or user.all_input_nodes != [node] or (called is not None and edit.has_hooks(called)):
            return None
        node = user
    return None
