"""Python values as JSON and back, for a file without pickle: plain values, containers of them, tensors."""

from __future__ import annotations

import base64
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from fxquant.errors import CheckpointError

_CONTAINERS: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "Size"}
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict"}
_NAMED: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "bytes": base64.b64decode,
    "dtype": lambda name: getattr(torch, name),
    "device": torch.device,
    **{name: kind for kind, name in (_CONTAINERS | _MAPPINGS).items()},
}
"""How types without a JSON form are named there, and what makes them from the value beside the name."""


def encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value as JSON values; its tensors are put into `tensors`, under names that begin with the place.

    Raises CheckpointError, which names the place, for a value of any other type, a subclass too.
    """
    value_type = type(value)
    if value is None or value_type in (bool, int, str) or (value_type is float and math.isfinite(value)):
        return value
    if value_type is torch.Tensor:
        name = f"{place}.{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if value_type is list or value_type in _CONTAINERS:
        parts = [encode(part, place, tensors) for part in value]
        return parts if value_type is list else {_CONTAINERS[value_type]: parts}
    if value_type in _MAPPINGS:
        return {_MAPPINGS[value_type]: [[encode(part, place, tensors) for part in pair] for pair in value.items()]}
    if value_type is float:
        return {"float": str(value)}
    if value_type is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if value_type in (torch.dtype, torch.device):
        return {value_type.__name__: str(value).removeprefix("torch.")}
    raise CheckpointError(
        f"{place!r} holds a {value_type.__module__}.{value_type.__qualname__}, which a file without pickle cannot "
        "hold; let get_extra_state return None, bool, int, float, str, bytes and tensors, in lists, tuples, sets and "
        "dicts"
    )


def decode(coded: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the value that `encode` wrote; its tensors are taken out of `tensors`. LookupError, TypeError, ValueError,
    AttributeError for what it did not write.
    """
    if isinstance(coded, list):
        return [decode(part, tensors) for part in coded]
    if not isinstance(coded, dict):
        return coded
    ((name, held),) = coded.items()
    if name == "tensor":
        return tensors.pop(held)
    return _NAMED[name](decode(held, tensors))
