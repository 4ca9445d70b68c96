"""First pass: a float model becomes a graph whose leaves are what the operator table knows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.utils import _pytree as pytree

from fxquant.errors import ModelStateError, TraceError
from fxquant.graph import edit
from fxquant.graph.preserve.attributes import Attributes, attributes_of, noted, watched
from fxquant.graph.preserve.bound import carry, give_class_values
from fxquant.graph.preserve.preserve import Keep, Preserved, with_reached
from fxquant.graph.trace.exported import give_scopes, raise_calls
from fxquant.graph.trace.fold import fold
from fxquant.graph.trace.leaves import make_plain
from fxquant.graph.trace.names import taken_names
from fxquant.graph.trace.tracer import SCOPE, TRACING, Tracer, is_fresh
from fxquant.operators import Operator

_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""Wrappers around a model, and the attribute that holds it."""


@dataclass(frozen=True)
class Names:
    """What a model's parts are called. aliases: each module's path, and all the paths that the same module has."""

    aliases: dict[str, tuple[str, ...]]
    tensors: frozenset[str]  # the paths of its parameters, buffers and plain tensors, which a graph has as buffers
    weights: frozenset[str]  # of those with two or more dimensions
    kinds: frozenset[type]  # the types of its modules, and those that they derive from


def names_of(model: nn.Module) -> Names:
    """Return what a model's parts are called."""
    named = (model.named_parameters, model.named_buffers)
    tensors = {name: tensor for each in named for name, tensor in each(remove_duplicate=False)}
    for path, module in model.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        tensors.update({f"{path}.{name}" if path else name: value for name, value in plain.items()})
    weights = frozenset(name for name, tensor in tensors.items() if not is_lazy(tensor) and tensor.dim() > 1)
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    aliases = {path: tuple(same) for same in paths.values() for path in same}
    kinds = frozenset(kind for module in model.modules() for kind in type(module).__mro__)
    return Names(aliases, frozenset(tensors), weights, kinds)


@dataclass(frozen=True)
class Traced:
    """A traced model: the graph over a mirror of it, and what the later passes need to know of the original."""

    module: fx.GraphModule
    names: Names  # of the original
    hooked: frozenset[str]  # the paths of its modules that have hooks
    constants: dict[str, Any]  # the arguments that the graph is made for
    untraced: dict[str, str]  # the paths of modules that do not trace and are called as they are, and why
    doubtful: frozenset[str]  # the paths of modules that hold state, or make tensors of their own, in forward
    keep: Keep = Keep()  # noqa: RUF009
    attributes: Attributes = field(default_factory=Attributes)  # what became of those that forward reads

    @property
    def kept(self) -> dict[str, Any]:
        """What a Record remembers of this, by its fields' names."""
        nodes = self.module.graph.find_nodes(op="get_attr")
        live = self.attributes.live & {str(node.target) for node in nodes}
        return {
            "preserved": self.keep.preserved,
            "live": tuple(sorted(live)),
            "checked": tuple(self.attributes.checked),
            "fixed": frozenset(self.attributes.read),
            "baked": {path: value for path, value in self.attributes.baked.items() if self._may_be_set(path)},
            "written": self.keep.written,
        }

    def _may_be_set(self, path: str) -> bool:
        """Return whether a traced module has a place for an attribute, and no use of its own for it."""
        owner, _, name = path.rpartition(".")
        if path in self.attributes.live or name in taken_names():
            return False
        return not owner or any(path == owner and type(part) is nn.Module for path, part in self.module.named_modules())


def _attributes(root: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what the Python attributes of each module in a tree now are, by the module's path."""
    return {path: dict(vars(module)) for path, module in root.named_modules()}


def _restore(root: nn.Module, before: dict[str, dict[str, Any]]) -> None:
    """Give a tree the attributes back that it had: what forward set, to stand-ins perhaps, kept code shall not meet."""
    for path, held in before.items():
        now = vars(root.get_submodule(path))
        for name in now.keys() - held.keys():
            if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(now[name])):
                del now[name]
        now.update(held)


def _doubtful(root: nn.Module, graph: fx.Graph, before: dict[str, dict[str, Any]]) -> frozenset[str]:
    """Return the paths of modules whose forward set an attribute, or made a tensor of its own, while it was traced."""
    after = _attributes(root)
    kept = {
        path
        for path, held in before.items()
        if any(held.get(name, held) is not value for name, value in after.get(path, {}).items())
    }
    return frozenset(kept | {node.meta[SCOPE] for node in graph.nodes if is_fresh(node)}) - {""}


class _UntraceableError(Exception):
    """Tracing failed in the module at a path ("" is the root), when there were so many nodes."""

    def __init__(self, path: str, error: Exception, nodes: int) -> None:
        super().__init__(path)
        self.path, self.error, self.nodes = path, error, nodes


def trace(
    model: nn.Module,
    operators: Sequence[Operator],
    device: str | None = None,
    constants: Mapping[str, Any] | None = None,
    untraced: Mapping[str, str] | None = None,
    keep_whole: bool = False,
    keep: Keep = Keep(),  # noqa: B008
    folds: bool = True,
) -> Traced:
    """Return a model's graph over a mirror of its modules and tensors, whose hooks are left off meanwhile.

    constants: arguments that are fixed, and asserted. untraced: submodules known not to trace. keep_whole: whether one
    that turns out not to trace is called as it is, the innermost first, rather than an error. folds: whether weights
    that are computed from constants are computed now. keep: what the graph keeps beside forward, and what forward
    writes into.

    Raises ModelStateError for a model in training mode or with lazy parameters, TraceError for one that torch.fx cannot
    trace, naming the user's file and line.
    """
    check_model(model)
    hooked = frozenset(name for name, module in model.named_modules() if name and edit.has_hooks(module))
    kept = dict(untraced or {})
    while True:
        tracer = functools.partial(Tracer, operators, hooked | kept.keys())  # inlining a module would lose its hooks
        try:
            root, graph, doubtful, attributes = _graph_of(_Source(model, device, keep), tracer, constants)
            break
        except _UntraceableError as failure:
            error = failure.error
            if not keep_whole or not failure.path or failure.path in kept:
                raise _trace_error(model, error) from error
            kept[failure.path] = f"{first_line(error)}, at {edit.user_frame(error) or 'a place inside torch'}"
    whole = sorted({str(node.target) for node in graph.find_nodes(op="call_module")})
    keep = keep._replace(preserved=with_reached(keep.preserved, root, whole))
    raise_calls(root, graph)
    if isinstance(model, fx.GraphModule):
        give_scopes(graph)
    name = model.__class__.__name__
    _refuse_taken(name, graph)
    if folds:
        fold(root, graph, operators, hooked | kept.keys(), keep)
    module = fx.GraphModule(root, graph, name)
    carry(root, module, keep.preserved)
    fixed = dict(constants or {})
    return Traced(module, names_of(root), hooked, fixed, kept, doubtful, keep, attributes)


class _Source(NamedTuple):
    """What mirrors to trace are made of."""

    model: nn.Module
    device: str | None
    keep: Keep


def _graph_of(
    source: _Source, make_tracer: Callable[[], Tracer], constants: Mapping[str, Any] | None
) -> tuple[nn.Module, fx.Graph, frozenset[str], Attributes]:
    """Return what `_graph` does; where live is None, with all the attributes as nodes with which forward traces."""
    found, live = attributes_of(source.model, source.keep.preserved), source.keep.live
    may_be_set = found.settable

    def attempt(live: Collection[str]) -> tuple[nn.Module, fx.Graph, frozenset[str], Attributes]:
        return _graph(source, make_tracer, constants, replace(found, live=frozenset(live)))

    if live is not None or not may_be_set:
        return attempt(live or ())
    try:
        return attempt(may_be_set)
    except _UntraceableError:
        steers = []
        for path in may_be_set:
            try:
                attempt((path,))
            except _UntraceableError:
                steers.append(path)
    return attempt([path for path in may_be_set if path not in steers] if len(steers) < len(may_be_set) else ())


def _graph(
    source: _Source, make_tracer: Callable[[], Tracer], constants: Mapping[str, Any] | None, wanted: Attributes
) -> tuple[nn.Module, fx.Graph, frozenset[str], Attributes]:
    """Return a mirror of a model, its graph, the paths of modules that are not sure to be what their graph says, and
    what became of the attributes.

    Forward meets buffers as they are, and so may branch on their values, unless it writes into one, or slices one by an
    input's size, or kept code may write into one: then buffers must be nodes.
    """
    failures = []
    model, device, (preserved, _, written) = source
    nodes_first = _keeps_buffers(model, preserved)
    for buffers_are_nodes in (nodes_first, not nodes_first):
        root, tracer = edit.mirror(model, device, hooks=False, written=written), make_tracer()
        make_plain(root)
        give_class_values(root, preserved)
        states = replace(wanted, read={}, checked={}, baked={})
        tracer.proxy_buffer_attributes = buffers_are_nodes
        buffers, attributes = _buffers(root), _attributes(root)
        try:
            watching = watched(root, tracer, states) if preserved.names else nullcontext()
            with TRACING, torch.no_grad(), noted(root, states.baked), watching:
                graph = tracer.trace(root, dict(constants) if constants else None)
        except Exception as error:
            failures.append(_UntraceableError(tracer.failed, error, len(tracer.graph.nodes)))
            continue
        if buffers_are_nodes or _is_as_it_was(buffers, _buffers(root)):
            if device is not None:
                _move_constants(graph, torch.device(device))
            doubtful = _doubtful(root, graph, attributes)
            if preserved.names:
                _restore(root, attributes)
            return root, graph, doubtful, states
    raise max(failures, key=lambda failure: failure.nodes)  # what stopped the one that got further


def _keeps_buffers(model: nn.Module, preserved: Preserved) -> bool:
    """Return whether kept code has buffers of the model at hand."""
    own = preserved.owner is not None and any(name in model._buffers for name in preserved.kept)
    return own or any(True for module in preserved.modules(model) for _ in module._buffers)


def _refuse_taken(model: str, graph: fx.Graph) -> None:
    """Raise TraceError for a part whose name a graph module has for itself: it would be asked for in vain there."""
    for node in graph.nodes:
        name = str(node.target).partition(".")[0]
        if node.op in ("call_module", "get_attr") and name in taken_names():
            raise TraceError(
                f"{model} has a part self.{name}, but in the graph module that a traced model becomes {name!r} is "
                "something else; give the part another name"
            )


def _move_constants(graph: fx.Graph, device: torch.device) -> None:
    """Put the CPU, where a checkpoint's tensors come, in the place of a device that forward read off the mirror."""

    def moved(value: Any) -> Any:
        return torch.device("cpu") if value == device else value

    for node in graph.nodes:
        node.args, node.kwargs = (fx.node.map_aggregate(part, moved) for part in (node.args, node.kwargs))


def _buffers(root: nn.Module) -> list[tuple[torch.Tensor, int]]:
    """Return each buffer, and how often it was written into."""
    return [(buffer, 0 if buffer.is_inference() else buffer._version) for buffer in root.buffers()]


def _is_as_it_was(before: list[tuple[torch.Tensor, int]], after: list[tuple[torch.Tensor, int]]) -> bool:
    """Return whether no buffer was set or written into in between."""
    return [(id(buffer), version) for buffer, version in before] == [(id(buffer), version) for buffer, version in after]


def wrapped_in(module: nn.Module) -> str:
    """Return the attribute that holds what a wrapper is around, "" for a module that is no wrapper."""
    inner = _WRAPPERS.get(type(module).__name__, "")
    return inner if inner and hasattr(module, inner) else ""


def check_kind(model: Any) -> None:
    """Raise ModelStateError unless this is a module whose parameters have shapes, and neither wrapped nor compiled."""
    if not isinstance(model, nn.Module):
        cure = "; pass its module: program.module()" if isinstance(model, torch.export.ExportedProgram) else ""
        raise ModelStateError(f"expected a torch.nn.Module, got {type(model).__name__}{cure}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelStateError("TorchScript models cannot be quantized; pass the nn.Module that it was made from")
    if wrapped_in(model):
        raise ModelStateError(
            f"{type(model).__name__} is a wrapper; pass the model inside it: model.{wrapped_in(model)}"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelStateError(f"{name!r} is lazy and has no shape yet; run the model once on real input first")


def check_model(model: Any) -> None:
    """Raise ModelStateError unless `check_kind` lets it pass and it is in eval mode, its forward in its class."""
    check_kind(model)
    if "forward" in vars(model):
        raise ModelStateError(
            f"the forward of this {type(model).__name__} was replaced on the instance, where torch.fx does not see it; "
            "define it in a class"
        )
    if model.training:
        raise ModelStateError(f"{type(model).__name__} is in training mode; call model.eval() first")


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _trace_error(model: nn.Module, error: Exception) -> TraceError:
    """Return the error that says where tracing failed, why, and what to try."""
    where = edit.user_frame(error)
    home = type(model).__module__
    return TraceError(
        f"{type(model).__name__} does not trace: {first_line(error)}\n"
        f"  at {where or f'{home}.{type(model).__name__}.forward; put the module inside one of your own, as a leaf'}\n"
        "  torch.fx runs forward once with stand-ins for tensors, so Python cannot branch on, loop over or convert "
        "their values there; without a graph only its modules could be quantized, and none can. Try one of:\n"
        "  - write the choice with tensors (torch.where) or base it on a module attribute;\n"
        "  - make tensors of an input's size from that: x.new_zeros(x.shape[0], 8), not torch.zeros(x.shape[0], 8);\n"
        "  - move that part into a function and mark it with torch.fx.wrap;\n"
        "  - hold the weights in modules (nn.Linear for F.linear), which are swapped where they stand."
    )
