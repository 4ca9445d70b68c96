"""How the weights of a quantized module are kept: their integers keep their dtype through moves, saving and loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxquant.formats import Format
from fxquant.nn.training import frozen

LIKE = "weight_like"
"""An empty parameter of the float weights' dtype and device, for next(module.parameters()); in no state_dict.

It stays frozen: `FrozenParameter`."""


@dataclass(frozen=True)
class Stored:
    """How a float weight is kept: under a key, in a format.

    columns, group_size: as QuantizedTensor has them. shape: of the float weight; turned: the two dimensions that are
    swapped in the kept one, groups: in so many parts (`turn`).
    """

    key: str
    format: Format
    columns: int
    group_size: int
    shape: tuple[int, ...]
    turned: tuple[int, int] | None = None
    groups: int = 1

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The shape of the kept weight, before it is packed and a convolution's is made a matrix."""
        shape = list(self.shape)
        if self.turned:
            first, second = self.turned
            shape[first], shape[second] = shape[second] * self.groups, shape[first] // self.groups
        return tuple(shape)


def turn(weight: torch.Tensor, turned: tuple[int, int], groups: int = 1) -> torch.Tensor:
    """Return a weight with two dimensions swapped; done twice it is the weight again.

    groups: of a transposed convolution, whose weight (I, O / groups, ...) becomes (O, I / groups, ...), group by group.
    """
    if groups == 1:
        return weight.transpose(*turned)
    assert turned == (0, 1), turned
    parts: torch.Tensor = weight.unflatten(0, (groups, weight.shape[0] // groups))  # type: ignore[no-untyped-call]
    return parts.transpose(1, 2).flatten(0, 1)


def turned_weight(weight: torch.Tensor, turned: tuple[int, int], groups: int = 1) -> torch.Tensor:
    """Return `turn` of a weight, by which a cache of quantized weights knows it again: `turned_from`."""
    result = turn(weight, turned, groups)
    if groups > 1:  # a copy; without groups it is a view, which has the weight's memory
        result.turned_from = weight  # type: ignore[attr-defined]
    return result


def identity(weight: torch.Tensor) -> tuple[Any, ...]:
    """Return what tells a weight from all others that exist: its memory and its shape."""
    shape, weight = weight.shape, getattr(weight, "turned_from", weight)
    place = weight.untyped_storage().data_ptr() or weight.untyped_storage()._cdata  # on the meta device
    return place, weight.storage_offset(), shape, weight.stride()


class StoredWeights(nn.Module):
    """A module whose weights are buffers of integers and scales. `own` is the fast way to them."""

    _stored: dict[str, Stored]

    def own(self, names: Sequence[str]) -> list[Any]:
        """Return the module's buffers and parameters by name, without nn.Module's slow lookup."""
        buffers, parameters = self._buffers, self._parameters
        try:
            return [buffers[name] if name in buffers else parameters[name] for name in names]
        except KeyError:  # pruned or parametrized: a bias is computed from others then
            return [getattr(self, name) for name in names]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StoredWeights:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        self._freeze()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._freeze()

    def _freeze(self) -> None:
        """Freeze the parameter again after a move, a copy or a pickle, from which torch makes plain ones."""
        like = self._parameters.get(LIKE)
        if like is not None and type(like) is nn.Parameter:
            self._parameters[LIKE] = frozen(like)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}{LIKE}", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.take_old_keys(state_dict, prefix)
        buffers = {prefix + name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        errors: list[str] = args[-1]
        mismatched = dtype_errors(buffers, state_dict)
        errors.extend(mismatched)
        like = self._parameters.pop(LIKE, None)
        try:
            if not mismatched:  # else copying would cast before the error is raised
                super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            if like is not None:
                devices = [buffer.device for buffer in self._buffers.values() if buffer is not None]
                self._parameters[LIKE] = frozen(torch.empty(0, dtype=like.dtype, device=devices[0]))

    def float_keys(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """Return a line for each float weight in a state_dict that lacks this module's integers."""
        return [
            f"{prefix}{name} is a weight that is not quantized, or quantized differently: here it is {stored.key}. "
            "Load it into the float model and quantize that"
            for name, stored in self._stored.items()
            if prefix + name in state_dict and prefix + stored.key not in state_dict
        ]

    def take_old_keys(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename in place what a state_dict holds of this module under the keys that fxquant wrote before 0.1.0."""
        for name, stored in self._stored.items():
            old, key = state_dict.get(prefix + name), prefix + stored.key
            values, scale = self.own((stored.key, f"{name}_scale"))
            has_scale = scale is None or f"{prefix}{name}_scale" in state_dict
            if key in state_dict or not isinstance(old, torch.Tensor) or not has_scale:
                continue
            if (old.dtype, old.shape) == (values.dtype, values.shape):
                state_dict[key] = state_dict.pop(prefix + name)


def moved_dtype(move: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a move (nn.Module._apply's function: .half(), .to(dtype), .cuda(), …) gives tensors of a
    dtype.
    """
    return move(torch.zeros(1, dtype=dtype)).dtype


def dtype_errors(expected: Mapping[str, Any], incoming: Mapping[str, Any]) -> list[str]:
    """Return a line for each incoming tensor whose values would be cast to another kind of number."""
    return [
        f"{name} holds {tensor.dtype}, the state_dict has {incoming[name].dtype}: it belongs to a model that was "
        "quantized differently, or not at all"
        for name, tensor in expected.items()
        if isinstance(incoming.get(name), torch.Tensor)
        and isinstance(tensor, torch.Tensor)
        and incoming[name].dtype != tensor.dtype
        and not (incoming[name].is_floating_point() and tensor.dtype == torch.float32)
    ]
