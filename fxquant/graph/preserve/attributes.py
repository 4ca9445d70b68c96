"""Attributes that forward reads while it is traced: as nodes where they may be set later, or noted as constants."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from fxquant.errors import FixedAttributeError
from fxquant.graph.preserve.preserve import Preserved

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


@dataclass
class Attributes:
    """What becomes of a mirror's plain attributes, by path ("temperature", "head.temperature").

    settable: those that kept code, or the user by name, may set; within_reach: others, of kept modules. live: those of
    the settable that the graph reads at each call. read: those that forward read as constants; checked: those of them
    that the graph compares at each call. baked: of any module that was traced through, what plain values forward read.
    """

    settable: tuple[str, ...] = ()
    within_reach: tuple[str, ...] = ()
    live: frozenset[str] = frozenset()
    read: dict[str, None] = field(default_factory=dict)
    checked: dict[str, None] = field(default_factory=dict)
    baked: dict[str, Any] = field(default_factory=dict)


def attributes_of(root: nn.Module, preserved: Preserved) -> Attributes:
    """Return the plain attributes of a model and its kept modules that may be set later.

    Settable are those named, those in named modules, and those of a name that kept code sets.
    """
    named = set(preserved.names)
    paths: list[str] = []
    others: list[str] = []
    reachable = {id(module) for module in preserved.modules(root)}
    for path, module in root.named_modules():
        if path and (id(module) not in reachable or type(module).__module__.startswith("torch.nn.")):
            continue  # torch's modules are leaves, which read their attributes at each call
        whole = path.split(".")[0] in named
        held = vars(module) if path else {**dict.fromkeys(_class_values(root, preserved)), **vars(root)}
        for name, value in held.items():
            is_wanted = name in preserved.sets or preserved.sets_any or whole or (not path and name in named)
            if name not in _NOT_OURS and not callable(value):
                (paths if is_wanted else others).append(f"{path}.{name}" if path else name)
    return Attributes(tuple(paths), tuple(others))


def _class_values(root: nn.Module, preserved: Preserved) -> list[str]:
    """Return the kept names that the class holds the values of."""
    held = {*vars(root), *root._modules, *root._parameters, *root._buffers}
    return [name for name in preserved.kept if name not in held]


_NOT_OURS = frozenset(vars(nn.Module()))


class _Read:
    """Stands for an attribute in a class, as a data descriptor: these come before what an instance holds."""

    def __init__(self, name: str, path: str, watch: _Watch) -> None:
        self.name, self.path, self.watch = name, path, watch

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None or self.name not in vars(module):
            raise AttributeError(self.name)
        return self.watch.read(self.path, vars(module)[self.name])

    def __set__(self, module: nn.Module, value: Any) -> None:
        vars(module)[self.name] = value
        self.watch.written.add(self.path)

    def __delete__(self, module: nn.Module) -> None:
        del vars(module)[self.name]


class _Watch:
    """Answers the reads of one trace."""

    def __init__(self, tracer: fx.Tracer, attributes: Attributes) -> None:
        self.tracer, self.attributes = tracer, attributes
        self.nodes: dict[str, fx.Proxy] = {}
        self.written: set[str] = set()  # set by forward itself, so no longer the user's

    def read(self, path: str, value: Any) -> Any:
        """Return what forward gets for an attribute."""
        attributes = self.attributes
        if path in self.written:
            return value
        if path in attributes.live:
            return self.node(path)
        attributes.read[path] = None
        is_reached = path in attributes.settable or ("." in path and path in attributes.within_reach)
        if is_reached and path not in attributes.checked and _is_plain(value):
            attributes.checked[path] = None
            self.tracer.create_proxy("call_function", check_attribute, (self.node(path), path, value), {})
        return value

    def node(self, path: str) -> fx.Proxy:
        """Return the node that reads an attribute."""
        if path not in self.nodes:
            self.nodes[path] = self.tracer.create_proxy("get_attr", path, (), {})
        return self.nodes[path]


@contextlib.contextmanager
def watched(
    root: nn.Module, tracer: fx.Tracer, attributes: Attributes, only: Collection[str] | None = None
) -> Iterator[None]:
    """Answer reads of a mirror's attributes meanwhile. only: the paths to watch; None: what is settable and the root's.

    Afterwards its modules have their classes back.
    """
    watch, classes = _Watch(tracer, attributes), []
    own = [name for name in vars(root) if name not in _NOT_OURS and not name.startswith("_fxquant")]
    paths = dict.fromkeys((*attributes.settable, *attributes.within_reach, *own)) if only is None else only
    by_module: dict[str, dict[str, Any]] = {}
    for path in paths:
        owner, _, name = path.rpartition(".")
        by_module.setdefault(owner, {})[name] = _Read(name, path, watch)
    try:
        for owner, reads in by_module.items():
            module = root.get_submodule(owner)
            cls: Any = type(module)
            classes.append((module, cls))
            body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **reads}
            module.__class__ = type(cls)(cls.__name__, (cls,), body)
        yield
    finally:
        for module, cls in classes:
            module.__class__ = cls


@contextlib.contextmanager
def noted(root: nn.Module, baked: dict[str, Any]) -> Iterator[None]:
    """Note meanwhile, by path, which plain attributes the code of a mirror's modules reads, and their values. Those
    that forward has set before do not count. nn.Module is patched for that, as torch.fx does to trace.
    """
    paths = {id(module): path for path, module in root.named_modules()}
    before = {id(module): dict(vars(module)) for module in root.modules()}
    thread, missing = threading.get_ident(), object()
    get, was = nn.Module.__getattribute__, vars(nn.Module).get("__getattribute__")

    def read(module: nn.Module, name: str) -> Any:
        value = get(module, name)
        if name.startswith("_") or not _may_be_baked(value) or name in _NOT_OURS or id(module) not in paths:
            return value
        if threading.get_ident() == thread:
            held, path = before[id(module)], paths[id(module)]
            if (held[name] if name in held else _class_value(type(module), name, missing)) is value:
                baked[f"{path}.{name}" if path else name] = value
        return value

    nn.Module.__getattribute__ = read  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if was is None:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = was  # type: ignore[method-assign]


def _class_value(cls: type, name: str, missing: object) -> Any:
    """Return what a class holds under a name: a property itself, not its value."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), missing)


def _may_be_baked(value: Any) -> bool:
    """Return whether a value is plain, or a function that can be found by its name, as a pickle finds it."""
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        home = sys.modules.get(getattr(value, "__module__", None) or "torch")
        return getattr(home, value.__name__, None) is value
    return _is_plain(value)


class Part(nn.Module):
    """Stands in a graph's module for one that was traced through, and holds what is left of it."""

    def __setattr__(self, name: str, value: Any) -> None:
        path, baked = vars(self).get("_fxquant_baked", ("", {}))
        if name in baked and not is_same(value, vars(self).get(name, baked[name])):
            raise fixed_error(f"{path}.{name}", baked[name], value)
        super().__setattr__(name, value)

    def _get_name(self) -> str:
        return "Module"


def seal(model: nn.Module, baked: Mapping[str, Any]) -> None:
    """Apply `check_settable` to the modules that torch.fx makes to hold a graph's parts, too."""
    by_owner: dict[str, dict[str, Any]] = {}
    for path, value in baked.items():
        owner, _, name = path.rpartition(".")
        by_owner.setdefault(owner, {})[name] = value
    for path, part in model.named_modules() if by_owner.keys() - {""} else ():
        if type(part) in (nn.Module, Part) and path in by_owner:
            part.__class__ = Part
            part.__dict__["_fxquant_baked"] = path, by_owner[path]


@fx.node.has_side_effect
def check_attribute(value: Any, path: str, fixed: Any) -> None:
    """Raise FixedAttributeError unless an attribute is what forward read when it was traced: a node of such graphs."""
    if has_torch_function((value,)):
        handle_torch_function(check_attribute, (value,), value, path, fixed)
    elif value is not fixed and not is_same(value, fixed):
        raise fixed_error(path, fixed, value, is_kept=True)


def is_same(value: Any, other: Any) -> bool:
    """Return whether two attributes' values are the same thing, or equal plain values."""
    return value is other or (_is_plain(value) and _is_plain(other) and value == other)


def _is_plain(value: Any) -> bool:
    """Return whether a value may stand in a graph as it is."""
    return isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))


def check_settable(model: nn.Module, name: str, value: Any) -> None:
    """Raise FixedAttributeError for another value of an attribute that forward read when a graph was traced."""
    record = vars(model).get("_fxquant_record")
    if record is None or not (name in record.fixed or name in record.baked):
        return
    fixed = vars(model).get(name, record.baked.get(name, value))
    if not is_same(value, fixed):
        raise fixed_error(name, fixed, value, name in record.preserved.kept)


def fixed_error(path: str, fixed: Any, value: Any, is_kept: bool = False) -> FixedAttributeError:
    """Return the error for an attribute that is set, or was, to another value than forward was traced with."""
    shown = f" ({fixed!r})" if _is_plain(fixed) else ""
    keep = "" if is_kept else f", name {path.partition('.')[0]!r} in its preserved_attributes"
    return FixedAttributeError(
        f"{path!r} was read when forward was traced{shown}, which a graph does not do again: "
        f"{f'{value!r} ' if _is_plain(value) else 'another value '}would change nothing. Set it on the float model and "
        f"prepare that{keep}, or pass it to forward as an argument"
    )
