"""First pass: a float model becomes a graph whose leaves are what the operator table knows."""

from __future__ import annotations

import functools
import inspect
import keyword
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.nn.utils import rnn

from fxquant import ops
from fxquant.errors import ModelStateError, TraceError
from fxquant.graph import call, edit
from fxquant.graph.kinds import base_of, make_plain
from fxquant.nn import QuantizedModule
from fxquant.nn.transformer import PLAIN_FORWARDS
from fxquant.operators import Operator

_LEAF_FUNCTIONS = (
    rnn.pack_padded_sequence,
    rnn.pad_packed_sequence,
    rnn.pack_sequence,
    rnn.unpack_sequence,
    rnn.pad_sequence,
    rnn.unpad_sequence,
    ops.linear,
    ops.embedding,
    ops.embedding_bag,
)
"""Functions that are calls in the graph instead of being traced through: torch's that look at values, and ours."""

_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""Wrappers around a model, and the attribute that holds it."""

TRACING = threading.RLock()
"""Held while torch.fx traces: it patches nn.Module for the whole process, one trace at a time."""

SCOPE = "fxquant_scope"
"""The key in node.meta of the path of the module whose forward made the node."""


@dataclass(frozen=True)
class Names:
    """What a model's parts are called. aliases: each module's path, and all the paths that the same module has."""

    aliases: dict[str, tuple[str, ...]]
    tensors: frozenset[str]  # the paths of its parameters and buffers
    weights: frozenset[str]  # of those with two or more dimensions
    kinds: frozenset[type]  # the types of its modules, and those that they derive from


def names_of(model: nn.Module) -> Names:
    """Return what a model's parts are called."""
    named = (model.named_parameters, model.named_buffers)
    tensors = {name: tensor for each in named for name, tensor in each(remove_duplicate=False)}
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


class _Tracer(fx.Tracer):
    """torch.fx's tracer, with leaves of ours, stack traces, and each node's scope."""

    record_stack_traces = True

    def __init__(self, operators: Sequence[Operator] = (), whole: frozenset[str] = frozenset()) -> None:
        """operators: the table, whose modules are leaves. whole: paths of modules that must not be traced through."""
        super().__init__(autowrap_functions=_LEAF_FUNCTIONS, param_shapes_constant=True)
        self._autowrap_search.append(rnn)  # also where a model calls them as nn.utils.rnn.pack_padded_sequence
        self._operators, self._whole, self._thread = operators, whole, threading.get_ident()
        self.failed = ""  # the path of the innermost module in which tracing failed; "" is the root
        self._autocast = _autocast()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is called as it is, rather than traced through."""
        return (
            (super().is_leaf_module(m, module_qualified_name) and forward_of(m) not in PLAIN_FORWARDS)
            or module_qualified_name in self._whole
            or "forward" in vars(m)  # replaced on the instance, perhaps by a closure over the original
            or isinstance(m, (QuantizedModule, torch.jit.ScriptModule))
            or base_of(m, self._operators) is not None
        )

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return what a module's call gives, and remember where it failed.

        torch.fx patches every module's call while it traces; those of other threads go their own way.
        """
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        _refuse_keywords(path)  # here it counts as a failure of the caller
        try:
            plain = PLAIN_FORWARDS.get(forward_of(m))
            return super().call_module(m, functools.partial(plain, m) if plain else forward, args, kwargs)
        except Exception:
            self.failed = self.failed or path
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return what forward gets for an attribute; torch.fx's own cannot do buffers beside param_shapes_constant."""
        if threading.get_ident() != self._thread:
            return attr_val
        if self.proxy_buffer_attributes and isinstance(attr_val, torch.Tensor):
            name = next((name for name, buffer in self.root.named_buffers() if buffer is attr_val), None)
            if name is not None:
                if name not in parameter_proxy_cache:
                    parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
                return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """Return a value as an operand; the transpose of a buffer, which forward meets as it is, keeps its name."""
        base = a._base if isinstance(a, torch.Tensor) and not a.is_inference() else None
        if base is not None and base.dim() == 2 and (a.shape, a.stride()) == (base.T.shape, base.T.stride()):
            name = next((name for name, buffer in self.root.named_buffers() if buffer is base), None)
            if name is not None and threading.get_ident() == self._thread:
                return self.create_node("call_method", "t", (self.create_node("get_attr", name, (), {}),), {})
        return super().create_arg(a)

    def create_node(self, kind: str, target: Any, args: tuple[Any, ...], *rest: Any, **named: Any) -> fx.Node:
        """Return a node that knows its scope; refuse what a graph would silently compute otherwise."""
        if _autocast() != self._autocast:
            raise RuntimeError("forward enters torch.autocast, which a graph does not hold; enter it around the call")
        if kind == "call_method" and target.endswith("_") and not target.endswith("__") and _is_fresh(args[0]):
            raise RuntimeError(
                f"forward writes (.{target}) into a tensor that it makes itself, which a graph makes only once; "
                "make it from an input: x.new_zeros(...)"
            )
        if kind == "get_attr":
            _refuse_keywords(target)
        node = super().create_node(kind, target, args, *rest, **named)
        node.meta[SCOPE] = self.scope.module_path
        return node

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Return what to call and its stand-ins; where arguments are fixed, forward gets their values.

        torch.fx's own way cannot name keyword-only arguments, nor unpack *args and **kwargs.
        """
        if not concrete_args:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        hints = getattr(inspect.unwrap(root_fn), "__annotations__", {})
        signature = inspect.signature(self.root.forward)
        bound = signature.bind_partial()
        has_rest = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values())
        for parameter in signature.parameters.values():
            name = f"{call.STARS.get(parameter.kind, '')}{parameter.name}"
            default = () if parameter.default is parameter.empty else (parameter.default,)
            value: Any = self.create_proxy("placeholder", name, default, {}, type_expr=hints.get(parameter.name))
            if name in concrete_args:
                fixed = concrete_args[name]
                self.create_proxy("call_function", call.check_argument, (value, name, fixed), {})
                value = call.unpacked(parameter.kind, value, fixed)
            if value is not parameter.default or has_rest:  # a decorator may look at which arguments are given
                bound.arguments[parameter.name] = value

        def forward() -> Any:
            return root_fn(self.root, *bound.args, **bound.kwargs)

        forward.__annotations__ = {"return": hints["return"]} if "return" in hints else {}
        return forward, []

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of a module, its placeholders named as forward's arguments."""
        plain = PLAIN_FORWARDS.get(forward_of(root))
        if plain is not None:  # torch.fx takes the root's forward from its class
            root.__class__ = type(type(root).__name__, (type(root),), {"forward": plain})
        with register_module_buffer_registration_hook(_refuse_stand_in):
            graph = super().trace(root, concrete_args)
        graph._tracer_cls = _Retracer  # what torch.fx unpickles with
        graph.set_codegen(call.SignatureCodeGen(root))
        graph.output_node().type = inspect.unwrap(type(root).forward).__annotations__.get("return")
        for node in graph.nodes:
            if node.target in _LEAF_FUNCTIONS:
                node.meta.pop("is_wrapped", None)  # torch.fx would write a wrap("torch.nn…") that breaks later traces
            node.meta.pop("nn_module_stack", None)  # it holds classes, which pickle may not find
            if isinstance(node.type, str) or "<locals>" in getattr(node.type, "__qualname__", ""):
                node.type = None  # an annotation that pickle could not import
        return graph


class _Retracer(_Tracer):
    """Traces the code of one of our graphs once more, as torch.fx does to unpickle it: a node for each line."""

    proxy_buffer_attributes = True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return what the code gets for an attribute: for a buffer always a node."""
        cache = parameter_proxy_cache if isinstance(attr_val, nn.Parameter) else {}
        return super().getattr(attr, attr_val, cache)


def _autocast() -> tuple[torch.dtype | None, ...]:
    """Return what torch.autocast now casts to, a device type at a time; None where it is off."""
    return tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")
    )


def _refuse_keywords(path: str) -> None:
    """Raise RuntimeError for a path that a graph's code cannot say."""
    for name in path.split("."):
        if keyword.iskeyword(name):
            raise RuntimeError(
                f"{path!r} has the Python keyword {name!r} in it, which generated code cannot say; rename it"
            )


def _refuse_stand_in(_: nn.Module, name: str, value: Any) -> None:
    """Raise TypeError where forward sets a buffer to what it computes: a graph reads buffers, and sets none."""
    if isinstance(value, fx.Proxy):
        raise TypeError(
            f"forward sets the buffer {name!r} (by = or +=), which a graph does not hold; write into it: "
            f"self.{name}.add_(...), self.{name}.copy_(...)"
        )


def _is_fresh(operand: Any) -> bool:
    """Return whether a node is a tensor that is neither the model's nor an input's."""
    return isinstance(operand, fx.Node) and operand.op == "get_attr" and str(operand.target).startswith("_tensor_con")


def _attributes(root: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what the Python attributes of each module in a tree now are, by the module's path."""
    return {path: dict(vars(module)) for path, module in root.named_modules()}


def _doubtful(root: nn.Module, graph: fx.Graph, before: dict[str, dict[str, Any]]) -> frozenset[str]:
    """Return the paths of modules whose forward set an attribute, or made a tensor of its own, while it was traced."""
    after = _attributes(root)
    kept = {
        path
        for path, held in before.items()
        if any(held.get(name, held) is not value for name, value in after.get(path, {}).items())
    }
    return frozenset(kept | {node.meta[SCOPE] for node in graph.nodes if _is_fresh(node)}) - {""}


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
) -> Traced:
    """Return a model's graph over a mirror of its modules and tensors, whose hooks are left off meanwhile.

    constants: arguments that are fixed, and asserted. untraced: submodules known not to trace. keep_whole: whether one
    that turns out not to trace is called as it is, the innermost first, rather than an error.

    Raises ModelStateError for a model in training mode or with lazy parameters, TraceError for one that torch.fx cannot
    trace, naming the user's file and line.
    """
    check_model(model)
    hooked = frozenset(name for name, module in model.named_modules() if name and edit.has_hooks(module))
    kept = dict(untraced or {})
    while True:
        tracer = functools.partial(_Tracer, operators, hooked | kept.keys())  # inlining a module would lose its hooks
        try:
            root, graph, doubtful = _graph(model, tracer, device, constants)
            break
        except _UntraceableError as failure:
            error = failure.error
            if not keep_whole or not failure.path or failure.path in kept:
                raise _trace_error(model, error) from error
            kept[failure.path] = f"{first_line(error)}, at {edit.user_frame(error) or 'a place inside torch'}"
    name = model.__class__.__name__
    return Traced(fx.GraphModule(root, graph, name), names_of(root), hooked, dict(constants or {}), kept, doubtful)


def _graph(
    model: nn.Module, make_tracer: Callable[[], _Tracer], device: str | None, constants: Mapping[str, Any] | None
) -> tuple[nn.Module, fx.Graph, frozenset[str]]:
    """Return a mirror of a model, its graph, and the paths of modules that are not sure to be what their graph says.

    Forward meets buffers as they are, and so may branch on their values, unless it writes into one, or slices one by an
    input's size: then buffers must be nodes.
    """
    failures = []
    for buffers_are_nodes in (False, True):
        root, tracer = edit.mirror(model, device, hooks=False), make_tracer()
        make_plain(root)
        tracer.proxy_buffer_attributes = buffers_are_nodes
        buffers, attributes = _buffers(root), _attributes(root)
        try:
            with TRACING, torch.no_grad():
                graph = tracer.trace(root, dict(constants) if constants else None)
        except Exception as error:
            failures.append(_UntraceableError(tracer.failed, error, len(tracer.graph.nodes)))
            continue
        if buffers_are_nodes or _is_as_it_was(buffers, _buffers(root)):
            return root, graph, _doubtful(root, graph, attributes)
    raise max(failures, key=lambda failure: failure.nodes)  # what stopped the one that got further


def _buffers(root: nn.Module) -> list[tuple[torch.Tensor, int]]:
    """Return each buffer, and how often it was written into."""
    return [(buffer, 0 if buffer.is_inference() else buffer._version) for buffer in root.buffers()]


def _is_as_it_was(before: list[tuple[torch.Tensor, int]], after: list[tuple[torch.Tensor, int]]) -> bool:
    """Return whether no buffer was set or written into in between."""
    return [(id(buffer), version) for buffer, version in before] == [(id(buffer), version) for buffer, version in after]


def forward_of(module: nn.Module) -> Any:
    """Return the forward of a module's class as it stands there: TorchScript's cannot be asked for."""
    return inspect.getattr_static(type(module), "forward", None)


def wrapped_in(module: nn.Module) -> str:
    """Return the attribute that holds what a wrapper is around, "" for a module that is no wrapper."""
    inner = _WRAPPERS.get(type(module).__name__, "")
    return inner if hasattr(module, inner) else ""


def check_kind(model: Any) -> None:
    """Raise ModelStateError unless this is a module whose parameters have shapes, and neither wrapped nor compiled."""
    if not isinstance(model, nn.Module):
        raise ModelStateError(f"expected a torch.nn.Module, got {type(model).__name__}")
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
        "  - move that part into a function and mark it with torch.fx.wrap;\n"
        "  - hold the weights in modules (nn.Linear for F.linear), which are swapped where they stand."
    )
