"""A forward that writes into its own weights: found as it happens, before it reaches the user's model.

Mirrors share the parameters' storage, so that preparing costs no second copy of the weights. Every write that torch
knows of (`.data.clamp_()`, `F.embedding(max_norm=)`, a power iteration's `copy_`) passes torch's dispatcher, which says
what an operator writes into; the first one into a shared tensor stops the run, and the next run has a copy of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


class _WriteError(BaseException):
    """An operator was about to write into these parameters. No Exception, which the user's code might catch."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self.names = names


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets every operator run but one that writes into a storage that is watched."""

    def __init__(self, names: dict[int, set[str]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for tensor in _written(func, args, kwargs or {}):
                names = self.names.get(_storage(tensor))
                if names:
                    raise _WriteError(frozenset(names))
        return func(*args, **(kwargs or {}))


def without_writes(model: nn.Module, run: Callable[[frozenset[str]], T]) -> tuple[T, frozenset[str]]:
    """Return what run gives, and the names of the parameters that the model's code writes into while it does.

    run: gets the names known so far, of which its mirrors must hold copies (`edit.mirror`); it is run once more for
    each that it writes into all the same.
    """
    written: frozenset[str] = frozenset()
    while True:
        names: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name not in written:
                names.setdefault(_storage(parameter), set()).add(name)
        try:
            with _Watch(names):
                return run(written), written
        except _WriteError as error:
            written |= error.names


def _storage(tensor: torch.Tensor) -> int:
    """Return what tensors that share memory have in common, on the meta device too; 0 for one without a storage."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse or wrapped tensor's
        return 0


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a call of an operator writes into."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = kwargs.get(argument.name, args[place] if place < len(args) else None)
        for tensor in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(tensor, torch.Tensor):
                yield tensor
