"""Which modules the table knows: subclasses with an inherited forward too; which functions are not traced through; and
weights computed at each call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, rnn

from fxquant.graph import edit
from fxquant.graph.trace.names import names_in
from fxquant.operators import Operator, find_module_operator
from fxquant.ops.register import PUBLIC

LEAF_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    rnn.pack_padded_sequence,
    rnn.pad_packed_sequence,
    rnn.pack_sequence,
    rnn.unpack_sequence,
    rnn.pad_sequence,
    rnn.unpad_sequence,
    torch.finfo,
    torch.iinfo,
    *PUBLIC,
)
"""Functions that are not traced through: those of torch that look at values, and ours, which a pickle's code calls."""
_CALL = {"__call__", "_call_impl", "__getattr__", "__getattribute__"}


def make_plain(root: nn.Module) -> None:
    """Replace, in a mirror, weights that would be computed at each call by parameters.

    They are computed by torch.nn.utils.parametrize (and all that is built on it), the older weight_norm and
    spectral_norm, and pruning, as in eval mode. A parametrized module gets its former class back.
    """
    with torch.no_grad():
        for module in root.modules():
            computed = {**_computed_by_hooks(module), **_computed_by_parametrizations(module)}
            for name, tensor in computed.items():
                setattr(module, name, nn.Parameter(tensor.detach(), requires_grad=False))
            for hooks in (module._load_state_dict_pre_hooks, module._state_dict_hooks) if computed else ():
                for key in [key for key, hook in hooks.items() if _is_of_torchs_utils(hook)]:
                    del hooks[key]  # it reads the tensors that are gone, and may not be pickled


def _computed_by_hooks(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that hooks compute before each call; remove the hooks, and what they compute them from."""
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
    return computed


def _computed_by_parametrizations(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that are parametrized; remove the parametrizations."""
    if "parametrizations" not in module._modules or not parametrize.is_parametrized(module):
        return {}
    computed = {name: getattr(module, name) for name, _ in module.get_submodule("parametrizations").named_children()}
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    return computed


def _is_of_torchs_utils(hook: Any) -> bool:
    """Return whether a hook comes from torch.nn.utils; torch wraps those that run before loading."""
    return (getattr(getattr(hook, "hook", hook), "__module__", None) or "").startswith("torch.nn.utils.")


def base_of(module: nn.Module, operators: Sequence[Operator]) -> type[nn.Module] | None:
    """Return the type in the table whose forward a module runs: its own type, or a base of it."""
    base = known_base(type(module), operators)
    return base if base is not None and type(module).forward is base.forward else None


def known_base(module_type: type[nn.Module], operators: Sequence[Operator]) -> type[nn.Module] | None:
    """Return the nearest type in the table that a type is or derives from."""
    return next((base for base in module_type.__mro__ if find_module_operator(operators, base, None)), None)


def redefined(module_type: type[nn.Module], base: type[nn.Module]) -> list[str]:
    """Return the names used by a base's call, forward and their helpers that a subclass redefines."""
    between = module_type.__mro__[: module_type.__mro__.index(base)]
    waiting, used = ["forward"] if between else [], set(_CALL)
    while waiting:
        names = names_in(inspect.getattr_static(base, waiting.pop(), None)) - used
        used |= names
        waiting += names
    return sorted(used & {name for part in between for name in vars(part)})
