"""A digest of what Python code computes, without comments, docstrings, annotations and formatting.

It is made from the syntax tree, which is the same in all versions of Python, unlike bytecode.
"""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from fxquant.graph.fingerprint.values import Values, closed_over, constants_of, operators_of
from fxquant.graph.trace.names import code_names, codes_in, function_of

_MOST = 200
"""The most functions that are followed from one forward."""

_IGNORED = frozenset({"ctx", "type_comment", "kind", "returns", "annotation", "decorator_list", "type_params"})
_LIBRARIES = ("torch", "builtins")


class Code(NamedTuple):
    """A class's code. digest: "" without its source; release: "transformers 4.57.1", "" without a version.

    reads: the names that it reads; writes: whether it writes into tensors, so that those hold state.
    """

    digest: str = ""
    release: str = ""
    reads: frozenset[str] = frozenset()
    writes: bool = False


class _Followed(NamedTuple):
    """The functions that a forward uses, and their syntax trees, None if one has no source."""

    functions: tuple[types.FunctionType, ...]
    trees: tuple[ast.AST, ...] | None


def code_of(module_type: Any, forward: Any) -> Code:
    """Return the code of a module's forward, with the methods, functions and constants that it uses, except torch's."""
    top = module_type.__module__.partition(".")[0]
    version = getattr(sys.modules.get(top), "__version__", None)
    release = f"{top} {version}" if isinstance(version, str) else ""
    functions, trees = _follow(module_type, forward)
    reads = frozenset[str]().union(*(code_names(function.__code__) for function in functions))
    if trees is None:
        return Code("", release, reads, True)
    texts = [_text(tree) for tree in trees] + sorted(_constants(module_type, functions, reads))
    digest = hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16]
    return Code(digest, release, reads, any(map(_writes, trees)))


@functools.lru_cache(1024)
def _follow(module_type: Any, forward: Any) -> _Followed:
    """Return the functions that a forward calls, directly or not, itself first."""
    waiting = [_function(forward)]
    seen: dict[types.FunctionType, ast.AST | None] = {}
    while waiting and len(seen) < _MOST:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen[function] = tree = _tree(function)
        for name, is_attribute in _names(tree) if tree is not None else ():
            used = inspect.getattr_static(module_type, name, None) if is_attribute else function.__globals__.get(name)
            waiting.append(_function(used))
    trees = tuple(tree for tree in seen.values() if tree is not None)
    return _Followed(tuple(seen), trees if len(trees) == len(seen) else None)


def _constants(module_type: Any, functions: tuple[types.FunctionType, ...], reads: frozenset[str]) -> set[str]:
    """Return, as texts, what functions use but do not set of globals, outer functions and the class."""
    stored = stored_names(module_type).union(*(_globals_set(function.__code__) for function in functions))
    values = Values(reads, stored)
    for function in functions:
        held = dict(closed_over(function))
        names = code_names(function.__code__)
        held.update((name, function.__globals__[name]) for name in names if name in function.__globals__)
        for name, value in held.items():
            if isinstance(value, types.ModuleType):
                for part, constant in _of_module(value, reads).items():
                    if part not in stored:
                        values.add(f"{name}.{part}", constant)
            elif not (name in stored or name.startswith("__") or isinstance(value, (types.FunctionType, nn.Module))):
                values.add(name, value)
    for name in reads - stored:
        value = inspect.getattr_static(module_type, name, None)
        is_ours = isinstance(value, (bool, int, float, str, tuple, list, dict)) and not hasattr(nn.Module, name)
        if is_ours and not name.startswith("__"):
            values.add(f"self.{name}", value)
    return {f"{name}={text}" for name, text in values.texts.items()}


def _of_module(module: types.ModuleType, reads: frozenset[str]) -> dict[str, Any]:
    """Return the plain globals that code reads of a user's Python module, which is not in a released package."""
    top = sys.modules.get(module.__name__.partition(".")[0], module)
    if top.__name__ in sys.stdlib_module_names or hasattr(top, "__version__") or top.__name__ in _LIBRARIES:
        return {}
    return {n: v for n in reads if isinstance(v := vars(module).get(n), (bool, int, float, str))}


def _globals_set(code: types.CodeType) -> frozenset[str]:
    """Return the globals that code sets."""
    return frozenset(str(line.argval) for line in dis.get_instructions(code) if line.opname == "STORE_GLOBAL")


def _writes(tree: ast.AST) -> bool:
    """Return whether code writes into a tensor or container: x[i] = y, x.add_(y)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            return True
        is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_method and re.fullmatch(r"[a-z].*_", node.func.attr):  # type: ignore[attr-defined]
            return True
        if isinstance(node, ast.AugAssign) and not isinstance(node.target, ast.Name):
            return True
    return False


def gives_something(function: types.FunctionType) -> bool:
    """Return whether a function may return anything but None."""
    lines = [line for line in dis.get_instructions(function) if line.opname not in ("NOP", "CACHE")]
    for last, line in zip([None, *lines], lines, strict=False):
        if line.opname == "RETURN_CONST" and line.argval is not None:
            return True
        is_none = last is not None and "CONST" in last.opname and last.argval is None
        if line.opname == "RETURN_VALUE" and not is_none:
            return True
    return False


def hook_word(hook: Any) -> str:
    """Return a text that identifies a hook which takes part in computing; "" for a hook that only observes."""
    function = _function(getattr(hook, "func", hook))
    if function is None or not gives_something(function):
        return ""
    code = function.__code__
    word = Values().word_for(hook) or function.__name__
    words = [*sorted(code_names(code)), *constants_of(code), word, *sorted({*operators_of(code)})]
    return f"{function.__name__} {hashlib.sha256(' '.join(words).encode()).hexdigest()[:8]}"


def _function(value: Any) -> types.FunctionType | None:
    """Return the function in a method, property or decorated function; None for torch's, and for anything else."""
    if isinstance(value, (staticmethod, classmethod, types.MethodType, property)):
        value = function_of(value)
    value = inspect.unwrap(value) if callable(value) and not isinstance(value, type) else value
    is_users = isinstance(value, types.FunctionType) and not (value.__module__ or "").startswith(_LIBRARIES)
    return value if is_users else None


@functools.lru_cache(1024)
def _tree(function: types.FunctionType) -> ast.AST | None:
    """Return a function's syntax tree; None if its source is unavailable, or part of a line, as a lambda's."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return node if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else None


def _text(node: Any) -> str:
    """Return a syntax tree as text."""
    if isinstance(node, ast.AST):
        fields = [
            f"{name}={_text(value)}"
            for name, value in ast.iter_fields(node)
            if name not in _IGNORED and value is not None and value != []
        ]
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        is_idle = [isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) for part in node]
        return f"[{','.join(_text(part) for part, idle in zip(node, is_idle, strict=True) if not idle)}]"
    return repr(node)


def _names(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield each name that code reads, once, and whether it is an attribute."""
    names: dict[tuple[str, bool], None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names[node.attr, True] = None
        elif isinstance(node, ast.Name):
            names[node.id, False] = None
    yield from names


@functools.lru_cache(1024)
def stored_names(module_type: Any) -> frozenset[str]:
    """Return the attributes that a class's methods other than __init__ set, by = or +=: its state, not its options."""
    bases = (base for base in module_type.__mro__ if base not in (nn.Module, object))
    methods = ((name, function_of(value)) for base in bases for name, value in vars(base).items())
    codes = (
        code
        for name, method in methods
        if name not in ("__init__", "__setstate__") and isinstance(method, types.FunctionType)
        for code in codes_in(inspect.unwrap(method).__code__)
    )
    lines = (line for code in codes for line in dis.get_instructions(code))
    return frozenset(str(line.argval) for line in lines if line.opname == "STORE_ATTR")
