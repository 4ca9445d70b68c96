"""References to a model's modules from outside its tree: closures, defaults, caches, weak references.

copy.deepcopy keeps functions and weak references, so a lambda of a copied model would call the layers of the original.
`copy_references` makes new ones if they lead to a module of the tree. References through a class, a global or C code
cannot be replaced; `check` finds them by their calls.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

Memo = dict[int, Any]
"""Copies by the ids of their originals, as copy.deepcopy has them."""

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device, type})
_CONTAINERS = (list, tuple, set, frozenset, collections.deque)
_CACHED: Any = type(functools.lru_cache(lambda: None))
_PROXIES = weakref.ProxyTypes
_OWN = frozenset({*vars(nn.Module()), "qconfig", "_fxquant_record", "_compiled_call_impl"})
"""The attributes of a module that a mirror copies in its own way, or that are ours."""


def reached(value: Any, wanted: frozenset[int]) -> set[int]:
    """Return the ids of the wanted modules that a value leads to, without going through one of them."""
    seen: Memo = {}
    waiting = [value]
    while waiting:
        thing = waiting.pop()
        if id(thing) not in seen:
            seen[id(thing)] = thing
            waiting += () if id(thing) in wanted else _children(thing)
    return seen.keys() & wanted


def copy_attributes(module: nn.Module, memo: Memo) -> dict[str, Any]:
    """Return copies of a module's attributes, besides its tree, that lead to modules of which the memo has copies."""
    wanted = frozenset(id(part) for part in module.modules() if id(part) in memo)
    for thing in _Walk([module], wanted, has_any=True).leading:
        memo.pop(id(thing), None)  # made by copy.deepcopy, which keeps functions
    copy_references([module], memo, wanted)
    return {name: twin_of(value, memo) for name, value in _attributes(module) if reached(value, wanted)}


@functools.cache
def _graphs_own() -> frozenset[str]:
    return frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph())))


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Return what a module holds besides its tree, and its graph if it has one."""
    ignored = _graphs_own() | _OWN if isinstance(module, fx.GraphModule) else _OWN
    return [(name, value) for name, value in vars(module).items() if name not in ignored]


def copy_references(modules: Iterable[nn.Module], memo: Memo, wanted: frozenset[int] | None = None) -> None:
    """Add copies of functions and weak references that lead to modules of a tree to a memo of the modules' copies.

    wanted: the ids of the modules of interest; None: the modules themselves.
    """
    leading = _Walk(modules, wanted).leading
    functions = [thing for thing in leading if isinstance(thing, types.FunctionType)]
    cells = {id(cell): types.CellType() for function in functions for cell in function.__closure__ or ()}
    for function in functions:
        closure = tuple(cells[id(cell)] for cell in function.__closure__ or ())
        twin = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure or None)
        twin.__qualname__, twin.__module__, twin.__doc__ = function.__qualname__, function.__module__, function.__doc__
        memo[id(function)] = twin
    memo.update((id(thing), twin) for thing in leading if (twin := _weak_twin(thing, memo)) is not None)
    for thing in leading:
        if isinstance(thing, _CACHED):
            memo[id(thing)] = functools.lru_cache(**thing.cache_parameters())(twin_of(thing.__wrapped__, memo))
    for function in functions:
        twin = memo[id(function)]
        twin.__defaults__ = twin_of(function.__defaults__, memo)
        twin.__kwdefaults__ = twin_of(function.__kwdefaults__, memo)
        twin.__dict__.update(twin_of(vars(function), memo))
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                cells[id(cell)].cell_contents = twin_of(cell.cell_contents, memo)


def repoint(modules: Iterable[nn.Module], swapped: Mapping[int, Any]) -> None:
    """Turn stale references to swapped modules, by their ids, outside the tree of some modules into the replacements.

    Containers, attributes, closures and defaults are changed in place; tuples and weak references are replaced. Bound
    methods and C code keep the swapped module.
    """
    walk = _Walk(modules, frozenset(swapped), has_any=True)
    memo: Memo = dict(swapped)
    for thing in walk.leading:
        _renew(thing, memo)
    for holder in walk.holders_of_leading():
        _put(holder, memo)


def _renew(thing: Any, memo: Memo) -> Any:
    """Return the replacement of a thing; itself if it can be changed in place."""
    if id(thing) in memo:
        return memo[id(thing)]
    twin = _weak_twin(thing, memo)
    if twin is not None:
        memo[id(thing)] = twin
    elif isinstance(thing, (tuple, frozenset)):
        parts = [_renew(part, memo) for part in thing]
        if any(new is not old for new, old in zip(parts, thing, strict=True)):
            memo[id(thing)] = type(thing)(*parts) if hasattr(thing, "_fields") else type(thing)(parts)
    return memo.get(id(thing), thing)


def _put(holder: Any, memo: Memo) -> None:
    """Replace, in place, what a thing holds."""
    if isinstance(holder, types.FunctionType):
        for cell in holder.__closure__ or ():
            if id(_content(cell)) in memo:
                cell.cell_contents = memo[id(cell.cell_contents)]
        if any(id(part) in memo for part in holder.__defaults__ or ()):
            holder.__defaults__ = _renew(holder.__defaults__, memo)
        _put(holder.__kwdefaults__, memo)
    elif isinstance(holder, functools.partial):
        args = tuple(_renew(part, memo) for part in holder.args)
        keywords = {name: _renew(part, memo) for name, part in holder.keywords.items()}
        holder.__setstate__((_renew(holder.func, memo), args, keywords, vars(holder)))  # type: ignore[attr-defined]
    elif isinstance(holder, set):
        for part in [part for part in holder if id(part) in memo]:
            holder.remove(part)
            holder.add(memo[id(part)])
    elif isinstance(holder, (dict, list, collections.deque)):
        for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            if id(value) in memo:
                holder[key] = memo[id(value)]
    for name in () if isinstance(holder, nn.Module) else (n for cls in type(holder).__mro__ for n in _slots(cls)):
        if id(getattr(holder, name, None)) in memo:
            setattr(holder, name, memo[id(getattr(holder, name))])
    held = getattr(holder, "__dict__", None)
    if isinstance(held, dict):
        _put(held, memo)


def twin_of(value: Any, memo: Memo) -> Any:
    """Return a deep copy of a value, with what the memo has copies of; the value itself if it cannot be copied.

    Plain containers are rebuilt here, since from Python 3.14 on copy.deepcopy does not look up functions in the memo.
    """
    if type(value) in _PLAIN:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if type(value) in (list, dict, tuple) and any(isinstance(part, _HOLDERS) for part in _children(value)):
        parts: Any = [twin_of(part, memo) for part in (value.values() if isinstance(value, dict) else value)]
        twin = dict(zip(value, parts, strict=True)) if isinstance(value, dict) else type(value)(parts)
        memo[id(value)] = twin
        return twin
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a lock, an open file, a generator
        return value


_HOLDERS = (types.FunctionType, weakref.ref, weakref.WeakValueDictionary, _CACHED)


def _weak_twin(thing: Any, memo: Mapping[int, Any]) -> Any:
    """Return a weak reference to the copy of what another refers to; None for anything else."""
    if isinstance(thing, weakref.WeakMethod):
        method = thing()
        twin = None if method is None else memo.get(id(method.__self__))
        return None if method is None or twin is None else weakref.WeakMethod(getattr(twin, method.__name__))
    if type(thing) is weakref.ref or type(thing) in _PROXIES:
        twin = memo.get(id(_referent(thing)))
        make: Callable[[Any], Any] = weakref.ref if type(thing) is weakref.ref else weakref.proxy
        return None if twin is None else make(twin)
    if isinstance(thing, weakref.WeakValueDictionary):
        return weakref.WeakValueDictionary({key: memo.get(id(value), value) for key, value in thing.items()})
    return None


def _referent(thing: Any) -> Any:
    """Return what a weak reference refers to, or a proxy if that is a module; None if it is gone."""
    if isinstance(thing, weakref.WeakMethod):
        return getattr(thing(), "__self__", None)
    if isinstance(thing, weakref.ref):
        return thing()
    try:
        return thing.forward.__self__  # a proxy has the attributes of its object
    except (ReferenceError, AttributeError):
        return None


class _Walk:
    """All that the attributes of some modules lead to. leading: those that lead on to a module of interest."""

    def __init__(
        self, modules: Iterable[nn.Module], wanted: frozenset[int] | None = None, has_any: bool = False
    ) -> None:
        """wanted: the ids of the modules of interest; None: the modules themselves. has_any: look for plain containers
        too, even if there is no function or weak reference.
        """
        roots = list(modules)
        tree = frozenset(map(id, roots))
        self.wanted = tree if wanted is None else wanted
        self.holders: dict[int, list[Any]] = {}
        self._things: Memo = {}
        self._found: set[int] = set()
        waiting: list[Any] = list(roots)
        while waiting:
            holder = waiting.pop()
            for part in _children(holder, holder is not None and id(holder) in tree):
                if id(part) in self.holders:
                    self.holders[id(part)].append(holder)
                    continue
                self.holders[id(part)] = [holder]
                self._things[id(part)] = part  # so that its id stays its own
                if id(part) in self.wanted:
                    self._found.add(id(part))
                elif id(part) not in tree:
                    has_any = has_any or isinstance(part, _HOLDERS) or type(part) in _PROXIES
                    waiting.append(part)
        self.leading = self._trace_back() if has_any else []

    def holders_of_leading(self) -> list[Any]:
        """Return all that holds a module of interest, or something that leads to one, each once."""
        ids = {*self._found, *map(id, self.leading)}
        return list({id(holder): holder for found in ids for holder in self.holders[found]}.values())

    def _trace_back(self) -> list[Any]:
        reached: Memo = {}
        waiting = [holder for found in self._found for holder in self.holders[found]]
        while waiting:
            thing = waiting.pop()
            if id(thing) not in reached and id(thing) in self._things and id(thing) not in self._found:
                reached[id(thing)] = thing
                waiting += self.holders[id(thing)]
        return list(reached.values())


def _children(thing: Any, is_module: bool = False) -> Iterator[Any]:
    """Yield what a thing holds, without plain values. is_module: whether it is a module of the tree."""
    for part in _parts(thing, is_module):
        if type(part) not in _PLAIN and not isinstance(part, torch.Tensor):
            yield part


def _parts(thing: Any, is_module: bool) -> Iterable[Any]:
    if is_module:
        return [value for _, value in _attributes(thing)]
    if isinstance(thing, types.FunctionType):
        contents = [_content(cell) for cell in thing.__closure__ or ()]
        return [*contents, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *vars(thing).values()]
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, weakref.ref) or type(thing) in _PROXIES:
        return [_referent(thing)]
    if isinstance(thing, _CACHED):
        return [thing.__wrapped__]
    if isinstance(thing, weakref.WeakValueDictionary):
        return list(thing.values())
    if isinstance(thing, dict):
        return [*thing.values(), *getattr(thing, "__dict__", {}).values()]
    if isinstance(thing, _CONTAINERS):
        return thing
    if isinstance(thing, (type, types.ModuleType)) or hasattr(type(thing), "__deepcopy__"):
        return ()  # not copied, or in a way of their own
    slots = [name for cls in type(thing).__mro__ for name in _slots(cls)]
    return [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, name, None) for name in slots)]


def _slots(cls: type) -> tuple[str, ...]:
    names = vars(cls).get("__slots__", ()) if cls.__module__ != "builtins" else ()
    return (names,) if isinstance(names, str) else tuple(names)


def _content(cell: types.CellType) -> Any:
    """Return what a cell holds, None if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
