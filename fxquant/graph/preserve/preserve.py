"""preserved_attributes: what a graph keeps of the user's model beside forward, and what the kept code needs.

Python code is read for the names in it, which can err in one direction only: it keeps too much. Code that takes names
from elsewhere (getattr, self.modules()) keeps everything. Reading what is still missing is an error, which says to name
it.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from fxquant.errors import AttributeNameError, nearest
from fxquant.graph.preserve.extra_state import methods_to_keep
from fxquant.graph.references import reached
from fxquant.graph.trace.names import codes_in, names_in, taken_names

_PLACES = ("_modules", "_parameters", "_buffers")
_BY_ANY_NAME = {
    *("getattr", "hasattr", "setattr", "vars", "__dict__", "children", "modules", "named_children", "named_modules"),
    *("get_submodule", "get_parameter", "get_buffer", *_PLACES),
}
"""Functions that find an attribute by a name that need not be in the code."""

_SETTERS = {"setattr", "__setattr__", "__dict__", "vars"}
_NOT_FOLLOWED = {"forward", "__init__", "__class__", "__call__"}


@dataclass(frozen=True)
class Preserved:
    """What a graph keeps of a model beside forward.

    names: what the user named. owner: the user's class, whose methods and properties keep running, None if none is
    kept. bound: the names of those. kept: the names of the instance's attributes, tensors and modules that come along.
    sets: the names that kept code sets, on any module; sets_any: whether it may set any (setattr). writes: the names in
    those of its functions that write in place (`.copy_()`), into whatever tensor.
    """

    names: tuple[str, ...] = ()
    owner: type[nn.Module] | None = None
    bound: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    sets: frozenset[str] = frozenset()
    sets_any: bool = False
    writes: frozenset[str] = frozenset()

    def may_write(self, path: str) -> bool:
        """Return whether kept code may change the parameter at a path: one of the root's own, or of a kept module."""
        first, last = path.partition(".")[0], path.rpartition(".")[2]
        return first in self.kept and (last in self.writes or last in self.sets)

    def modules_of(self, root: nn.Module) -> list[str]:
        """Return the names of those modules of a root that are kept."""
        return [name for name in self.kept if root._modules.get(name) is not None]

    def modules(self, root: nn.Module) -> Iterator[nn.Module]:
        """Yield the modules of a tree that kept code may call, with what is inside them."""
        for name in self.modules_of(root):
            yield from root.get_submodule(name).modules()


NOTHING_PRESERVED = Preserved()
"""What a graph keeps by default: nothing."""


def preserve(model: nn.Module, names: Sequence[str], before: Preserved = NOTHING_PRESERVED) -> Preserved:
    """Return what a model's graph keeps for these names: attributes, methods, properties, and what their code needs.

    before: what the model, a graph itself, keeps already of the user's; that stays.
    Raises AttributeNameError for a name that the model does not have, or that a graph uses itself.
    """
    if isinstance(names, str):
        raise AttributeNameError(f"preserved_attributes takes a tuple of names: ({names!r},)")
    for name in names:
        is_there = _is_held(model, name) or any(name in vars(cls) for cls in type(model).__mro__)
        if not is_there and not hasattr(model, name):  # which would run a property, and fill a cached one
            known = [known for known in dir(model) if not known.startswith("_")]
            raise AttributeNameError(
                f"preserved_attributes names {name!r}, which {type(model).__name__} does not have{nearest(name, known)}"
            )
    return _Closure(
        model,
        bound=dict.fromkeys(before.bound),
        kept=dict.fromkeys(before.kept),
        sets=set(before.sets),
        writes=set(before.writes),
    ).of(names, before)


def with_reached(preserved: Preserved, root: nn.Module, whole: Iterable[str]) -> Preserved:
    """Return what a graph keeps, with the modules that untraced code may call outside its own tree.

    whole: the paths of the modules that the graph calls as they are. What they reach of the root's by a plain list, a
    closure or a weak reference stands with its name in the root, or with that of the module around it.
    """
    paths = {id(module): path for path, module in root.named_modules()}
    kept = dict.fromkeys(preserved.kept)
    for path in dict.fromkeys(whole):
        module = root.get_submodule(path)
        if "forward" in vars(module) or not type(module).__module__.startswith("torch."):
            wanted = frozenset(paths.keys() - map(id, module.modules()))
            inner = [paths[part] for part in reached(vars(module), wanted)]
            kept.update(dict.fromkeys(root._modules if "" in inner else [name.partition(".")[0] for name in inner]))
    return replace(preserved, kept=tuple(kept)) if len(kept) > len(preserved.kept) else preserved


class Keep(NamedTuple):
    """What a trace must preserve. preserved: what the graph keeps beside forward. live: the attributes that it
    reads at each call; None: as many of those that may be set as do not steer forward. written: the parameters that
    forward writes into, of which the graph gets copies. recomputes: whether weights that are computed from others
    (weight_norm, w * 2) are so at each call, as training needs, and not once, now. checks: whether the graph checks the
    conditions on which forward raises (assert), rather than that it does not trace.
    """

    preserved: Preserved = NOTHING_PRESERVED
    live: tuple[str, ...] | None = None
    written: frozenset[str] = frozenset()
    recomputes: bool = False
    checks: bool = False


@dataclass
class _Closure:
    """Follows the code of named methods through the model's class, those of its modules, and the user's functions."""

    model: nn.Module
    bound: dict[str, None] = field(default_factory=dict)
    kept: dict[str, None] = field(default_factory=dict)
    sets: set[str] = field(default_factory=set)
    read: set[int] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)

    def of(self, names: Sequence[str], before: Preserved) -> Preserved:
        """Return what these names need, beside what was kept before."""
        for name in names:
            self.add(name, is_named=True)
        for name in methods_to_keep(self.model):
            self.add(name)
        owner = before.owner or (type(self.model) if self.bound else None)
        sets_any = bool(self.sets & _SETTERS)
        kept = tuple(self.kept)
        sets, writes = frozenset(self.sets), frozenset(self.writes)
        return Preserved(
            tuple(dict.fromkeys((*before.names, *names))), owner, tuple(self.bound), kept, sets, sets_any, writes
        )

    def add(self, name: str, is_named: bool = False) -> None:
        """Keep a name of the model, and what its code needs."""
        if name in self.bound or name in self.kept or (name in _NOT_FOLLOWED and name not in vars(self.model)):
            return
        static, is_own = inspect.getattr_static(type(self.model), name, None), _is_users(self.model, name)
        if not is_own:
            return  # nn.Module's, which a graph has too
        if name in taken_names():
            if is_named or name in vars(self.model):
                raise AttributeNameError(
                    f"{type(self.model).__name__}.{name} cannot be preserved: the graph module that a traced model "
                    f"becomes has {name!r} of its own; give it another name"
                )
            self.follow(static)
            return
        if _is_held(self.model, name) or not (callable(static) or hasattr(static, "__get__")):
            self.kept[name] = None
            self.follow_modules(name)
        else:
            self.bound[name] = None
            if any(_is_torchs(function) for function in _functions(static)):  # a container's: it walks self._modules
                self.add_all()
        self.follow(static)

    def add_all(self) -> None:
        """Keep everything that the instance holds, for code that finds it by any name."""
        for name in _held(self.model):
            if name not in taken_names():
                self.add(name)

    def follow(self, thing: Any) -> None:
        """Keep what a method, property or function mentions."""
        for function in _functions(thing):
            code = function.__code__
            if id(code) in self.read or _is_torchs(function):
                continue
            self.read.add(id(code))
            mentions = names_in(function)
            self.sets |= _sets(code) | mentions & _SETTERS
            if any(map(_writes, mentions)):
                self.writes |= mentions
            if mentions & _BY_ANY_NAME:
                self.add_all()
            for name in sorted(mentions):
                self.add(name)
                for cls in {type(module) for module in Preserved(kept=tuple(self.kept)).modules(self.model)}:
                    self.follow(inspect.getattr_static(cls, name, None) if name not in _NOT_FOLLOWED else None)
                self.follow(function.__globals__.get(name))
            for cell in function.__closure__ or ():
                self.follow(_content(cell))

    def follow_modules(self, name: str) -> None:
        """Keep what a kept attribute that wraps a module (a functools.partial, say) mentions."""
        held = vars(self.model).get(name)
        self.follow(held.func if isinstance(held, functools.partial) else held)
        tops = {id(part): top for top, child in self.model.named_children() for part in child.modules()}
        for top_id in reached(held, frozenset({id(self.model), *tops})) & tops.keys():
            self.add(tops[top_id])  # it is in a list, say, and has to be the same module


def _functions(thing: Any) -> Iterator[types.FunctionType]:
    """Yield the Python functions that a method, property or one of Python's descriptors runs."""
    parts: Iterable[Any] = (thing,)
    if isinstance(thing, property):
        parts = (thing.fget, thing.fset, thing.fdel)
    elif isinstance(thing, functools.cached_property):
        parts = (thing.func,)
    for part in parts:
        function = getattr(part, "__func__", part)
        function = inspect.unwrap(function) if isinstance(function, types.FunctionType) else function
        if isinstance(function, types.FunctionType):
            yield function


def _writes(name: str) -> bool:
    """Return whether torch has a function of this name that writes in place; a user's own is followed, if it is one."""
    if not name.endswith("_") or name.endswith("__") or name == "requires_grad_":
        return False
    return any(hasattr(place, name) for place in (torch.Tensor, torch, nn.functional, nn.init))


def _is_torchs(function: types.FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


def _sets(code: types.CodeType) -> set[str]:
    """Return the names of the attributes that code sets, functions inside it too."""
    steps = (step for part in codes_in(code) for step in dis.get_instructions(part))
    return {str(step.argval) for step in steps if step.opname in ("STORE_ATTR", "DELETE_ATTR")}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _held(model: nn.Module) -> list[str]:
    """Return the names of what an instance holds beyond nn.Module's own."""
    plain = vars(nn.Module())
    return [name for place in (vars(model), *(vars(model)[p] for p in _PLACES)) for name in place if name not in plain]


def _is_held(model: nn.Module, name: str) -> bool:
    return any(name in place for place in (vars(model), *(vars(model)[p] for p in _PLACES)))


def _is_users(model: nn.Module, name: str) -> bool:
    """Return whether a name is an attribute that the user's class or instance adds to nn.Module's own."""
    in_class = any(name in vars(cls) for cls in type(model).__mro__ if not issubclass(nn.Module, cls))
    return in_class or (_is_held(model, name) and name not in vars(nn.Module()))
