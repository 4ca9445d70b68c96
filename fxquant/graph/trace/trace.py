"""First pass: a float model becomes a graph whose leaves are what the operator table knows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fxquant.errors import TraceError
from fxquant.graph import edit
from fxquant.graph.preserve.attributes import Attributes, attributes_of, noted, watched
from fxquant.graph.preserve.bound import carry, give_class_values
from fxquant.graph.preserve.preserve import Keep, Preserved, with_reached
from fxquant.graph.trace.aten import lift_calls
from fxquant.graph.trace.checks import check_model, first_line, trace_error
from fxquant.graph.trace.exported import give_scopes
from fxquant.graph.trace.fold import fold
from fxquant.graph.trace.leaves import make_plain
from fxquant.graph.trace.names import taken_names
from fxquant.graph.trace.tracer import SCOPE, TRACING, Tracer, is_fresh
from fxquant.operators import Operator


@dataclass(frozen=True)
class Names:
    """The names of a model's parts. aliases: by each path of a module, all paths of that module."""

    aliases: dict[str, tuple[str, ...]]
    tensors: frozenset[str]  # the paths of its parameters, buffers and plain tensors, which a graph has as buffers
    weights: frozenset[str]  # of those with two or more dimensions
    types: frozenset[type]  # the types of its modules, and those that they derive from


def names_of(model: nn.Module) -> Names:
    """Return the names of a model's parts."""
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
    types = frozenset(cls for module in model.modules() for cls in type(module).__mro__)
    return Names(aliases, frozenset(tensors), weights, types)


@dataclass(frozen=True)
class Traced:
    """A traced model: the graph over a mirror of it, and what the later passes need to know about the original."""

    module: fx.GraphModule
    names: Names  # of the original
    hooked: frozenset[str]  # the paths of its modules that have hooks
    constants: dict[str, Any]  # the arguments that the graph is specialized for
    untraced: dict[str, str]  # the paths of modules that do not trace and are called as they are, and why
    doubtful: frozenset[str]  # the paths of modules that hold state, or make tensors of their own, in forward
    keep: Keep = Keep()  # noqa: RUF009
    attributes: Attributes = field(default_factory=Attributes)  # those that forward reads, and how the graph has them

    @property
    def kept(self) -> dict[str, Any]:
        """What a Record keeps of this, by its fields' names."""
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
        """Return whether the traced model can hold an attribute, and does not use its name itself."""
        owner, _, name = path.rpartition(".")
        if path in self.attributes.live or name in taken_names():
            return False
        return not owner or any(path == owner and type(part) is nn.Module for path, part in self.module.named_modules())


def _attributes(root: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the present Python attributes of each module in a tree, by its path."""
    return {path: dict(vars(module)) for path, module in root.named_modules()}


def _restore(root: nn.Module, before: dict[str, dict[str, Any]]) -> None:
    """Restore the attributes of a tree, so that kept code does not meet what forward set, perhaps to stand-ins."""
    for path, held in before.items():
        now = vars(root.get_submodule(path))
        for name in now.keys() - held.keys():
            if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(now[name])):
                del now[name]
        now.update(held)


def _doubtful(root: nn.Module, graph: fx.Graph, before: dict[str, dict[str, Any]]) -> frozenset[str]:
    """Return the paths of modules whose forward set an attribute, or made its own tensor, during tracing."""
    after = _attributes(root)
    kept = {
        path
        for path, held in before.items()
        if any(held.get(name, held) is not value for name, value in after.get(path, {}).items())
    }
    return frozenset(kept | {node.meta[SCOPE] for node in graph.nodes if is_fresh(node)}) - {""}


class _UntraceableError(Exception):
    """Tracing failed in the module at a path ("" is the root), after so many nodes."""

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
    in_training: bool = False,
) -> Traced:
    """Return a model's graph over a mirror of its modules and tensors, whose hooks are left off meanwhile.

    constants: arguments that are fixed, and checked. untraced: submodules known not to trace. keep_whole: whether a
    submodule that turns out not to trace is called as it is, the innermost first, instead of an error. keep: what the
    graph keeps besides forward, and what forward writes into. folds: whether weights that are computed from constants
    are computed now. in_training: whether the model is in training mode, not eval mode. Raises
    ModelStateError for a model in the other mode or with lazy parameters, TraceError if torch.fx fails.
    """
    check_model(model, in_training)
    hooked = _hooked(model)
    kept = dict(untraced or {})
    while True:
        tracer = functools.partial(Tracer, operators, hooked | kept.keys())  # inlining a module would lose its hooks
        try:
            root, graph, doubtful, attributes = _graph_of(_Source(model, device, keep), tracer, constants)
            break
        except _UntraceableError as failure:
            error = failure.error
            if not keep_whole or not failure.path or failure.path in kept:
                raise trace_error(model, error) from error
            kept[failure.path] = f"{first_line(error)}, at {edit.user_frame(error) or 'a place inside torch'}"
    whole = sorted({str(node.target) for node in graph.find_nodes(op="call_module")})
    keep = keep._replace(preserved=with_reached(keep.preserved, root, whole))
    _finish(model, root, graph)
    if folds and not keep.recomputes:
        fold(root, graph, operators, hooked | kept.keys(), keep)
    module = fx.GraphModule(root, graph, type(model).__name__)
    carry(root, module, keep.preserved)
    return Traced(module, names_of(root), hooked, dict(constants or {}), kept, doubtful, keep, attributes)


def _hooked(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, module in model.named_modules() if name and edit.has_hooks(module))


def _finish(model: nn.Module, root: nn.Module, graph: fx.Graph) -> None:
    """Lift ATen calls, give the calls of a model that came as a graph their scopes, and refuse names that are taken."""
    lift_calls(root, graph)
    if isinstance(model, fx.GraphModule):
        give_scopes(graph)
    for node in graph.nodes:
        name = str(node.target).partition(".")[0]
        if node.op in ("call_module", "get_attr") and name in taken_names():
            raise TraceError(
                f"{type(model).__name__} has a part self.{name}, but in the graph module that a traced model becomes "
                f"{name!r} is something else; give the part another name"
            )


class _Source(NamedTuple):
    """What the mirrors to be traced are made from."""

    model: nn.Module
    device: str | None
    keep: Keep


def _graph_of(
    source: _Source, make_tracer: Callable[[], Tracer], constants: Mapping[str, Any] | None
) -> tuple[nn.Module, fx.Graph, frozenset[str], Attributes]:
    """Return what `_graph` returns. If live is None, all attributes are nodes with which forward still traces."""
    attributes, live = attributes_of(source.model, source.keep.preserved), source.keep.live
    may_be_set = attributes.settable

    def attempt(live: Collection[str]) -> tuple[nn.Module, fx.Graph, frozenset[str], Attributes]:
        return _graph(source, make_tracer, constants, replace(attributes, live=frozenset(live)))

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
    """Return a mirror of a model, its graph, the paths of modules whose graph may be wrong, and the attributes.

    Forward meets buffers as they are, and so can branch on their values. They are nodes if it writes into one or slices
    one by an input's size, or if kept code may write into one.
    """
    failures = []
    model, device, (preserved, _, written, recomputes, checks) = source
    nodes_first = _keeps_buffers(model, preserved)
    for buffers_are_nodes in (nodes_first, not nodes_first):
        root, tracer = edit.mirror(model, device, hooks=False, written=written), make_tracer()
        if not recomputes:
            make_plain(root)
        give_class_values(root, preserved)
        states = replace(wanted, read={}, checked={}, baked={})
        tracer.proxy_buffer_attributes, tracer.checks = buffers_are_nodes, checks
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
    raise max(failures, key=lambda failure: failure.nodes)  # of the attempt that got further


def _keeps_buffers(model: nn.Module, preserved: Preserved) -> bool:
    """Return whether kept code can reach buffers of the model."""
    has_own = preserved.owner is not None and any(name in model._buffers for name in preserved.kept)
    return has_own or any(True for module in preserved.modules(model) for _ in module._buffers)


def _move_constants(graph: fx.Graph, device: torch.device) -> None:
    """Replace a device that forward read off the mirror by the CPU, where a checkpoint's tensors are loaded."""

    def moved(value: Any) -> Any:
        return torch.device("cpu") if value == device else value

    for node in graph.nodes:
        node.args, node.kwargs = (fx.node.map_aggregate(part, moved) for part in (node.args, node.kwargs))


def _buffers(root: nn.Module) -> list[tuple[torch.Tensor, int]]:
    """Return the buffers, each with its version, which counts the writes."""
    return [(buffer, 0 if buffer.is_inference() else buffer._version) for buffer in root.buffers()]


def _is_as_it_was(before: list[tuple[torch.Tensor, int]], after: list[tuple[torch.Tensor, int]]) -> bool:
    """Return whether no buffer was set or written into meanwhile."""
    return [(id(buffer), version) for buffer, version in before] == [(id(buffer), version) for buffer, version in after]
