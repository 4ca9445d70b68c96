"""The names that Python code mentions."""

from __future__ import annotations

import inspect
import types
from typing import Any


def names_in(function: Any) -> set[str]:
    """Return every name that the code of a function, method or property mentions."""
    if isinstance(function, property):
        function = function.fget
    waiting, found = [getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)], set()
    while waiting:
        code = waiting.pop()
        if code is not None:
            found.update(code.co_names)
            waiting += [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return found
