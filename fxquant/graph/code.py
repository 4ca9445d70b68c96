"""What Python code computes, as a digest: without comments, docstrings, annotations and formatting.

It is taken from the syntax tree, which all versions of Python agree on, and not from bytecode, which they do not.
"""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

_MOST = 200
"""How many functions are followed from one forward."""

_IGNORED = frozenset({"ctx", "type_comment", "kind", "returns", "annotation", "decorator_list", "type_params"})
_LIBRARIES = ("torch", "builtins")


class Code(NamedTuple):
    """A class's code. digest: "" without its source; release: "transformers 4.57.1", "" without a version."""

    digest: str = ""
    release: str = ""


@functools.lru_cache(1024)
def code_of(kind: Any, forward: Any) -> Code:
    """Return the code of a module's forward, with the methods, functions and constants that it uses but torch's."""
    top = kind.__module__.partition(".")[0]
    version = getattr(sys.modules.get(top), "__version__", None)
    release = f"{top} {version}" if isinstance(version, str) else ""
    waiting, texts = [_function(forward)], []
    seen: set[types.FunctionType] = set()
    while waiting and len(seen) < _MOST:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        tree = _tree(function)
        if tree is None:
            return Code("", release)
        texts.append(_text(tree))
        for name, is_attribute in _names(tree):
            used = inspect.getattr_static(kind, name, None) if is_attribute else function.__globals__.get(name)
            if isinstance(used, (bool, int, float, str)) and not (name.startswith("__") or is_attribute):
                texts.append(f"{name}={used!r}")
            waiting.append(_function(used))
    return Code(hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16], release)


def word_for(function: Any) -> str:
    """Return a function's name, of a lambda the names and constants that its code has; "" for what is no function."""
    if isinstance(function, functools.partial):
        word = word_for(function.func)
        return f"partial({word}, {function.args}, {function.keywords})" if word else ""
    if isinstance(function, (types.MethodType, type)) or not callable(function):
        return ""
    name = str(getattr(function, "__name__", ""))
    code = getattr(function, "__code__", None)
    if name != "<lambda>" or code is None:
        return name
    return f"<lambda of {', '.join(code.co_names)}, {', '.join(repr(c) for c in code.co_consts if type(c) is float)}>"


def _function(value: Any) -> types.FunctionType | None:
    """Return the function that a method, property or decorated function is; None for torch's, and for anything else."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    value = inspect.unwrap(value) if callable(value) and not isinstance(value, type) else value
    is_own = isinstance(value, types.FunctionType) and not (value.__module__ or "").startswith(_LIBRARIES)
    return value if is_own else None


@functools.lru_cache(1024)
def _tree(function: types.FunctionType) -> ast.AST | None:
    """Return a function's syntax tree; None where its source cannot be had, or is part of a line (a lambda's)."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return node if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else None


def _text(node: Any) -> str:
    """Return a syntax tree as text."""
    if isinstance(node, ast.AST):
        told = [
            f"{name}={_text(value)}"
            for name, value in ast.iter_fields(node)
            if name not in _IGNORED and value is not None and value != []
        ]
        return f"{type(node).__name__}({','.join(told)})"
    if isinstance(node, list):
        is_idle = [isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) for part in node]
        return f"[{','.join(_text(part) for part, idle in zip(node, is_idle, strict=True) if not idle)}]"
    return repr(node)


def _names(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield each name that code reads, and whether it is an attribute of something."""
    found: dict[tuple[str, bool], None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found[node.attr, True] = None
        elif isinstance(node, ast.Name):
            found[node.id, False] = None
    yield from found


@functools.lru_cache(1024)
def stored_names(kind: Any) -> frozenset[str]:
    """Return the attributes that methods of a class other than __init__ set, by = or +=: its state, not its options."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if name != "__init__" and isinstance(function, types.FunctionType):
                found.update(_stores(inspect.unwrap(function).__code__))
    return frozenset(found)


def _stores(code: types.CodeType) -> Iterator[str]:
    yield from (str(line.argval) for line in dis.get_instructions(code) if line.opname == "STORE_ATTR")
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _stores(part)
