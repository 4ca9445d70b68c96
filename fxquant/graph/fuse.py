"""Second pass: chains with a single consumer become one float module or call.

Linear → BatchNorm1d, Conv → BatchNorm, ConvTranspose → BatchNorm (grouped too): the normalization's scale and shift are
folded into the weights. Linear → ReLU, Conv → ReLU, F.linear → relu: one module or call does both, in all spellings:
nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, .relu(), .relu_().
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant.graph import edit
from fxquant.graph.in_place import read_results
from fxquant.graph.layers import restore_layers
from fxquant.graph.preserve.preserve import NOTHING_PRESERVED, Preserved
from fxquant.graph.record import Fusion, Unfused
from fxquant.graph.why import NotFused, Reason, because
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
"""Which layers a normalization can be folded into: its type, and the rank that the tensor between them must have."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RELU_FUNCTIONS: tuple[Callable[..., Any], ...] = (F.relu, F.relu_, torch.relu, torch.relu_)
_RELU_METHODS = ("relu", "relu_")


class _Scene(NamedTuple):
    """What is fused. hooked: modules that must stay callable by themselves, for their hooks. kept: those, by id, that
    code beside the graph uses; untouched: those of them that must stay as they are.
    """

    module: fx.GraphModule
    hooked: frozenset[str]
    kept: set[int]
    untouched: set[int]


class _Step(NamedTuple):
    """One sort of fusion: whether it applies to the next node, why it cannot be done, and how it is done."""

    follows: Callable[[fx.GraphModule, fx.Node, fx.Node], bool]
    refuse: Callable[[fx.GraphModule, fx.Node, fx.Node], Reason | None]
    apply: Callable[[fx.GraphModule, fx.Node, fx.Node, bool], None]


def fuse(
    module: fx.GraphModule,
    hooked: frozenset[str] = frozenset(),
    preserved: Preserved = NOTHING_PRESERVED,
    only: tuple[Fusion, ...] | None = None,
) -> tuple[tuple[Fusion, ...], tuple[Unfused, ...]]:
    """Fuse in place and return what was fused, and what not and why; what is written in place is read by its result.

    hooked: modules that must stay callable by themselves, for their hooks. only: the fusions to repeat (a
    checkpoint's); None: all that apply.
    """
    fusions: list[Fusion] = []
    unfused: list[Unfused] = []
    kept = set(map(id, preserved.modules(module)))
    scene = _Scene(module, hooked, kept, kept if only is None else set())  # a saved chain may be fused again
    lengths = None if only is None else {fusion.path: len(fusion.chain) for fusion in only}
    restore_layers(module, scene.untouched, lengths)
    for node in list(module.graph.nodes):
        chain = [_place(node)]
        for step in (_NORM, _RELU):
            if lengths is None or lengths.get(chain[0], 0) > len(chain):
                outcome = _fuse_next(scene, node, step, lengths is None)
                if isinstance(outcome, Unfused):
                    unfused.append(outcome)
                    break
                chain += outcome
        if len(chain) > 1:
            fusions.append(Fusion(path=chain[0], chain=tuple(chain)))
    read_results(module)
    module.recompile()
    reported = {part for chain in unfused for part in chain.chain}
    return tuple(fusions), (*unfused, *(alone for alone in _lone_norms(module) if alone.chain[0] not in reported))


def _fuse_next(scene: _Scene, node: fx.Node, step: _Step, may_guard: bool) -> list[str] | Unfused:
    """Fuse a node with the next one; return that one's path, nothing if the step does not apply, or why it cannot."""
    module = scene.module
    followers = [user for user in node.users if user.all_input_nodes == [node] and step.follows(module, node, user)]
    if not followers:
        return []
    follower = followers[0]
    reason = _refuse(scene, node, follower)
    if reason is not None and step is _RELU and (relus := _absorb_relus(scene, node)):
        return relus
    reason = reason or step.refuse(module, node, follower) or _refuse_used(scene, node, follower)
    if reason is not None:
        return Unfused(chain=(_place(node), _place(follower)), why=reason)
    step.apply(module, node, follower, may_guard)
    follower.replace_all_uses_with(node)
    module.graph.erase_node(follower)
    _drop_unused(module, follower, scene.kept)
    return [_place(follower)]


def _place(node: fx.Node) -> str:
    """Return the path of the module that a node calls, else its name."""
    return str(node.target) if node.op == "call_module" else node.name


def _refuse(scene: _Scene, node: fx.Node, follower: fx.Node) -> Reason | None:
    """Return why a node and the next one must stay apart, whatever they are."""
    if len(node.users) > 1:
        return because(NotFused.READ_ELSEWHERE, _place(node))
    for part in (node, follower):
        if part.op == "call_module" and part.target in scene.hooked:
            return because(NotFused.HOOKED, part.target)
        if part.op == "call_module" and not _is_called_once(scene.module, part):
            return because(NotFused.CALLED_ELSEWHERE, part.target)
    return None


def _refuse_used(scene: _Scene, node: fx.Node, follower: fx.Node) -> Reason | None:
    """Return the module that fusing would change and code beside the graph uses, if any: a ReLU does not change."""
    for part in (node, follower):
        if part.op == "call_module":
            used = scene.module.get_submodule(str(part.target))
            if id(used) in scene.untouched and type(used) is not nn.ReLU:
                return because(NotFused.USED_BESIDE, part.target)
    return None


def _lone_norms(module: fx.GraphModule) -> Iterator[Unfused]:
    """Yield the normalizations of the graph, none of which is folded, as chains of one."""
    norms = [n for n in module.graph.nodes if _module_of(module, n, _BatchNorm) is not None]
    for place in dict.fromkeys(map(_place, norms)):
        yield Unfused(chain=(place,), why=because(NotFused.NO_LAYER))


def _module_of(module: fx.GraphModule, node: fx.Node, module_type: Any) -> Any:
    """Return the module that a node calls if it is of a type, else None."""
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return called if isinstance(called, module_type) else None


def _drop_unused(module: fx.GraphModule, follower: fx.Node, kept: set[int]) -> None:
    """Delete the module that a fused node called, unless another node or preserved code uses it."""
    target = str(follower.target)
    if follower.op == "call_module" and id(module.get_submodule(target)) not in kept:
        places = {str(node.target) for node in module.graph.nodes if node.op in ("call_module", "get_attr")}
        if not any(place == target or place.startswith(f"{target}.") for place in places):
            module.delete_submodule(target)


def _is_called_once(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether only this node calls its module or reads its tensors; a ReLU may be shared."""
    target = str(node.target)
    if type(module.get_submodule(target)) is nn.ReLU:
        return True
    uses = [n for n in module.graph.nodes if n.op == "call_module" and n.target == target]
    return len(uses) == 1 and not _reads(module, target)


def _is_normed(module: fx.GraphModule, node: fx.Node, follower: fx.Node) -> bool:
    """Return whether a batch normalization follows a layer."""
    layer = _module_of(module, node, tuple(_NORMS))
    return type(layer) in _NORMS and _module_of(module, follower, _BatchNorm) is not None


def _refuse_norm(module: fx.GraphModule, node: fx.Node, follower: fx.Node) -> Reason | None:
    """Return why a normalization cannot be folded into a node's module, or None."""
    layer, norm = module.get_submodule(str(node.target)), module.get_submodule(str(follower.target))
    norm_type, rank = _NORMS[type(layer)]
    if type(norm) is not norm_type:
        return because(NotFused.OTHER_NORM, type(norm).__name__, type(layer).__name__)
    if norm.training:
        return because(NotFused.TRAINING)
    if norm.running_mean is None:
        return because(NotFused.NO_STATISTICS)
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if norm.num_features != outputs:
        return because(NotFused.OTHER_CHANNELS, norm.num_features, outputs)
    known = node.meta.get("tensor_meta")
    if known is not None and len(known.shape) != rank:
        return because(NotFused.OTHER_RANK, len(known.shape), rank)
    return None


def _fold_norm(module: fx.GraphModule, node: fx.Node, follower: fx.Node, may_guard: bool) -> None:
    """Fold the normalization that follows into a node's module."""
    float_module, norm = module.get_submodule(str(node.target)), module.get_submodule(str(follower.target))
    norm_type, rank = _NORMS[type(float_module)]
    if node.meta.get("tensor_meta") is None and norm_type is nn.BatchNorm1d and may_guard:
        _guard_rank(module.graph, node, rank)
    edit.swap_module(module, str(node.target), folded(float_module, norm))


def _guard_rank(graph: fx.Graph, node: fx.Node, rank: int) -> None:
    """Assert in the graph that a value has the rank for which a BatchNorm1d was folded: it accepts another one too."""
    with graph.inserting_after(node):
        dim = graph.call_method("dim", (node,))
    with graph.inserting_after(dim):
        is_right = graph.call_function(operator.eq, (dim, rank))
    message = f"{node.name}: its BatchNorm1d was folded for {rank}-D values; call fuse_fx with example_inputs"
    with graph.inserting_after(is_right):
        graph.call_function(torch._assert, (is_right, message))


def folded(module: Any, norm: Any) -> nn.Module:
    """Return a module whose weights include the normalization: w' = w γ / √(σ² + ε), b' = (b - μ) γ / √(σ² + ε) + β."""
    twin: Any = edit.mirror(module)
    wide = torch.float64  # folded once, so rounded once
    gain = (norm.running_var.to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().to(wide)
    shift = norm.bias.detach().to(wide) if norm.bias is not None else torch.zeros_like(gain)
    bias = module.bias.detach().to(wide) if module.bias is not None else torch.zeros_like(gain)
    weight = module.weight.detach()
    if isinstance(module, _TRANSPOSED):  # (in, out / groups, …): each group of inputs has its own slice of outputs
        per_group = gain.view(module.groups, 1, -1).expand(-1, module.in_channels // module.groups, -1)
        factor = per_group.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    else:
        factor = gain.view(-1, *[1] * (weight.dim() - 1))
    twin.weight = nn.Parameter((weight.to(wide) * factor).to(weight.dtype), module.weight.requires_grad)
    folded_bias = (bias - norm.running_mean.to(wide)) * gain + shift
    twin.bias = nn.Parameter(folded_bias.to(weight.dtype), module.weight.requires_grad)
    return twin  # type: ignore[no-any-return]


def _is_rectified(module: fx.GraphModule, node: fx.Node, follower: fx.Node) -> bool:
    """Return whether the next node is a ReLU that a node can do itself."""
    if node.op == "call_function":
        is_layer = node.target in (F.linear, linear_relu)
    else:
        is_layer = type(_module_of(module, node, nn.Module)) in WITH_RELU
    return is_layer and is_relu(module, follower)


def _absorb_relu(module: fx.GraphModule, node: fx.Node, _follower: fx.Node, _may_guard: bool) -> None:
    """Let a node do the ReLU after it."""
    if node.op == "call_function":
        node.target = linear_relu
        return
    float_module = module.get_submodule(str(node.target))
    fused = edit.mirror(float_module)
    fused.__class__ = WITH_RELU[type(float_module)]
    edit.swap_module(module, str(node.target), fused)


def _absorb_relus(scene: _Scene, node: fx.Node) -> list[str]:
    """Let a module that is called several times, each time before a ReLU, do them all; return their paths."""
    module, target = scene.module, str(node.target)
    if node.op != "call_module" or target in scene.hooked or _reads(module, target):
        return []
    calls = [n for n in module.graph.nodes if n.op == "call_module" and n.target == target]
    relus = [next(iter(call.users)) for call in calls if len(call.users) == 1]
    if len(calls) == 1 or calls[:1] != [node] or len(calls) != len(relus):
        return []
    if not all(_is_rectified(module, node, relu) for relu in relus):
        return []
    taken = [str(relu.target) for relu in relus if relu.op == "call_module"]
    if set(taken) & scene.hooked or any(_refuse_used(scene, node, relu) for relu in relus):
        return []
    _absorb_relu(module, node, relus[0], False)
    for call, relu in zip(calls, relus, strict=True):
        relu.replace_all_uses_with(call)
        module.graph.erase_node(relu)
        _drop_unused(module, relu, scene.kept)
    return list(map(_place, relus))


def _reads(module: fx.GraphModule, target: str) -> list[fx.Node]:
    """Return the nodes that read the tensors of the module at a path."""
    return [n for n in module.graph.nodes if n.op == "get_attr" and str(n.target).startswith(f"{target}.")]


def is_relu(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node is a ReLU, in any spelling."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is nn.ReLU
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS
    return node.op == "call_method" and node.target in _RELU_METHODS


_NORM = _Step(_is_normed, _refuse_norm, _fold_norm)
_RELU = _Step(_is_rectified, lambda *_: None, _absorb_relu)
