"""Where the user's code is: its files and lines, and not those of torch or of this package."""

from __future__ import annotations

import linecache
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

_LIBRARIES = (str(pathlib.Path(torch.__file__).parent), str(pathlib.Path(__file__).parent), "<")


def place_of(filename: str, line: int | str | None) -> str:
    """Return "file.py:12", "Cell In[3], line 12" in IPython, whose files are temporary, or "" in a library."""
    ipython = sys.modules.get("IPython")
    compiler: Any = getattr(ipython and ipython.get_ipython(), "compile", None)
    cell = compiler.format_code_name(filename) if hasattr(compiler, "format_code_name") else None
    if cell is not None:
        return f"{' '.join(cell)}, line {line}"
    return "" if filename.startswith(_LIBRARIES) else f"{filename}:{line}"


def caller() -> str:
    """Return "file.py:12, in encode: `the line`" of the user's code that is running, or ""."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        place = place_of(code.co_filename, frame.f_lineno)
        if place:
            line = linecache.getline(code.co_filename, frame.f_lineno, frame.f_globals).strip()
            return f"{place}, in {code.co_name}: `{line}`"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def receivers() -> Iterator[tuple[Any, bool]]:
    """Yield the first argument of each function that is running, a method's self, the innermost first.

    With each: whether that function is the user's.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            yield frame.f_locals.get(code.co_varnames[0]), bool(place_of(code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
