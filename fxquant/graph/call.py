"""How a model is called: the arguments of the example call, those that a graph fixes, and the signature it keeps."""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.utils import rnn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree

from fxquant.errors import ArgumentError, ExampleInputsError
from fxquant.graph import edit
from fxquant.graph.outputs import drained

STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
"""How torch.fx writes the arguments that take the rest."""

_PLAIN = (bool, int, float, str, type(None))


class Inputs(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Example:
    """The arguments of the example call that a model was prepared with. inputs: None in what was pickled.

    Copies of a model share them; a pickle leaves them out, for they may be large, and somebody's.
    """

    def __init__(self, inputs: Inputs | None = None) -> None:
        self.inputs = None if inputs is None else copies(inputs)  # which the caller may write into

    def __deepcopy__(self, memo: dict[int, Any]) -> Example:
        return self

    def __reduce__(self) -> tuple[type[Example], tuple[()]]:
        return Example, ()


def copies(inputs: Inputs) -> Inputs:
    """Return the inputs copied, a cache object that forward writes into as well."""

    def twin(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, torch.Tensor) else edit.copied(leaf)

    return Inputs(pytree.tree_map(twin, inputs.args), pytree.tree_map(twin, inputs.kwargs))


@contextlib.contextmanager
def repeatable(seed: int = 0) -> Iterator[None]:
    """Let what draws random numbers inside the block, by torch, Python or numpy, draw the same each time.

    The generators are left as they were.
    """
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


def bind_inputs(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> Inputs:
    """Return the example inputs as arguments that fit forward's signature, or raise ExampleInputsError."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, torch.Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs.update(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        raise ExampleInputsError(
            "example_inputs must be a tuple of the positional arguments of one call, a dict of its keyword arguments, "
            f"or one tensor, got {type(example_inputs).__name__}"
        )
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise ExampleInputsError(
            f"example_kwargs must be a dict of keyword arguments, got {type(example_kwargs).__name__}"
        )
    kwargs.update(example_kwargs or {})
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        told = f" and the keywords {', '.join(map(repr, kwargs))}" if kwargs else ""
        raise ExampleInputsError(
            f"example_inputs has {len(args)} arguments{told}, but forward is {type(model).__name__}{signature}: {error}"
        ) from error
    return Inputs(args, kwargs)


def each_batch(
    data: Iterable[Any], model: nn.Module, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> Iterator[Inputs]:
    """Yield the arguments of one call after another, or raise ExampleInputsError where data holds none.

    progress: wraps the batches, as tqdm does.
    """
    check_data(data)
    count = 0
    for batch in progress(data):
        count += 1
        yield as_arguments(batch, model)
    if not count:
        raise ExampleInputsError("data held no batch; was it a generator that had been used up?")


def check_data(data: Any) -> None:
    """Raise ExampleInputsError for what is no iterable of batches: one batch, a number, a text."""
    if isinstance(data, torch.Tensor):
        raise ExampleInputsError(f"data is an iterable of batches, got one tensor {tuple(data.shape)}; pass [tensor]")
    if isinstance(data, Mapping):
        raise ExampleInputsError("data is an iterable of batches, got one dict; pass [dict]")
    if isinstance(data, str) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise ExampleInputsError(f"data is an iterable of batches, got {type(data).__name__}; pass [inputs]")


def as_arguments(batch: Any, model: nn.Module) -> Inputs:
    """Return a batch as the positional and keyword arguments of one call, or raise ExampleInputsError.

    batch: a tuple or list of positional arguments, a dict of keywords, or one tensor.
    """
    if not isinstance(batch, (torch.Tensor, tuple, list, dict)) or isinstance(batch, rnn.PackedSequence):
        raise ExampleInputsError(
            "a batch is a tuple of positional arguments, a dict of keyword arguments, or one tensor, "
            f"got {type(batch).__name__}"
        )
    args = () if isinstance(batch, dict) else (batch,) if isinstance(batch, torch.Tensor) else tuple(batch)
    kwargs = batch if isinstance(batch, dict) else {}
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ExampleInputsError(
            f"a batch of {len(args) + len(kwargs)} arguments does not fit forward{signature}: {error}. A batch holds "
            "the arguments of one call and nothing else; of (input, label) pairs pass ((x,) for x, _ in loader)"
        ) from error
    return Inputs(args, kwargs)


def run(model: nn.Module, arguments: Inputs, seed: int = 0) -> Any:
    """Return what a model gives for copies of the arguments, without gradients and under a seed of its own.

    Of a generator, a list of its first values.
    """
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, arguments)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return drained(model(*args, **kwargs))


def fixable(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return those of a call's arguments, defaults included, that a graph can be made for.

    Plain values by name; under "*args" how many there are, under "**kwargs" the list of their names.
    """
    signature = inspect.signature(model.forward)
    bound = signature.bind(*inputs.args, **inputs.kwargs)
    bound.apply_defaults()
    fixed: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        stars = STARS.get(signature.parameters[name].kind, "")
        if stars:
            fixed[stars + name] = len(value) if stars == "*" else sorted(value)
        elif isinstance(value, _PLAIN):
            fixed[name] = value
    return fixed


def unpacked(kind: Any, given: Any, fixed: Any) -> Any:
    """Return what forward is traced with for an argument that is fixed: its value, or the parts of *args, **kwargs."""
    if kind is inspect.Parameter.VAR_POSITIONAL:
        return [given[index] for index in range(fixed)]
    if kind is inspect.Parameter.VAR_KEYWORD:
        return {name: given[name] for name in fixed}
    return fixed


def describe(name: str, fixed: Any) -> str:
    """Return "mask=None", "2 *args" or "**kwargs of 'a'", for messages."""
    if name.startswith("**"):
        return f"{name} of {', '.join(map(repr, fixed)) or 'none'}"
    return f"{fixed} {name}" if name.startswith("*") else f"{name}={fixed!r}"


@fx.node.has_side_effect
def check_argument(value: Any, name: str, fixed: Any) -> None:
    """Raise ArgumentError unless a call's argument is the one that its graph was made for: a node of such graphs."""
    if has_torch_function((value,)):
        handle_torch_function(check_argument, (value,), value, name, fixed)
    elif name.startswith("**"):
        if sorted(value) != list(fixed):
            raise _other_argument(name, sorted(value), fixed)
    elif name.startswith("*"):
        if len(value) != fixed:
            raise _other_argument(name, len(value), fixed)
    elif value is not fixed and not (isinstance(value, _PLAIN) and value == fixed):
        raise _other_argument(name, value, fixed)


def _other_argument(name: str, got: Any, fixed: Any) -> ArgumentError:
    told = f"a tensor of shape {tuple(got.shape)}" if isinstance(got, torch.Tensor) else describe(name, got)
    return ArgumentError(
        f"{name.lstrip('*')!r}: this model was prepared for {describe(name, fixed)}, on which its forward branches, "
        f"and got {told}. Leave it so, or prepare the float model once more with the other value in example_inputs "
        "or example_kwargs"
    )


class SignatureCodeGen(fx.graph.CodeGen):
    """Writes a graph's forward with the kinds of arguments that the model's has; torch.fx makes all positional."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.kinds = {p.name: p.kind for p in inspect.signature(model.forward).parameters.values()}

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """Return the line with which forward begins."""
        names = {text: text.lstrip("*").partition(":")[0].partition("=")[0].strip() for text in free_vars}
        arguments = [text for text in free_vars if names[text] in self.kinds]
        arguments.sort(key=lambda text: self.kinds[names[text]])  # which come in the order that Python wants
        kinds = [self.kinds[names[text]] for text in arguments]
        if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
            arguments.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
        if inspect.Parameter.POSITIONAL_ONLY in kinds:
            arguments.insert(kinds.count(inspect.Parameter.POSITIONAL_ONLY), "/")
        rest = [text for text in free_vars if names[text] not in self.kinds]
        return super().gen_fn_def([*rest, *arguments], maybe_return_annotation, **options)

    def process_inputs(self, *args: Any) -> Any:
        """Return what torch.fx's Interpreter hands out to the placeholders, one after another.

        torch.export (strict=False) runs a graph so, with keyword arguments in the caller's order and their names gone;
        the names are in the frame that called, and each value goes where its own is.
        """
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_name == "process_inputs":  # the graph's own
            frame = frame.f_back
        interpreter, caller = frame.f_locals.get("self"), frame.f_back
        kwargs = caller.f_locals.get("kwargs") if caller is not None else None
        if not isinstance(interpreter, fx.Interpreter) or not isinstance(kwargs, dict) or not kwargs:
            return args
        given = args[len(args) - len(kwargs) :]
        if len(given) != len(kwargs) or any(a is not b for a, b in zip(given, kwargs.values(), strict=True)):
            return args  # another caller's keywords
        nodes = interpreter.graph.find_nodes(op="placeholder")
        interpreter.env.update(self._by_name(nodes, args[: len(args) - len(kwargs)], kwargs))
        return ()

    def _by_name(self, nodes: Iterable[fx.Node], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[fx.Node, Any]:
        """Return each placeholder's value; one that is not among them has its default."""
        values: dict[fx.Node, Any] = {}
        waiting, named = list(args), dict(kwargs)
        for node in sorted(nodes, key=lambda node: self.kinds[str(node.target).lstrip("*")]):
            name = str(node.target).lstrip("*")
            kind = self.kinds[name]
            if kind is inspect.Parameter.VAR_POSITIONAL:
                values[node], waiting = tuple(waiting), []
            elif kind is inspect.Parameter.VAR_KEYWORD:
                values[node] = named
            elif waiting and kind is not inspect.Parameter.KEYWORD_ONLY:
                values[node] = waiting.pop(0)
            elif name in named:
                values[node] = named.pop(name)
        return values
