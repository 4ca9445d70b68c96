"""Extra states (get_extra_state: torch's way to keep more than tensors in a state_dict), which a graph keeps as well.

The root's methods are kept and run on the graph. A module that was traced through no longer exists: its state is kept,
until a state_dict brings another.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

SUFFIX = "_extra_state"
"""torch's key of an extra state in a state_dict, after the module's path."""

METHODS = ("get_extra_state", "set_extra_state")


def has_extra_state(cls: type) -> bool:
    """Return whether modules of a type keep more than tensors."""
    return cls.get_extra_state is not nn.Module.get_extra_state  # type: ignore[attr-defined]


def methods_to_keep(model: nn.Module) -> tuple[str, ...]:
    """Return which of the two methods a model's class defines."""
    return tuple(name for name in METHODS if getattr(type(model), name) is not getattr(nn.Module, name))


def lost_states(result: nn.Module, source: nn.Module, is_skeleton: bool = False) -> dict[str, Any]:
    """Return the extra states, by path, of those modules of a source that its graph does not contain.

    is_skeleton: a file will bring them, so they are None; the source may be without data, which their code may need.
    """
    standing = dict(result.named_modules(remove_duplicate=False))
    return {
        path: None if is_skeleton else copy.deepcopy(module.get_extra_state())
        for path, module in source.named_modules(remove_duplicate=False)
        if path and has_extra_state(type(module)) and not has_extra_state(type(standing.get(path, result)))
    }


def tensors_of(root: nn.Module) -> dict[str, Any]:
    """Return a model's state_dict without extra states, and without running their code, which may need values."""
    if not any(has_extra_state(type(module)) for module in root.modules()):
        return root.state_dict()
    state = _mute(root).state_dict()
    return {key: value for key, value in state.items() if not key.endswith(SUFFIX)}


def _mute(module: nn.Module) -> nn.Module:
    """Return a view of a module that shares everything but has no extra state, nor have the modules inside it."""
    cls: Any = type(module)
    if has_extra_state(cls):
        body = {"__module__": cls.__module__, "get_extra_state": nn.Module.get_extra_state}
        cls = type(cls)(cls.__name__, (cls,), body)
    view: nn.Module = object.__new__(cls)
    parts = {name: part if part is None else _mute(part) for name, part in module._modules.items()}
    object.__setattr__(view, "__dict__", {**vars(module), "_modules": parts})
    return view


def key_of(prefix: str, path: str) -> str:
    """Return the key of a module's extra state in the state_dict of a model that is at a prefix in another."""
    return f"{prefix}{path}.{SUFFIX}" if path else f"{prefix}{SUFFIX}"
