"""The names that Python code mentions, and those that a graph has a use of its own for."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from fxquant.graph.preserve.extra_state import METHODS


def names_in(function: Any) -> set[str]:
    """Return every name that the code of a function, method or property mentions."""
    if isinstance(function, property):
        function = function.fget
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    return set() if code is None else {name for part in codes_in(code) for name in part.co_names}


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield code, and that of the functions and comprehensions inside it."""
    yield code
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from codes_in(part)


@functools.cache
def taken_names() -> frozenset[str]:
    """Return the names that a traced model has a use of its own for, which nothing of the user's can have there.

    Those are torch.fx's and nn.Module's (code, graph, meta, recompile, …), and a few that nobody else uses. What every
    object has may be shared, and so may what a graph has no use for itself.
    """
    empty = fx.GraphModule(nn.Module(), fx.Graph())
    classes = {name for kind in type(empty).__mro__ if kind is not object for name in vars(kind)}
    ours = {"_fxquant_record", "_fxquant_view", "__prepare_scriptable__"}
    shared = {"__len__", "__iter__", "__module__", "__doc__", *METHODS}
    return frozenset(classes | vars(empty).keys() | ours) - shared
