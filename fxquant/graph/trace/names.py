"""The names that Python code mentions, and those that a graph module uses itself."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from fxquant.graph.preserve.extra_state import METHODS


def names_in(function: Any) -> set[str]:
    """Return the names that the code of a function, method or property mentions."""
    code = getattr(inspect.unwrap(function_of(function)), "__code__", None)
    return set() if code is None else set(code_names(code))


def function_of(value: Any) -> Any:
    """Return the function in a property, a bound, static or class method; anything else as it is."""
    return value.fget if isinstance(value, property) else getattr(value, "__func__", value)


def code_names(code: types.CodeType) -> frozenset[str]:
    """Return the names that some code mentions, and the functions in it."""
    return frozenset(name for part in codes_in(code) for name in part.co_names)


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield some code, and that of the functions and comprehensions in it."""
    yield code
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from codes_in(part)


@functools.cache
def taken_names() -> frozenset[str]:
    """Return the names that a traced model uses itself, so that no part of the user's can have them there.

    They are those of torch.fx and nn.Module (code, graph, meta, recompile, …) and a few of ours, without what every
    object has and what a graph makes no use of.
    """
    empty = fx.GraphModule(nn.Module(), fx.Graph())
    classes = {name for cls in type(empty).__mro__ if cls is not object for name in vars(cls)}
    ours = {"_fxquant_record", "_fxquant_view", "__prepare_scriptable__"}
    shared = {"__len__", "__iter__", "__module__", "__doc__", *METHODS}
    return frozenset(classes | vars(empty).keys() | ours) - shared
