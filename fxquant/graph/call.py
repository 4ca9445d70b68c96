"""How a model is called: the arguments of the example call and of batches of data, and a run on them."""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from fxquant.errors import ExampleInputsError
from fxquant.graph import edit
from fxquant.graph.outputs import drained
from fxquant.progress import Progress


class Inputs(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Example:
    """The arguments of the example call that a model was prepared with. inputs: None after pickling.

    Copies of a model share them. A pickle leaves them out, since they may be large, or private.
    """

    def __init__(self, inputs: Inputs | None = None) -> None:
        self.inputs = None if inputs is None else copies(inputs)  # which the caller may write into

    def __deepcopy__(self, memo: dict[int, Any]) -> Example:
        return self

    def __reduce__(self) -> tuple[type[Example], tuple[()]]:
        return Example, ()


def copies(inputs: Inputs) -> Inputs:
    """Return copies of the inputs, also of objects such as a cache, which forward may write into."""

    def twin(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, torch.Tensor) else edit.copied(leaf)

    return Inputs(pytree.tree_map(twin, inputs.args), pytree.tree_map(twin, inputs.kwargs))


@contextlib.contextmanager
def repeatable(seed: int = 0) -> Iterator[None]:
    """Seed torch's, Python's and numpy's random numbers for the block; afterwards the generators are as they were."""
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
    inputs = _as_inputs(example_inputs)
    if inputs is None:
        raise ExampleInputsError(
            "example_inputs must be a tuple of the positional arguments of one call, a dict of its keyword arguments, "
            f"or one tensor, got {type(example_inputs).__name__}"
        )
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise ExampleInputsError(
            f"example_kwargs must be a dict of keyword arguments, got {type(example_kwargs).__name__}"
        )
    args, kwargs = inputs
    kwargs.update(example_kwargs or {})
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        keywords = f" and the keywords {', '.join(map(repr, kwargs))}" if kwargs else ""
        raise ExampleInputsError(
            f"example_inputs has {len(args)} arguments{keywords}, but forward is {type(model).__name__}{signature}: "
            f"{error}"
        ) from error
    return inputs


def _as_inputs(value: Any) -> Inputs | None:
    """Return what a user gives for one call, a tuple or list, a dict, or one tensor, as arguments; else None."""
    if isinstance(value, torch.Tensor):
        return Inputs((value,), {})
    if isinstance(value, Mapping):
        return Inputs((), dict(value))
    is_sequence = isinstance(value, (tuple, list)) and not isinstance(value, rnn.PackedSequence)
    return Inputs(tuple(value), {}) if is_sequence else None


def each_batch(data: Iterable[Any], model: nn.Module, progress: Progress = iter) -> Iterator[Inputs]:
    """Yield the arguments of each batch, or raise ExampleInputsError if there is none.

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
    """Raise ExampleInputsError for anything but an iterable of batches: one batch, a number, a string."""
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
    inputs = _as_inputs(batch)
    if inputs is None:
        raise ExampleInputsError(
            "a batch is a tuple of positional arguments, a dict of keyword arguments, or one tensor, "
            f"got {type(batch).__name__}"
        )
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise ExampleInputsError(
            f"a batch of {len(inputs.args) + len(inputs.kwargs)} arguments does not fit forward{signature}: {error}. A "
            "batch holds the arguments of one call and nothing else; for (input, label) pairs pass "
            "((x,) for x, _ in loader)"
        ) from error
    return inputs


def run(model: nn.Module, arguments: Inputs, seed: int = 0) -> Any:
    """Return a model's output for copies of the arguments, without gradients and with a fixed seed.

    If it is a generator: a list of its first values.
    """
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, arguments)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return drained(model(*args, **kwargs))
