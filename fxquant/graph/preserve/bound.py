"""Kept methods and properties on a graph: they run on an instance of the user's class that shares all of its state."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from typing import Any

from torch import nn

from fxquant.graph.preserve.attributes import check_settable
from fxquant.graph.preserve.preserve import Preserved
from fxquant.graph.references import copy_attributes

_MODEL = "_fxquant_model"
"""The slot of a view that holds its graph: not an attribute, since attributes are shared."""


class Bound:
    """A descriptor in a graph's class for a kept method, property, or dunder method: read, set and called."""

    def __init__(self, owner: type[nn.Module], name: str) -> None:
        self.owner, self.name = owner, name

    def __get__(self, model: nn.Module | None, owner: type | None = None) -> Any:
        static = inspect.getattr_static(self.owner, self.name)
        if model is None or isinstance(static, (classmethod, staticmethod)):
            return getattr(self.owner, self.name)
        view = view_of(model, self.owner)
        value = getattr(view, self.name)
        return _fluent(value, view, model) if getattr(value, "__self__", None) is view else value

    def __set__(self, model: nn.Module, value: Any) -> None:
        setattr(view_of(model, self.owner), self.name, value)

    def __delete__(self, model: nn.Module) -> None:
        delattr(view_of(model, self.owner), self.name)


def _fluent(method: types.MethodType, view: nn.Module, model: nn.Module) -> Any:
    """Return a method that gives the graph where the user's code returns self."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        return model if result is view else result

    return call


def view_of(model: nn.Module, owner: type[nn.Module]) -> nn.Module:
    """Return an instance of the user's class whose attributes, tensors and modules are the graph's own.

    So its methods may use super(), properties and class attributes; calling it calls the graph.
    """
    cls = vars(type(model)).get("_fxquant_view")
    if cls is None:
        cls = _view_class(owner)
        type(model)._fxquant_view = cls  # type: ignore[attr-defined]
    view: nn.Module = object.__new__(cls)
    object.__setattr__(view, "__dict__", model.__dict__)
    object.__setattr__(view, _MODEL, model)
    return view


def _view_class(owner: Any) -> type[nn.Module]:
    """Return a class whose instances count as the user's and call the graph."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = getattr(self, _MODEL, None)
        return owner.__call__(self, *args, **kwargs) if model is None else model(*args, **kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = getattr(self, _MODEL, None)
        return owner.forward(self, *args, **kwargs) if model is None else model.forward(*args, **kwargs)

    def get(self: Any, name: str) -> Any:
        try:
            return owner.__getattr__(self, name)
        except AttributeError:
            if name == _MODEL or getattr(self, _MODEL, None) is None:
                raise
            return self._fxquant_model.__getattr__(name)  # whose error says what to do

    def set_(self: Any, name: str, value: Any) -> None:
        model = getattr(self, _MODEL, None)
        if model is not None:
            check_settable(model, name, value)
        owner.__setattr__(self, name, value)

    def reduce(self: Any, *_: Any) -> Any:
        model = getattr(self, _MODEL, None)
        return object.__reduce_ex__(self, 2) if model is None else (view_of, (model, owner))

    body = {
        "__slots__": (_MODEL,),
        "__module__": owner.__module__,
        "__qualname__": owner.__qualname__,
        "__doc__": owner.__doc__,
        "__call__": call,
        "forward": forward,
        "__getattr__": get,
        "__setattr__": set_,
        "__reduce_ex__": reduce,
    }
    view: type[nn.Module] = type(owner)(owner.__name__, (owner,), body)
    return view


def install(model: nn.Module, preserved: Preserved) -> None:
    """Give a graph's class, which no other graph shares, the kept methods and properties of the user's."""
    owner = preserved.owner
    if owner is not None:
        for name in preserved.bound:
            setattr(type(model), name, Bound(owner, name))


def carry(source: nn.Module, target: nn.Module, preserved: Preserved) -> None:
    """Give a graph what kept code needs of its source: the modules as they are, with their classes."""
    for name in preserved.kept:
        if name in source._modules:
            target._modules[name] = source._modules[name]
        elif name in source._parameters:
            target._parameters.setdefault(name, source._parameters[name])
        elif name in source._buffers:
            target._buffers.setdefault(name, source._buffers[name])
            if name in source._non_persistent_buffers_set:
                target._non_persistent_buffers_set.add(name)
        elif name in vars(source) and name not in target._buffers:
            target.__dict__[name] = vars(source)[name]
    memo: dict[int, Any] = {id(part): part for part in (*source.modules(), *target.modules())}
    memo.update((id(tensor), tensor) for tensor in (*source.parameters(), *source.buffers()))
    memo[id(source)] = target  # where closures and containers hold the model itself
    held = copy_attributes(source, memo) if preserved.kept else {}
    target.__dict__.update({name: value for name, value in held.items() if name in target.__dict__})
    if preserved.kept:  # in the user's order, for code that walks them
        order = {name: place for place, name in enumerate(source._modules)}
        modules = sorted(target._modules.items(), key=lambda item: order.get(item[0], len(order)))
        target.__dict__["_modules"] = dict(modules)


def give_class_values(root: nn.Module, preserved: Preserved) -> None:
    """Copy the kept values of the user's class into a mirror, so that setting them changes its graph alone."""
    for name in preserved.kept:
        if name not in vars(root) and not any(name in getattr(root, place) for place in ("_modules", "_parameters")):
            value = inspect.getattr_static(type(root), name, None)
            if name not in root._buffers and name in dir(type(root)):
                root.__dict__[name] = copy.deepcopy(value)
