"""First pass, continued: the graph is run on the example inputs, and must compute what the model does.

Every node's shapes and dtypes are recorded. What a graph cannot hold (random numbers drawn without an input, state kept
in Python attributes from call to call) is found here, and not later in wrong outputs.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from fxquant.errors import ExampleInputsError, TraceError, warn
from fxquant.graph import edit
from fxquant.graph.call import Inputs, copies
from fxquant.graph.preserve.preserve import NOTHING_PRESERVED, Keep, Preserved
from fxquant.graph.trace.checks import first_line
from fxquant.graph.trace.signature import Interpreter, arguments_of, describe, fixable
from fxquant.graph.trace.sizes import Sized, doubled, sizes_of
from fxquant.graph.trace.trace import Traced, trace
from fxquant.graph.trace.writes import without_writes
from fxquant.nn.transformer import avoid_fast_path
from fxquant.operators import Operator

_PLAIN = (bool, int, float, complex, str, torch.Size, torch.dtype, torch.device)


def capture(
    model: nn.Module,
    operators: Sequence[Operator],
    inputs: Inputs,
    preserved: Preserved = NOTHING_PRESERVED,
    recomputes: bool = False,
    for_static: bool = False,
) -> Traced:
    """Return a model's graph, run once on the example inputs, so that every node's shapes and dtypes are recorded.

    Three things are tried in turn: the plain graph; if plain arguments (None, bool, int, float, str, or such defaults)
    steer forward, or it unpacks *args or **kwargs, a graph for those arguments, which checks them, with a warning; the
    graph with submodules that do not trace called as they are. Never the last two together: such a model (GPT-2, with
    its cache and `generate`) keeps more of itself in its own class, module by module.

    for_static: whether a graph is needed, for values to be calibrated. Then it checks conditions on which forward
    raises, and one for the example inputs' sizes, which checks them, is preferred to one that calls submodules with
    weights as they are.

    The graph has copies of the parameters that forward writes into, and shares all others with the model. recomputes:
    as `Keep` has it. Raises what `trace` and `propagate` raise.
    """

    def run(written: frozenset[str]) -> Traced:
        keep, whole = Keep(preserved, None, written, recomputes, checks=for_static), None
        try:
            whole = _capture(model, operators, inputs, keep)
            if not for_static or not any(_has_weights(model.get_submodule(path)) for path in whole.untraced):
                return whole
        except (TraceError, ExampleInputsError):
            if not for_static:
                raise
            traced = _sized(model, operators, inputs, keep)
            if traced is None:
                raise
            return traced
        return _sized(model, operators, inputs, keep) or whole

    return without_writes(model, run)[0]


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _sized(model: nn.Module, operators: Sequence[Operator], inputs: Inputs, keep: Keep) -> Traced | None:
    """Return a graph for the sizes of the example inputs, with a warning; None where that does not trace either.

    For any batch, if the model gives the same for a batch of twice the size, too.
    """
    for more in ({}, fixable(model, inputs)):
        for any_batch in (True, False):
            sizes = sizes_of(model, inputs, any_batch)
            try:
                traced = _faithful(model, operators, inputs, {**more, **sizes}, False, keep)
                if any_batch:
                    verify(model, traced.module, doubled(model, inputs), keep.written)
            except Exception:  # of any kind: it is another batch than the user's
                continue
            _warn_of_sizes(model, sizes)
            if more:
                _warn_of_constants(model, more)
            return traced
    return None


def _capture(model: nn.Module, operators: Sequence[Operator], inputs: Inputs, keep: Keep) -> Traced:
    """Return the same, with copies of the parameters that are known to be written into."""
    constants = fixable(model, inputs)
    cause: Exception | None = None
    for fixed, keep_whole in (({}, False), (constants, False), ({}, True)) if constants else (({}, False), ({}, True)):
        try:
            traced = _faithful(model, operators, inputs, fixed, keep_whole, keep)
        except (TraceError, ExampleInputsError) as error:
            cause = cause if keep_whole else error
            continue
        if fixed:
            _warn_of_constants(model, fixed)
        return traced
    assert cause is not None
    raise cause


def _faithful(
    model: nn.Module,
    operators: Sequence[Operator],
    inputs: Inputs,
    fixed: dict[str, Any],
    keep_whole: bool,
    keep: Keep,
) -> Traced:
    """Return a graph that was run and gives the model's output, or raise TraceError or ExampleInputsError."""
    kept: dict[str, str] = {}
    live: tuple[str, ...] | None = None
    while True:
        traced = trace(model, operators, None, fixed, kept, keep_whole, keep._replace(live=live))
        try:
            propagate(traced.module, inputs, keep.written)
            verify(model, traced.module, inputs, keep.written)
        except (TraceError, ExampleInputsError) as error:
            if live is None and traced.attributes.live:  # forward may have asked for the types of such attributes
                live = ()
                continue
            if isinstance(error, ExampleInputsError):
                raise
            doubtful = traced.doubtful - kept.keys() if keep_whole else frozenset()
            if not doubtful:
                raise
            why = "it keeps state in Python attributes from call to call, or makes tensors of its own"
            kept = {**traced.untraced, **dict.fromkeys(sorted(doubtful), why)}
        else:
            return traced


def _warn_of_constants(model: nn.Module, constants: dict[str, Any]) -> None:
    arguments = ", ".join(describe(name, value) for name, value in constants.items())
    warn(
        f"{type(model).__name__} was traced for {arguments}, because its forward branches on such values; the graph "
        "checks them. For others, prepare the model again with them in example_inputs"
    )


def _warn_of_sizes(model: nn.Module, sizes: dict[str, Sized]) -> None:
    inputs = ", ".join(f"{name} of {sized}" for name, sized in sizes.items())
    warn(
        f"{type(model).__name__} was traced for {inputs}, because its forward computes with sizes in Python; the graph "
        "checks them. For others, prepare the model again with them in example_inputs, or, if it exports with them, "
        "prepare torch.export.export(model, …, dynamic_shapes=…).module()"
    )


def check_runs(model: nn.Module, inputs: Inputs, cause: Exception) -> frozenset[str]:
    """Return the names of the parameters that forward writes into when run on the example inputs.

    Raises ExampleInputsError if the model itself fails on them. cause: why there is no graph.
    """

    def twin_runs(written: frozenset[str]) -> None:
        _run(edit.mirror(model, hooks=False, written=written), inputs)

    try:
        return without_writes(model, twin_runs)[1]
    except Exception as error:
        if isinstance(cause, ExampleInputsError):
            raise cause from error
        where = edit.user_frame(error)
        raise ExampleInputsError(
            f"{type(model).__name__} fails on example_inputs{f' at {where}' if where else ''}: "
            f"{type(error).__name__}: {first_line(error)}\n"
            "  example_inputs are really run: pass one call's arguments, with true shapes, dtypes and value ranges"
        ) from error


class GraphFailsError(ExampleInputsError):
    """A node of a traced graph fails on the example inputs. place: which, on what, and how."""

    place = ""


class _Shapes(Interpreter):
    """Runs a graph once and records the shape and dtype of each node."""

    def run_node(self, n: fx.Node) -> Any:
        """Return the node's value, its shape and dtype recorded in node.meta["tensor_meta"]."""
        try:
            value = super().run_node(n)
        except Exception as error:
            operands = pytree.tree_leaves([self.env[node] for node in n.all_input_nodes])
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in operands if isinstance(t, torch.Tensor))
            where = f", {edit.node_frame(n)}" if edit.node_frame(n) else ""
            place = f"at {n.name!r}{where}, which got [{shapes}]: {type(error).__name__}: {first_line(error)}"
            failure = GraphFailsError(
                f"the model fails on example_inputs {place}\n"
                "  example_inputs are really run: pass one call's arguments, with true shapes, dtypes and value ranges"
            )
            failure.place = place
            raise failure from error
        n.meta["tensor_meta"] = tensors_meta(value)
        return value


def tensors_meta(value: Any) -> Any:
    """Return a value with each tensor replaced by torch.fx's TensorMetadata, and a packed sequence as a tuple.

    Objects that are not plain values (a cache, a torch.finfo) become None, so that a graph can be copied and pickled.
    """
    if isinstance(value, torch.Tensor):
        if value.is_nested:  # it has no shape
            return None
        return _extract_tensor_metadata(value)._replace(memory_format=None)  # which torch.save cannot pickle
    if isinstance(value, rnn.PackedSequence):
        return tuple(tensors_meta(part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: tensors_meta(getattr(value, field.name)) for field in dataclasses.fields(value)}
    parts, form = pytree.tree_flatten(value, is_leaf=lambda part: isinstance(part, (torch.Tensor, rnn.PackedSequence)))
    if len(parts) == 1 and parts[0] is value:
        return value if isinstance(value, _PLAIN) else None
    return pytree.tree_unflatten([tensors_meta(part) for part in parts], form)


def propagate(module: fx.GraphModule, inputs: Inputs, written: Collection[str] = ()) -> None:
    """Run a graph on copies of the example inputs and record every node's shapes and dtypes. No hooks run.

    Raises ExampleInputsError if a node fails, with the user's line.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user sees the float model's own warnings when running it
        twin = edit.mirror(module, written=written)  # forward may write into buffers and attributes
        _Shapes(twin, module.graph, arguments_of(module, copies(inputs))).run()


def verify(model: nn.Module, module: fx.GraphModule, inputs: Inputs, written: Collection[str] = ()) -> None:
    """Raise TraceError unless two calls of the graph give the bits of two calls of the model. No hooks run.

    Both run without torch's transformer fast path, whose kernels are not in a graph.
    """
    twin, graph = edit.mirror(model, hooks=False, written=written), edit.mirror(module, written=written)
    for part in (*twin.modules(), *graph.modules()):
        avoid_fast_path(part)
    for call in ("first", "second"):
        if not _is_same(_run(twin, inputs), _run(graph, inputs)):
            raise TraceError(
                f"{type(model).__name__} traces, but the graph's {call} call does not give what the model's does.\n"
                "  A graph holds tensor operations on inputs and parameters. It cannot hold random numbers that"
                " forward draws without an input (torch.rand(4): draw it outside, or use torch.rand_like(x)), nor "
                "state that forward keeps in Python attributes from call to call (self.hidden: pass it in and out, or "
                "make it a buffer), nor make a container of any type (a collections.defaultdict: return a dict).\n"
                "  Without a graph only its modules could be quantized, and none can."
            )


def _run(module: nn.Module, inputs: Inputs) -> Any:
    """Return a module's output for copies of the inputs, with a fixed seed."""
    args, kwargs = copies(inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return module(*args, **kwargs)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the leaves of nested containers, including dataclasses."""
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _leaves([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
        else:
            yield leaf


def _is_same(ours: Any, theirs: Any) -> bool:
    """Return whether two values hold equal tensors (a NaN equals a NaN) in containers of the same types."""
    a, b = list(_leaves(ours)), list(_leaves(theirs))
    is_alike = len(a) == len(b) and pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    return is_alike and all(map(_same_leaf, a, b))


def _same_leaf(a: Any, b: Any) -> bool:
    """Return whether two leaves are equal tensors. Others, and tensors without values, need only match in type."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b)
    if a.dtype != b.dtype or a.layout != b.layout or a.is_nested != b.is_nested:
        return False
    if a.is_nested or a.layout is not torch.strided:
        return True
    return a.shape == b.shape and (a.is_meta or torch.equal(a.nan_to_num(), b.nan_to_num()))
