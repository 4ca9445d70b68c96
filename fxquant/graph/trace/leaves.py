"""What the table takes a module for: subclasses with an inherited forward, and weights computed at each call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fxquant.graph import edit
from fxquant.graph.trace.names import names_in
from fxquant.operators import Operator, find_module_row

_CALL = {"__call__", "_call_impl", "__getattr__", "__getattribute__"}


def make_plain(root: nn.Module) -> None:
    """Give each module of a mirror the weights that it would compute at each call, as parameters.

    They are what torch.nn.utils.parametrize (and all that is made with it), the older weight_norm and spectral_norm,
    and pruning give in eval mode; a parametrized module becomes one of the class that it was.
    """
    with torch.no_grad():
        for module in root.modules():
            computed: dict[str, torch.Tensor] = {}
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, edit.RECOMPUTING):
                    hook(module, ())
                    del module._forward_pre_hooks[key]
                    name = str(getattr(hook, "name", None) or getattr(hook, "_tensor_name", None))
                    computed[name] = vars(module).pop(name)
                    for suffix in edit.RECOMPUTED_FROM:
                        module._parameters.pop(name + suffix, None)
                        module._buffers.pop(name + suffix, None)
            if "parametrizations" in module._modules and parametrize.is_parametrized(module):
                names = dict(module.get_submodule("parametrizations").named_children())
                computed.update({name: getattr(module, name) for name in names})
                module.__class__ = type(module).__bases__[0]
                del module._modules["parametrizations"]
            for name, tensor in computed.items():
                setattr(module, name, nn.Parameter(tensor.detach(), requires_grad=False))
            for hooks in (module._load_state_dict_pre_hooks, module._state_dict_hooks) if computed else ():
                for key in [key for key, hook in hooks.items() if _is_of_torchs_utils(hook)]:
                    del hooks[key]  # which reads the tensors that are gone, and may not be pickled


def _is_of_torchs_utils(hook: Any) -> bool:
    """Return whether a hook comes from torch.nn.utils; torch wraps those that are called before loading."""
    own = getattr(hook, "hook", hook)
    return (getattr(own, "__module__", None) or "").startswith("torch.nn.utils.")


def base_of(module: nn.Module, operators: Sequence[Operator]) -> type[nn.Module] | None:
    """Return the type in the table whose forward a module runs: its own, or one that it is a subclass of."""
    base = known_base(type(module), operators)
    return base if base is not None and type(module).forward is base.forward else None


def known_base(kind: type[nn.Module], operators: Sequence[Operator]) -> type[nn.Module] | None:
    """Return the nearest type in the table that a type is or derives from."""
    return next((base for base in kind.__mro__ if find_module_row(operators, base) is not None), None)


def redefined(kind: type[nn.Module], base: type[nn.Module]) -> list[str]:
    """Return the names that a subclass redefines of those that its base's call and forward, or their helpers, use."""
    if kind is base:
        return []
    between = [part for part in kind.__mro__[: kind.__mro__.index(base)] if part is not base]
    waiting, used = ["forward"], set(_CALL)
    while waiting:
        found = names_in(inspect.getattr_static(base, waiting.pop(), None)) - used
        used |= found
        waiting += found
    return sorted(used & {name for part in between for name in vars(part)})
