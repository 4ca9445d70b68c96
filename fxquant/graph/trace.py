"""First pass: a float model becomes a graph whose leaves are what the operator table knows."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import UninitializedParameter

from fxquant.errors import ExampleInputsError, ModelStateError, TraceError
from fxquant.graph import edit
from fxquant.graph.module import tensors_meta
from fxquant.nn import QuantizedModule
from fxquant.operators import Operator

SCOPE = "fxquant_scope"
"""The key in node.meta of the path of the module whose forward made the node."""


@dataclass(frozen=True)
class Traced:
    """A traced model: the graph over a mirror of it, and what the later passes need to know of the original."""

    module: fx.GraphModule
    original: nn.Module
    registered: frozenset[str]  # the paths of the original's parameters and buffers
    hooked: frozenset[str]  # the paths of its modules that have hooks
    aliases: dict[str, tuple[str, ...]]  # a module's path in the graph, and all its paths in the original


class _Tracer(fx.Tracer):
    """torch.fx's tracer, with leaves of ours, stack traces, and each node's scope."""

    record_stack_traces = True

    def __init__(self, leaves: tuple[type[nn.Module], ...] = (), hooked: frozenset[str] = frozenset()) -> None:
        super().__init__(param_shapes_constant=True)
        self._leaves, self._hooked = leaves, hooked

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is called as it is, rather than traced through."""
        return (
            super().is_leaf_module(m, module_qualified_name)
            or module_qualified_name in self._hooked  # inlining it would lose its hooks
            or isinstance(m, (QuantizedModule, torch.jit.ScriptModule))
            or any(isinstance(m, kind) and type(m).forward is kind.forward for kind in self._leaves)
        )

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a node that knows its scope."""
        node = super().create_node(*args, **kwargs)
        node.meta[SCOPE] = self.scope.module_path
        return node


def trace(model: nn.Module, operators: Sequence[Operator], device: str | None = None) -> Traced:
    """Return a model's graph over a mirror of its modules and tensors, whose hooks are left off meanwhile.

    Raises ModelStateError for a model in training mode or with lazy parameters, TraceError for one that torch.fx cannot
    trace, naming the user's file and line.
    """
    check_model(model)
    hooked = frozenset(name for name, module in model.named_modules() if name and edit.has_hooks(module))
    registered = frozenset(
        name for named in (model.named_parameters, model.named_buffers) for name, _ in named(remove_duplicate=False)
    )
    root = edit.mirror(model, device, hooks=False)
    leaves = tuple(kind for row in operators for kind in row.modules)
    tracer = _Tracer(leaves, hooked)
    try:
        with torch.no_grad():
            graph = tracer.trace(root)
    except Exception as error:
        raise _trace_error(model, error) from error
    name = model.__class__.__name__
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    aliases = {path: tuple(same) for same in paths.values() for path in same}
    return Traced(fx.GraphModule(root, graph, name), model, registered, hooked, aliases)


def check_model(model: Any) -> None:
    """Raise ModelStateError unless this is a module in eval mode whose parameters have shapes."""
    if not isinstance(model, nn.Module):
        raise ModelStateError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelStateError("TorchScript models cannot be traced; pass the nn.Module that it was made from")
    if model.training:
        raise ModelStateError(f"{type(model).__name__} is in training mode; call model.eval() first")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelStateError(f"{name!r} is lazy and has no shape yet; run the model once on real input first")


def _trace_error(model: nn.Module, error: Exception) -> TraceError:
    """Return the error that says where tracing failed, why, and what to try."""
    where = edit.user_frame(error)
    cause = str(error).strip().splitlines()
    return TraceError(
        f"{type(model).__name__} does not trace: {cause[0] if cause else type(error).__name__}\n"
        f"  at {where or 'an unknown place'}\n"
        "  torch.fx runs forward once with stand-ins for tensors, so Python cannot branch on, loop over or convert "
        "their values there. Try one of:\n"
        "  - write the choice with tensors (torch.where) or base it on a module attribute;\n"
        "  - move that part into a function and mark it with torch.fx.wrap;\n"
        "  - quantize the submodules that trace, each with its own prepare_fx and convert_fx."
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

    def run_node(self, n: fx.Node) -> Any:
        """Return the node's value, its shape and dtype recorded in node.meta["tensor_meta"]."""
        try:
            value = super().run_node(n)
        except Exception as error:
            given = tensors_meta([self.env[node] for node in n.all_input_nodes])
            told = ", ".join(f"{tuple(meta.shape)} {meta.dtype}" for meta in given if hasattr(meta, "shape"))
            raise ExampleInputsError(
                f"the model fails on example_inputs at {n.name!r}"
                f"{f', {edit.node_frame(n)}' if edit.node_frame(n) else ''}, which got [{told}]: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}\n"
                "  example_inputs are really run: pass one call's arguments, with true shapes, dtypes and value ranges"
            ) from error
        n.meta["tensor_meta"] = tensors_meta(value)
        return value


def propagate(module: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Run a graph on copies of the example inputs and record every node's shapes and dtypes; no hook is fired.

    Raises ExampleInputsError where a node fails, naming the user's line.
    """
    copies = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user meets the float model's own warnings when running it
        _Shapes(module).run(*copies)
