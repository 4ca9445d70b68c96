"""Find a forward that writes into its own weights, before that reaches the user's model.

Mirrors share the parameters' storage, so that preparing does not copy the weights. Every write that torch knows of
(`.data.clamp_()`, `F.embedding(max_norm=)`, a power iteration's `copy_`) passes its dispatcher, which knows what an
operator writes into. The first write into a shared tensor stops the run, and the next run has a copy of that tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.graph.trace.fold import storage_of

T = TypeVar("T")


class _WriteError(BaseException):
    """An operator was about to write into these parameters. Not an Exception, which the user's code might catch."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self.names = names


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops the first operator that writes into a watched storage."""

    def __init__(self, names: dict[int, set[str]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for tensor in _written(func, args, kwargs or {}):
                names = self.names.get(storage_of(tensor))
                if names:
                    raise _WriteError(frozenset(names))
        return func(*args, **(kwargs or {}))


def without_writes(model: nn.Module, run: Callable[[frozenset[str]], T]) -> tuple[T, frozenset[str]]:
    """Return the result of `run`, and the names of the parameters that the model's code writes into meanwhile.

    run: is given the names known so far, of which its mirrors must hold copies (`edit.mirror`). It runs again after
    each write into another parameter.
    """
    written: frozenset[str] = frozenset()
    while True:
        names: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name not in written:
                names.setdefault(storage_of(parameter), set()).add(name)
        try:
            with _Watch(names):
                return run(written), written
        except _WriteError as error:
            written |= error.names


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a call of an operator writes into."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name, args[place] if place < len(args) else None)
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, torch.Tensor):
                yield tensor
