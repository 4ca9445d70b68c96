"""First pass: a float model becomes a graph whose leaves are what the operator table knows."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from fxquant.errors import ExampleInputsError, ModelStateError, TraceError
from fxquant.graph import edit
from fxquant.nn import QuantizedModule
from fxquant.operators import Operator

_LEAF_FUNCTIONS = (
    rnn.pack_padded_sequence,
    rnn.pad_packed_sequence,
    rnn.pack_sequence,
    rnn.unpack_sequence,
    rnn.pad_sequence,
    rnn.unpad_sequence,
)
"""Functions of torch that look at values, and so are calls in the graph instead of being traced through."""

SCOPE = "fxquant_scope"
"""The key in node.meta of the path of the module whose forward made the node."""


@dataclass(frozen=True)
class Names:
    """What a model's parts are called. aliases: each module's path, and all the paths that the same module has."""

    aliases: dict[str, tuple[str, ...]]
    tensors: frozenset[str]  # the paths of its parameters and buffers
    kinds: frozenset[type]  # the types of its modules


def names_of(model: nn.Module) -> Names:
    """Return what a model's parts are called."""
    tensors = frozenset(
        name for named in (model.named_parameters, model.named_buffers) for name, _ in named(remove_duplicate=False)
    )
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    aliases = {path: tuple(same) for same in paths.values() for path in same}
    return Names(aliases, tensors, frozenset(type(module) for module in model.modules()))


@dataclass(frozen=True)
class Traced:
    """A traced model: the graph over a mirror of it, and what the later passes need to know of the original."""

    module: fx.GraphModule
    names: Names  # of the original
    hooked: frozenset[str]  # the paths of its modules that have hooks
    constants: dict[str, Any]  # the arguments that the graph is made for


class _Tracer(fx.Tracer):
    """torch.fx's tracer, with leaves of ours, stack traces, and each node's scope."""

    record_stack_traces = True

    def __init__(self, leaves: tuple[type[nn.Module], ...] = (), hooked: frozenset[str] = frozenset()) -> None:
        super().__init__(autowrap_functions=_LEAF_FUNCTIONS, param_shapes_constant=True)
        self._autowrap_search.append(rnn)  # also where a model calls them as nn.utils.rnn.pack_padded_sequence
        self._leaves, self._hooked = leaves, hooked
        self._autocast = _autocast()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is called as it is, rather than traced through."""
        return (
            super().is_leaf_module(m, module_qualified_name)
            or module_qualified_name in self._hooked  # inlining it would lose its hooks
            or "forward" in vars(m)  # replaced on the instance, perhaps by a closure over the original
            or isinstance(m, (QuantizedModule, torch.jit.ScriptModule))
            or any(isinstance(m, kind) and type(m).forward is kind.forward for kind in self._leaves)
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return what forward gets for an attribute; torch.fx's own cannot do buffers beside param_shapes_constant."""
        if self.proxy_buffer_attributes and isinstance(attr_val, torch.Tensor):
            name = next((name for name, buffer in self.root.named_buffers() if buffer is attr_val), None)
            if name is not None:
                if name not in parameter_proxy_cache:
                    parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
                return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, target: Any, args: tuple[Any, ...], *rest: Any, **named: Any) -> fx.Node:
        """Return a node that knows its scope; refuse what a graph would silently compute otherwise."""
        if _autocast() != self._autocast:
            raise RuntimeError("forward enters torch.autocast, which a graph does not hold; enter it around the call")
        if kind == "call_method" and target.endswith("_") and not target.endswith("__") and _is_fresh(args[0]):
            raise RuntimeError(
                f"forward writes (.{target}) into a tensor that it makes itself, which a graph makes only once; "
                "make it from an input: x.new_zeros(...)"
            )
        node = super().create_node(kind, target, args, *rest, **named)
        node.meta[SCOPE] = self.scope.module_path
        return node


def _autocast() -> tuple[torch.dtype | None, ...]:
    """Return what torch.autocast now casts to, a device type at a time; None where it is off."""
    return tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")
    )


def _is_fresh(operand: Any) -> bool:
    """Return whether an operand is a tensor that is neither the model's nor an input's."""
    return isinstance(operand, fx.Node) and operand.op == "get_attr" and str(operand.target).startswith("_tensor_con")


def capture(model: nn.Module, operators: Sequence[Operator], inputs: tuple[Any, ...]) -> Traced:
    """Return a model's graph, run once on the example inputs, so that every node's shapes and dtypes are recorded.

    Where plain arguments (None, bool, int, float, str; given or left at their defaults) steer forward, so that it does
    not trace or run without knowing them, the graph is made for those values, with a warning, and asserts them.
    Raises what `trace` and `propagate` raise.
    """
    try:
        return _captured(model, operators, inputs, {})
    except (TraceError, ExampleInputsError):
        constants = _plain_arguments(model, inputs)
        if constants:
            with contextlib.suppress(TraceError, ExampleInputsError):  # then the first error tells more
                traced = _captured(model, operators, inputs, constants)
                told = ", ".join(f"{name}={value!r}" for name, value in constants.items())
                warnings.warn(
                    f"{type(model).__name__} was traced for {told}, because its forward branches on such values; the "
                    "graph asserts them. For others, prepare the model once more with them in example_inputs",
                    stacklevel=3,
                )
                return traced
        raise


def _captured(
    model: nn.Module, operators: Sequence[Operator], inputs: tuple[Any, ...], constants: dict[str, Any]
) -> Traced:
    traced = trace(model, operators, constants=constants)
    propagate(traced.module, inputs)
    return traced


def _plain_arguments(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Return those of a call's arguments, defaults included, that are plain values and so can be fixed."""
    bound = inspect.signature(model.forward).bind(*inputs)
    bound.apply_defaults()
    return {
        name: value
        for name, value in bound.arguments.items()
        if value is None or isinstance(value, (bool, int, float, str))
    }


def trace(
    model: nn.Module,
    operators: Sequence[Operator],
    device: str | None = None,
    constants: Mapping[str, Any] | None = None,
) -> Traced:
    """Return a model's graph over a mirror of its modules and tensors, whose hooks are left off meanwhile.

    constants: arguments that are fixed, and asserted. Raises ModelStateError for a model in training mode or with lazy
    parameters, TraceError for one that torch.fx cannot trace, naming the user's file and line.
    """
    check_model(model)
    hooked = frozenset(name for name, module in model.named_modules() if name and edit.has_hooks(module))
    leaves = tuple(kind for row in operators for kind in row.modules)
    try:
        root, graph = _graph(model, lambda: _Tracer(leaves, hooked), device, constants)
    except Exception as error:
        raise _trace_error(model, error) from error
    for node in graph.nodes:
        if node.target in _LEAF_FUNCTIONS:
            node.meta.pop("is_wrapped", None)  # torch.fx would write a wrap("torch.nn…") that breaks later traces
    name = model.__class__.__name__
    return Traced(fx.GraphModule(root, graph, name), names_of(model), hooked, dict(constants or {}))


def _graph(
    model: nn.Module, make_tracer: Callable[[], _Tracer], device: str | None, constants: Mapping[str, Any] | None
) -> tuple[nn.Module, fx.Graph]:
    """Return a mirror of a model and its graph. Forward meets buffers as they are, and so may branch on their values,
    unless it writes into one, or slices one by an input's size: then buffers must be nodes.
    """
    failure: Exception | None = None
    for buffers_are_nodes in (False, True):
        root, tracer = edit.mirror(model, device, hooks=False), make_tracer()
        tracer.proxy_buffer_attributes = buffers_are_nodes
        versions = [buffer._version for buffer in root.buffers()]
        try:
            with torch.no_grad():
                graph = tracer.trace(root, dict(constants) if constants else None)
        except Exception as error:
            failure = failure or error
            continue
        if buffers_are_nodes or [buffer._version for buffer in root.buffers()] == versions:
            return root, graph
    assert failure is not None
    raise failure


def check_model(model: Any) -> None:
    """Raise ModelStateError unless this is a module in eval mode whose parameters have shapes."""
    if not isinstance(model, nn.Module):
        raise ModelStateError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelStateError("TorchScript models cannot be traced; pass the nn.Module that it was made from")
    if "forward" in vars(model):
        raise ModelStateError(
            f"the forward of this {type(model).__name__} was replaced on the instance, where torch.fx does not see it; "
            "define it in a class"
        )
    if model.training:
        raise ModelStateError(f"{type(model).__name__} is in training mode; call model.eval() first")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelStateError(f"{name!r} is lazy and has no shape yet; run the model once on real input first")


def _trace_error(model: nn.Module, error: Exception) -> TraceError:
    """Return the error that says where tracing failed, why, and what to try."""
    where = edit.user_frame(error)
    cause = str(error).strip().splitlines()
    home = type(model).__module__
    return TraceError(
        f"{type(model).__name__} does not trace: {cause[0] if cause else type(error).__name__}\n"
        f"  at {where or f'{home}.{type(model).__name__}.forward; put the module inside one of your own, as a leaf'}\n"
        "  torch.fx runs forward once with stand-ins for tensors, so Python cannot branch on, loop over or convert "
        "their values there. Try one of:\n"
        "  - write the choice with tensors (torch.where) or base it on a module attribute;\n"
        "  - move that part into a function and mark it with torch.fx.wrap;\n"
        "  - swap its modules without a graph: fxquant.quantize_dynamic(model)."
    )


def bind_inputs(model: nn.Module, example_inputs: Any) -> tuple[Any, ...]:
    """Return the example inputs as a tuple that fits forward's signature, or raise ExampleInputsError."""
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, (tuple, list)):
        raise ExampleInputsError(
            "example_inputs must be a tuple of the positional arguments of one call, or one tensor, "
            f"got {type(example_inputs).__name__}"
        )
    inputs = tuple(example_inputs)
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*inputs)
    except TypeError as error:
        raise ExampleInputsError(
            f"example_inputs has {len(inputs)} arguments, but forward is {type(model).__name__}{signature}: {error}"
        ) from error
    return inputs


class _Shapes(fx.Interpreter):
    """Runs a graph once and records what each node gave."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # it would add lines of its own to our errors

    def run_node(self, n: fx.Node) -> Any:
        """Return the node's value, its shape and dtype recorded in node.meta["tensor_meta"]."""
        try:
            value = super().run_node(n)
        except Exception as error:
            given = pytree.tree_leaves([self.env[node] for node in n.all_input_nodes])
            told = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in given if isinstance(t, torch.Tensor))
            raise ExampleInputsError(
                f"the model fails on example_inputs at {n.name!r}"
                f"{f', {edit.node_frame(n)}' if edit.node_frame(n) else ''}, which got [{told}]: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}\n"
                "  example_inputs are really run: pass one call's arguments, with true shapes, dtypes and value ranges"
            ) from error
        n.meta["tensor_meta"] = _tensors_meta(value)
        return value


def _tensors_meta(value: Any) -> Any:
    """Return a value with torch.fx's TensorMetadata in the place of each tensor; a packed sequence as a tuple."""
    if isinstance(value, torch.Tensor):
        return _extract_tensor_metadata(value)._replace(memory_format=None)  # which torch.save cannot pickle
    if isinstance(value, rnn.PackedSequence):
        return tuple(_tensors_meta(part) for part in value)
    parts, form = pytree.tree_flatten(value, is_leaf=lambda part: isinstance(part, (torch.Tensor, rnn.PackedSequence)))
    return (
        value
        if len(parts) == 1 and parts[0] is value
        else pytree.tree_unflatten([_tensors_meta(part) for part in parts], form)
    )


def propagate(module: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Run a graph on copies of the example inputs and record every node's shapes and dtypes; no hook is fired.

    Raises ExampleInputsError where a node fails, naming the user's line.
    """
    copies = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user meets the float model's own warnings when running it
        _Shapes(module).run(*copies)
        for buffer, before in buffers:  # this run shall not count: forward may write into its buffers
            buffer.copy_(before)
