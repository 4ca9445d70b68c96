"""Second pass: chains with a single consumer become one float module or call.

Linear → BatchNorm1d, Conv → BatchNorm, ConvTranspose → BatchNorm (grouped too): the normalization's scale and shift are
folded into the weights. Linear → ReLU, Conv → ReLU, F.linear → relu: one module or call does both, in every spelling:
nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, .relu(), .relu_().
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant.graph import edit
from fxquant.graph.preserve.preserve import NOTHING_PRESERVED, Preserved
from fxquant.graph.record import Fusion, Unfused
from fxquant.nn.fused import WITH_RELU, linear_relu

_NORMS: dict[type[nn.Module], tuple[type[nn.Module], int]] = {
    nn.Linear: (nn.BatchNorm1d, 2),
    nn.Conv1d: (nn.BatchNorm1d, 3),
    nn.Conv2d: (nn.BatchNorm2d, 4),
    nn.Conv3d: (nn.BatchNorm3d, 5),
    nn.ConvTranspose1d: (nn.BatchNorm1d, 3),
    nn.ConvTranspose2d: (nn.BatchNorm2d, 4),
    nn.ConvTranspose3d: (nn.BatchNorm3d, 5),
}
"""What a normalization can be folded into: its type, and the rank of the tensor between them where that is right."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RELU_FUNCTIONS: tuple[Callable[..., Any], ...] = (F.relu, F.relu_, torch.relu, torch.relu_)
_RELU_METHODS = ("relu", "relu_")


def fuse(
    module: fx.GraphModule,
    hooked: frozenset[str] = frozenset(),
    preserved: Preserved = NOTHING_PRESERVED,
    only: tuple[Fusion, ...] | None = None,
) -> tuple[tuple[Fusion, ...], tuple[Unfused, ...]]:
    """Fuse in place and return what was fused, and what was not because code beside the graph uses it.

    hooked: modules that must stay callable by themselves, for their hooks. only: the fusions to repeat (a
    checkpoint's); None: all that apply.
    """
    fusions: list[Fusion] = []
    unfused: list[Unfused] = []
    kept = set(map(id, preserved.modules(module)))
    untouched = kept if only is None else set()  # what was fused when the file was made may be fused again
    allowed = None if only is None else {fusion.path: fusion.chain for fusion in only}
    for node in list(module.graph.nodes):
        path = str(node.target) if node.op == "call_module" else node.name
        chain = [path]
        for can_fuse, step in ((_is_normed, _fold_norm), (_is_rectified, _absorb_relu)):
            if allowed is None or len(allowed.get(path, ())) > len(chain):
                follower = _single_follower(module, node, hooked)
                if follower is None and step is _absorb_relu:
                    chain += _absorb_relus(module, node, hooked, kept, untouched)
                if follower is None or not can_fuse(module, node, follower):
                    continue
                link = str(follower.target) if follower.op == "call_module" else follower.name
                used = _used(module, node, follower, untouched)
                if used:
                    unfused.append(Unfused(chain=(path, link), used=used))
                    break
                step(module, node, follower, allowed is None)
                chain.append(link)
                follower.replace_all_uses_with(node)
                module.graph.erase_node(follower)
                _drop_unused(module, follower, kept)
        if len(chain) > 1:
            fusions.append(Fusion(path=path, chain=tuple(chain)))
    module.recompile()
    return tuple(fusions), tuple(unfused)


def _used(module: fx.GraphModule, node: fx.Node, follower: fx.Node, kept: set[int]) -> str:
    """Return the path of the module that kept code uses and fusing would change, "" for none: a ReLU stays one."""
    for part in (node, follower):
        if part.op == "call_module":
            used = module.get_submodule(str(part.target))
            if id(used) in kept and type(used) is not nn.ReLU:
                return str(part.target)
    return ""


def _drop_unused(module: fx.GraphModule, follower: fx.Node, kept: set[int]) -> None:
    """Delete the module that a fused node called, unless another node or preserved code uses it."""
    target = str(follower.target)
    if follower.op == "call_module" and id(module.get_submodule(target)) not in kept:
        places = {str(node.target) for node in module.graph.nodes if node.op in ("call_module", "get_attr")}
        if not any(place == target or place.startswith(f"{target}.") for place in places):
            module.delete_submodule(target)


def _single_follower(module: fx.GraphModule, node: fx.Node, hooked: frozenset[str]) -> fx.Node | None:
    """Return the one node that consumes this one and nothing else, if the two may become one."""
    if len(node.users) != 1 or node.op not in ("call_module", "call_function"):
        return None
    follower = next(iter(node.users))
    if follower.all_input_nodes != [node] or follower.op == "output":
        return None
    for part in (node, follower):
        if part.op == "call_module" and (part.target in hooked or not _is_called_once(module, part)):
            return None
    return follower


def _is_called_once(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether nothing else in the graph calls the node's module or reads its tensors; a ReLU may be shared."""
    target = str(node.target)
    if type(module.get_submodule(target)) is nn.ReLU:
        return True
    uses = [n for n in module.graph.nodes if n.op == "call_module" and n.target == target]
    return len(uses) == 1 and not _reads(module, target)


def _is_normed(module: fx.GraphModule, node: fx.Node, follower: fx.Node) -> bool:
    """Return whether a normalization follows that can be folded into a node's module."""
    if node.op != "call_module" or follower.op != "call_module":
        return False
    float_module, norm = module.get_submodule(str(node.target)), module.get_submodule(str(follower.target))
    kind, rank = _NORMS.get(type(float_module), (None, 0))
    if type(norm) is not kind or norm.training or norm.running_mean is None:
        return False
    outputs = float_module.out_features if isinstance(float_module, nn.Linear) else float_module.out_channels
    known = node.meta.get("tensor_meta")
    return bool(norm.num_features == outputs and (known is None or len(known.shape) == rank))


def _fold_norm(module: fx.GraphModule, node: fx.Node, follower: fx.Node, may_guard: bool) -> None:
    """Fold the normalization that follows into a node's module."""
    float_module, norm = module.get_submodule(str(node.target)), module.get_submodule(str(follower.target))
    kind, rank = _NORMS[type(float_module)]
    if node.meta.get("tensor_meta") is None and kind is nn.BatchNorm1d and may_guard:
        _guard_rank(module.graph, node, rank)
    edit.swap_module(module, str(node.target), _folded(float_module, norm))


def _guard_rank(graph: fx.Graph, node: fx.Node, rank: int) -> None:
    """Assert in the graph that a value has the rank for which a BatchNorm1d was folded: it also takes another."""
    with graph.inserting_after(node):
        dim = graph.call_method("dim", (node,))
    with graph.inserting_after(dim):
        is_right = graph.call_function(operator.eq, (dim, rank))
    message = f"{node.name}: its BatchNorm1d was folded for {rank}-D values; call fuse_fx with example_inputs"
    with graph.inserting_after(is_right):
        graph.call_function(torch._assert, (is_right, message))


def _folded(module: Any, norm: Any) -> nn.Module:
    """Return a module whose weights include the normalization: w' = w γ / √(σ² + ε), b' = (b - μ) γ / √(σ² + ε) + β."""
    twin: Any = edit.mirror(module)
    wide = torch.float64  # folded once, so rounded once
    gain = (norm.running_var.to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().to(wide)
    shift = norm.bias.detach().to(wide) if norm.bias is not None else torch.zeros_like(gain)
    bias = module.bias.detach().to(wide) if module.bias is not None else torch.zeros_like(gain)
    weight = module.weight.detach()
    if isinstance(module, _TRANSPOSED):  # (in, out / groups, …): a group of inputs meets its own slice of outputs
        per_group = gain.view(module.groups, 1, -1).expand(-1, module.in_channels // module.groups, -1)
        factor = per_group.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    else:
        factor = gain.view(-1, *[1] * (weight.dim() - 1))
    twin.weight = nn.Parameter((weight.to(wide) * factor).to(weight.dtype), module.weight.requires_grad)
    folded_bias = (bias - norm.running_mean.to(wide)) * gain + shift
    twin.bias = nn.Parameter(folded_bias.to(weight.dtype), module.weight.requires_grad)
    return twin  # type: ignore[no-any-return]


def _is_rectified(module: fx.GraphModule, node: fx.Node, follower: fx.Node) -> bool:
    """Return whether a ReLU follows that a node can do itself."""
    if not _is_relu(module, follower):
        return False
    if node.op == "call_function":
        return node.target in (F.linear, linear_relu)
    return type(module.get_submodule(str(node.target))) in WITH_RELU


def _absorb_relu(module: fx.GraphModule, node: fx.Node, _follower: fx.Node, _may_guard: bool) -> None:
    """Let a node do the ReLU that follows it."""
    if node.op == "call_function":
        node.target = linear_relu
        return
    float_module = module.get_submodule(str(node.target))
    fused = edit.mirror(float_module)
    fused.__class__ = WITH_RELU[type(float_module)]
    edit.swap_module(module, str(node.target), fused)


def _absorb_relus(
    module: fx.GraphModule, node: fx.Node, hooked: frozenset[str], kept: set[int], untouched: set[int]
) -> list[str]:
    """Let a module that is called several times, each time followed by a ReLU, do those; return what they were."""
    target = str(node.target)
    if node.op != "call_module" or target in hooked or _reads(module, target):
        return []
    calls = [n for n in module.graph.nodes if n.op == "call_module" and n.target == target]
    relus = [next(iter(call.users)) for call in calls if len(call.users) == 1]
    if len(calls) == 1 or calls[:1] != [node] or len(calls) != len(relus):
        return []
    if not all(_is_rectified(module, node, relu) for relu in relus):
        return []
    taken = [str(relu.target) for relu in relus if relu.op == "call_module"]
    if set(taken) & hooked or any(_used(module, node, relu, untouched) for relu in relus):
        return []
    _absorb_relu(module, node, relus[0], False)
    for call, relu in zip(calls, relus, strict=True):
        relu.replace_all_uses_with(call)
        module.graph.erase_node(relu)
        _drop_unused(module, relu, kept)
    return [str(relu.target) if relu.op == "call_module" else relu.name for relu in relus]


def _reads(module: fx.GraphModule, target: str) -> list[fx.Node]:
    """Return the nodes that read the tensors of the module at a path."""
    return [n for n in module.graph.nodes if n.op == "get_attr" and str(n.target).startswith(f"{target}.")]


def _is_relu(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is nn.ReLU
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS
    return node.op == "call_method" and node.target in _RELU_METHODS
