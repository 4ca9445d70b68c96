"""torch.fx's tracer with our leaves, which refuses what a graph would silently compute differently."""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import keyword
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.nn.utils import rnn

from fxquant.frames import caller
from fxquant.graph import edit
from fxquant.graph.constants import method_of
from fxquant.graph.preserve.attributes import Attributes, watched
from fxquant.graph.trace.conditions import check_condition, required_outcome
from fxquant.graph.trace.leaves import LEAF_FUNCTIONS, base_of
from fxquant.graph.trace.signature import STARS, SignatureCodeGen, check_argument, check_sizes, unpacked
from fxquant.graph.trace.sizes import Shapes, SizedProxy, as_sized
from fxquant.nn import QuantizedModule
from fxquant.nn.transformer import PLAIN_FORWARDS
from fxquant.operators import Operator

TRACING = threading.RLock()
"""Held during a trace: torch.fx patches nn.Module for the whole process."""

SCOPE = "fxquant_scope"
"""The key in node.meta for the path of the module whose forward made the node."""

BUFFERS_ARE_NODES = "fxquant_buffers_are_nodes"
"""The key in the output node's meta for whether forward met buffers as nodes, not as they are."""


class Tracer(fx.Tracer):
    """torch.fx's tracer, with our leaves, stack traces, and each node's scope."""

    record_stack_traces = True

    def __init__(self, operators: Sequence[Operator] = (), whole: frozenset[str] = frozenset()) -> None:
        """operators: the table, whose modules are leaves. whole: the paths of further leaves."""
        super().__init__(autowrap_functions=LEAF_FUNCTIONS, param_shapes_constant=True)
        self._autowrap_search += [rnn, torch]  # also where a model calls them as nn.utils.rnn.pack_padded_sequence
        self._operators, self._whole, self._thread = operators, whole, threading.get_ident()
        self.checks = False  # whether the graph checks conditions on which forward raises
        self.failed = ""  # the path of the innermost module in which tracing failed; "": the root
        self._autocast = _autocast()
        self.shapes: Shapes | None = None  # where sizes are numbers

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a node's stand-in."""
        return super().proxy(node) if self.shapes is None else SizedProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is called as it is, rather than traced through."""
        return (
            (super().is_leaf_module(m, module_qualified_name) and not _is_traced_through(m, module_qualified_name))
            or module_qualified_name in self._whole
            or "forward" in vars(m)  # replaced on the instance, perhaps by a closure over the original
            or isinstance(m, (QuantizedModule, torch.jit.ScriptModule))
            or base_of(m, self._operators) is not None
        )

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return the result of a module's call, and remember where it failed.

        torch.fx patches the calls of all modules while it traces; those in other threads run as usual.
        """
        if self._is_elsewhere():
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        _refuse_keywords(path)  # outside the try: this is a failure of the caller
        try:
            plain = PLAIN_FORWARDS.get(forward_of(m))
            return super().call_module(m, functools.partial(plain, m) if plain else forward, args, kwargs)
        except Exception:
            self.failed = self.failed or path
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return what forward gets for an attribute; torch.fx cannot combine buffers and param_shapes_constant."""
        if self._is_elsewhere():
            return attr_val
        if self.proxy_buffer_attributes and isinstance(attr_val, torch.Tensor):
            name = next((name for name, buffer in self.root.named_buffers() if buffer is attr_val), None)
            if name is not None:
                if name not in parameter_proxy_cache:
                    parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
                return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _is_elsewhere(self) -> bool:
        """Return whether a call is none that is traced: another thread's, or of a node whose shape is asked for."""
        return threading.get_ident() != self._thread or (self.shapes is not None and self.shapes.is_running)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Return what a condition has to be, lest forward raise, and make the graph check it; TraceError for others."""
        required = required_outcome(sys._getframe(2)) if self.checks else None
        if required is None:
            return super().to_bool(obj)
        self.create_proxy("call_function", check_condition, (obj, required, caller()), {})
        return required

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Yield the parts of what is split into a known number of them, which torch.fx knows only where it unpacks."""
        count = _count_parts(obj.node)
        return super().iter(obj) if count is None else (operator.getitem(obj, i) for i in range(count))

    def create_arg(self, a: Any) -> Any:
        """Return a value as an operand. The transpose of a buffer that forward meets as it is keeps the buffer's name.

        Subclasses of dict, list and tuple keep their types.
        """
        base = a._base if isinstance(a, torch.Tensor) and not a.is_inference() else None
        if base is not None and base.dim() == 2 and (a.shape, a.stride()) == (base.T.shape, base.T.stride()):
            name = next((name for name, buffer in self.root.named_buffers() if buffer is base), None)
            if name is not None and threading.get_ident() == self._thread:
                return self.create_node("call_method", "t", (self.create_node("get_attr", name, (), {}),), {})
        if isinstance(a, dict) and dataclasses.is_dataclass(a):  # an output of transformers; torch.fx forgets its type
            fields = {field.name: self.create_arg(getattr(a, field.name)) for field in dataclasses.fields(a)}
            return self.create_node("call_function", type(a), (), fields)
        plain = next((base for base in (dict, list, tuple) if isinstance(a, base)), None)
        if plain is not None and _is_subclass(type(a)):
            return self.create_node("call_function", type(a), (super().create_arg(plain(a)),), {})
        return super().create_arg(a)

    def create_node(self, kind: str, target: Any, args: tuple[Any, ...], *rest: Any, **named: Any) -> fx.Node:
        """Return a node that knows its scope; refuse what a graph would silently compute differently."""
        if _autocast() != self._autocast:
            raise RuntimeError("forward enters torch.autocast, which a graph cannot hold; enter it around the call")
        if kind == "call_method" and target.endswith("_") and not target.endswith("__") and is_fresh(args[0]):
            raise RuntimeError(
                f"forward writes (.{target}) into a tensor that it makes itself, which a graph makes only once; "
                "make it from an input: x.new_zeros(...)"
            )
        if kind == "get_attr":
            _refuse_keywords(target)
        if kind == "placeholder" and target.strip("*") == "self":
            raise RuntimeError("forward has a second argument 'self', which generated code cannot have; rename it")
        node = super().create_node(kind, target, args, *rest, **named)
        node.meta[SCOPE] = self.scope.module_path
        if node.name == "self":  # in generated code that is the graph's module
            node._rename("self_1")
        return node

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Return what to call and its stand-ins; for fixed arguments, forward gets their values.

        torch.fx itself cannot name keyword-only arguments, nor unpack *args and **kwargs.
        """
        if not concrete_args:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        hints = getattr(inspect.unwrap(root_fn), "__annotations__", {})
        signature = inspect.signature(self.root.forward)
        bound = signature.bind_partial()
        has_rest = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values())
        for parameter in signature.parameters.values():
            name = f"{STARS.get(parameter.kind, '')}{parameter.name}"
            default = () if parameter.default is parameter.empty else (parameter.default,)
            value: Any = self.create_proxy("placeholder", name, default, {}, type_expr=hints.get(parameter.name))
            if name in concrete_args:
                value = self._fix(parameter, name, value, concrete_args[name])
            if value is not parameter.default or has_rest:  # a decorator may look at which arguments are passed
                bound.arguments[parameter.name] = value

        def forward() -> Any:
            return root_fn(self.root, *bound.args, **bound.kwargs)

        forward.__annotations__ = {"return": hints["return"]} if "return" in hints else {}
        return forward, []

    def _fix(self, parameter: inspect.Parameter, name: str, value: fx.Proxy, fixed: Any) -> Any:
        """Let the graph check an argument that it is made for, and return what forward gets for it."""
        sized = as_sized(fixed)
        if sized is not None:
            self.create_proxy("call_function", check_sizes, (value, name, sized.bounds), {})
            return value
        self.create_proxy("call_function", check_argument, (value, name, fixed), {})
        return unpacked(parameter.kind, value, fixed)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of a module, its placeholders named as forward's arguments."""
        if any(as_sized(fixed) is not None for fixed in (concrete_args or {}).values()):
            self.shapes = Shapes(root, concrete_args or {})
        plain = PLAIN_FORWARDS.get(forward_of(root))
        if plain is not None:  # torch.fx takes the root's forward from its class
            root.__class__ = type(type(root).__name__, (type(root),), {"forward": plain})
        with register_module_buffer_registration_hook(_refuse_stand_in):
            graph = super().trace(root, concrete_args)
        for node in reversed(graph.find_nodes(op="call_method", target="size") if self.shapes else []):
            edit.erase_unread(graph, node)
        graph._tracer_cls = _Retracer  # what torch.fx unpickles with
        graph.set_codegen(SignatureCodeGen(root))
        graph.output_node().meta[BUFFERS_ARE_NODES] = self.proxy_buffer_attributes
        graph.output_node().type = inspect.unwrap(type(root).forward).__annotations__.get("return")
        for node in graph.nodes:
            if node.target in LEAF_FUNCTIONS:
                node.meta.pop("is_wrapped", None)  # torch.fx would write a wrap("torch.nn…") that breaks later traces
            node.meta.pop("nn_module_stack", None)  # it holds classes, which pickle may not find
            if isinstance(node.type, str) or "<locals>" in getattr(node.type, "__qualname__", ""):
                node.type = None  # an annotation that pickle could not import
        return graph


class _Retracer(Tracer):
    """Traces the code of one of our graphs again, as torch.fx does to unpickle it: a node for each line."""

    proxy_buffer_attributes = True

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of such code, in which reads of attributes are nodes too."""
        record = vars(root).get("_fxquant_record")
        if record is None:
            return super().trace(root, concrete_args)
        paths = (*record.live, *record.checked)
        with watched(root, self, Attributes(live=frozenset(paths)), only=paths):
            return super().trace(root, concrete_args)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return what the code gets for an attribute: a new node each time, unless it is a parameter."""
        cache = parameter_proxy_cache if isinstance(attr_val, nn.Parameter) else {}
        return super().getattr(attr, attr_val, cache)


def _is_subclass(container: type) -> bool:
    """Return whether a type of container is a user's, or OrderedDict, and can be made from a plain one."""
    is_known = container.__module__ in ("builtins", "collections") or container.__module__.startswith("torch.")
    return container is collections.OrderedDict or not (is_known or hasattr(container, "_fields"))


def _autocast() -> tuple[torch.dtype | None, ...]:
    """Return the dtypes that torch.autocast now casts to on each device type; None where it is off."""
    devices = ("cpu", "cuda")
    return tuple(torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in devices)


def _count_parts(node: fx.Node) -> int | None:
    """Return into how many parts a call splits a tensor, None where that depends on its shape.

    A chunk can come out as fewer parts than it asks for: then the graph fails on the example inputs.
    """
    name = method_of(node)
    given = node.args[1] if len(node.args) > 1 else None
    if name in ("split", "split_with_sizes"):
        sizes = node.kwargs.get("split_size_or_sections", node.kwargs.get("split_size", given))
        return len(sizes) if isinstance(sizes, (list, tuple)) else None
    chunks = node.kwargs.get("chunks", given) if name in ("chunk", "unsafe_chunk") else None
    return chunks if isinstance(chunks, int) else None


def _refuse_keywords(path: str) -> None:
    """Raise RuntimeError for a path that generated code cannot contain."""
    for name in path.split("."):
        if keyword.iskeyword(name):
            raise RuntimeError(
                f"{path!r} contains the Python keyword {name!r}, which generated code cannot use as a name; rename it"
            )


def _refuse_stand_in(_: nn.Module, name: str, value: Any) -> None:
    """Raise TypeError if forward sets a buffer to a computed value: a graph only reads buffers."""
    if isinstance(value, fx.Proxy):
        raise TypeError(
            f"forward sets the buffer {name!r} (by = or +=), which a graph cannot hold; write into it: "
            f"self.{name}.add_(...), self.{name}.copy_(...)"
        )


def is_fresh(operand: Any) -> bool:
    """Return whether a node is a tensor that forward makes itself, neither the model's nor an input's."""
    return isinstance(operand, fx.Node) and operand.op == "get_attr" and str(operand.target).startswith("_tensor_con")


def forward_of(module: nn.Module) -> Any:
    """Return the forward of a module's class as it is stored there; TorchScript's has no other access."""
    return inspect.getattr_static(type(module), "forward", None)


def _is_traced_through(module: nn.Module, path: str) -> bool:
    """Return whether a module of torch's is no leaf: a transformer's, or the pass-through after a sum of torch.ao's
    FloatFunctional, which would stand between the sum and its ReLU.
    """
    is_pass = type(module) is nn.Identity and path.rpartition(".")[2] == "activation_post_process"
    return is_pass or forward_of(module) in PLAIN_FORWARDS
