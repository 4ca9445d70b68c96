"""First pass, continued: the graph is run on the example inputs, and must compute what the model does.

Every node's shapes and dtypes are recorded. What a graph cannot hold (random numbers drawn without an input, state kept
in Python attributes from call to call) is found here and not later, in the answers.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from fxquant.errors import ExampleInputsError, TraceError
from fxquant.graph import edit
from fxquant.graph.trace import Traced, trace
from fxquant.nn.transformer import avoid_fast_path
from fxquant.operators import Operator


def capture(model: nn.Module, operators: Sequence[Operator], inputs: tuple[Any, ...]) -> Traced:
    """Return a model's graph, run once on the example inputs, so that every node's shapes and dtypes are recorded.

    Where plain arguments (None, bool, int, float, str; given or left at their defaults) steer forward, so that it does
    not trace or run without knowing them, the graph is made for those values, with a warning, and asserts them. A
    submodule that does not trace even so is called as it is. Raises what `trace` and `propagate` raise.
    """
    constants = _plain_arguments(model, inputs)
    first: Exception | None = None
    for keep_whole in (False, True):
        for fixed in ({}, constants) if constants else ({},):
            try:
                traced = trace(model, operators, constants=fixed, keep_whole=keep_whole)
                propagate(traced.module, inputs)
                verify(model, traced.module, inputs)
            except (TraceError, ExampleInputsError) as error:
                first = first or error  # which tells the most
                continue
            if fixed:
                _warn_of_constants(model, fixed)
            return traced
    assert first is not None
    raise first


def _warn_of_constants(model: nn.Module, constants: dict[str, Any]) -> None:
    told = ", ".join(f"{name}={value!r}" for name, value in constants.items())
    warnings.warn(
        f"{type(model).__name__} was traced for {told}, because its forward branches on such values; the graph asserts "
        "them. For others, prepare the model once more with them in example_inputs",
        stacklevel=4,
    )


def _plain_arguments(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Return those of a call's arguments, defaults included, that are plain values and so can be fixed."""
    bound = inspect.signature(model.forward).bind(*inputs)
    bound.apply_defaults()
    return {
        name: value
        for name, value in bound.arguments.items()
        if value is None or isinstance(value, (bool, int, float, str))
    }


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
        n.meta["tensor_meta"] = tensors_meta(value)
        return value


def tensors_meta(value: Any) -> Any:
    """Return a value with torch.fx's TensorMetadata in the place of each tensor; a packed sequence as a tuple."""
    if isinstance(value, torch.Tensor):
        return _extract_tensor_metadata(value)._replace(memory_format=None)  # which torch.save cannot pickle
    if isinstance(value, rnn.PackedSequence):
        return tuple(tensors_meta(part) for part in value)
    parts, form = pytree.tree_flatten(value, is_leaf=lambda part: isinstance(part, (torch.Tensor, rnn.PackedSequence)))
    return (
        value
        if len(parts) == 1 and parts[0] is value
        else pytree.tree_unflatten([tensors_meta(part) for part in parts], form)
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


def verify(model: nn.Module, module: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Raise TraceError unless two calls of the graph give the bits of two calls of the model; no hook is fired.

    Both with torch's transformer fast path off, whose kernels a graph does not hold.
    """
    twin, graph = edit.mirror(model, hooks=False), edit.mirror(module)
    for part in (*twin.modules(), *graph.modules()):
        avoid_fast_path(part)
    for call in ("first", "second"):
        if not _same_bits(_run(twin, inputs), _run(graph, inputs)):
            raise TraceError(
                f"{type(model).__name__} traces, but the graph's {call} call does not give what the model's does.\n"
                "  A graph holds tensor operations on inputs and parameters. It cannot hold random numbers that"
                " forward draws without an input (torch.rand(4): draw it outside, or use torch.rand_like(x)), nor "
                "state that forward keeps in Python attributes from call to call (self.hidden: pass it in and out, or "
                "make it a buffer).\n"
                "  Or swap the modules without a graph: fxquant.quantize_dynamic(model)."
            )


def _run(module: nn.Module, inputs: tuple[Any, ...]) -> list[Any]:
    """Return the leaves of what a module gives for copies of the inputs, under a seed of its own."""
    copies = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return pytree.tree_leaves(module(*copies))


def _same_bits(ours: list[Any], theirs: list[Any]) -> bool:
    """Return whether two lists of leaves hold the same tensors, a NaN equal to a NaN; other leaves do not count."""
    pairs = [pair for pair in zip(ours, theirs, strict=False) if all(isinstance(leaf, torch.Tensor) for leaf in pair)]
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs
    )
