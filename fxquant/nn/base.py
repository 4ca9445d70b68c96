"""What the quantized modules share: integers under keys of their own, and the float weights that they stand for.

A weight `weight_ih_l0` is kept as the buffers `weight_ih_l0_int8` (or another format's name), `weight_ih_l0_scale`
and, where affine, `weight_ih_l0_zero_point`, which no float model's state_dict fits. The attribute `weight_ih_l0`
is the float weight, a `FloatWeight`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxquant import frames
from fxquant.errors import ModelStateError, ReadOnlyError, warn
from fxquant.formats import FLOAT32, Format
from fxquant.nn.float_weight import FloatWeight
from fxquant.nn.training import frozen, warn_of_training
from fxquant.numerics import QuantizedTensor, dequantize
from fxquant.qconfig import QConfig

Quantize: TypeAlias = Callable[[torch.Tensor, QConfig], QuantizedTensor]

LIKE = "weight_like"
"""An empty parameter of the float weights' dtype and device, for next(module.parameters()); in no state_dict.

It stays frozen: `FrozenParameter`."""

_SHOWN = WeakTensorKeyDictionary()
"""The float weight in use of each tensor of integers, by a weak reference: tied ones are the same object."""


def quantize_alone(weight: torch.Tensor, qconfig: QConfig) -> QuantizedTensor:
    """Return the weight as the qconfig wants it; `convert_fx` passes a function that keeps tied weights tied."""
    return qconfig.quantize_weight(weight.contiguous())


@dataclass(frozen=True)
class Stored:
    """How a float weight is kept: under a key, in a format.

    columns, group_size: as QuantizedTensor has them. shape: of the float weight; turned: the dimensions that the kept
    one has the other way.
    """

    key: str
    format: Format
    columns: int
    group_size: int
    shape: tuple[int, ...]
    turned: tuple[int, int] | None = None

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The shape of the kept weight, before it is packed and a convolution's is made a matrix."""
        shape = list(self.shape)
        if self.turned:
            first, second = self.turned
            shape[first], shape[second] = shape[second], shape[first]
        return tuple(shape)


class QuantizedModule(nn.Module):
    """A module whose weights are kept as integers. `set_weight` registers them, `own` is the fast way to them.

    Biases stay frozen float parameters. Moving the module to another dtype leaves the integers and scales as they are,
    and its outputs follow: a table's rows, the others through their input.
    A state_dict of another kind (a float one, say) does not fit: its keys are reported as missing and unexpected; one
    that holds integers under the float weights' names, as fxquant wrote it before 0.1.0, is read.
    """

    def __init__(self, qconfig: QConfig) -> None:
        nn.Module.__init__(self)  # not the next in line, which may be the float type that it stands for
        self._stored: dict[str, Stored] = {}
        self.readers: dict[str, str] = {}
        self.qconfig = qconfig
        self.training = False

    def set_weight(
        self,
        name: str,
        weight: QuantizedTensor,
        like: torch.Tensor | None = None,
        turned: tuple[int, int] | None = None,
    ) -> str:
        """Register a quantized weight as buffers and return the key of its values.

        like: the float weight, whose shape and dtype `module.<name>` has; by default float32 in the values' shape.
        turned: two dimensions of it that are swapped in the quantized one.
        """
        row, shape = weight.format, (*weight.values.shape[:-1], weight.columns) if like is None else tuple(like.shape)
        key = name + row.suffix
        for own, tensor in zip((key, f"{name}_scale", f"{name}_zero_point"), weight.tensors, strict=True):
            self.register_buffer(own, tensor)
        if row is not FLOAT32:
            self._stored[name] = Stored(key, row, weight.columns, weight.group_size, shape, turned)
        dtype = torch.float32 if like is None else like.dtype
        empty = torch.empty(0, dtype=dtype, device=weight.values.device)
        self.register_parameter(LIKE, frozen(empty))
        return key

    def set_bias(self, name: str, bias: torch.Tensor | None) -> None:
        """Register a bias, copied, as a frozen parameter."""
        self.register_parameter(name, None if bias is None else nn.Parameter(bias.detach().clone(), False))

    def train(self, mode: bool = True) -> QuantizedModule:
        """Set the mode as nn.Module does; warn where a quantized model that cannot train is put into training mode."""
        super().train(mode)
        if mode:
            warn_of_training(self, QuantizedModule)
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise ModelStateError: torch.jit.script asks for this."""
        return refuse_script()

    def reset_parameters(self) -> None:
        """Raise ModelStateError: integers are not drawn anew."""
        raise ModelStateError(
            f"the weights of a quantized {type(self).__name__} cannot be reset; initialize the float model and "
            "quantize that"
        )

    def own(self, names: Sequence[str]) -> list[Any]:
        """Return own buffers and parameters by name, past nn.Module's slow lookup."""
        buffers, parameters = self._buffers, self._parameters
        try:
            return [buffers[name] if name in buffers else parameters[name] for name in names]
        except KeyError:  # pruned or parametrized: a bias is computed from others then
            return [getattr(self, name) for name in names]

    # The float weights

    def dequantize(self, name: str, rows: Any = None) -> torch.Tensor:
        """Return a float weight's values, anew. rows: an int, slice or tensor of indices of dimension 0; None: all."""
        stored = self._stored[name]
        shape = stored.kept_shape
        parts: Any = self.own((stored.key, f"{name}_scale", f"{name}_zero_point"))
        if rows is not None:
            at = slice(rows, rows + 1 or None) if isinstance(rows, int) else rows
            at = at.flatten() if isinstance(at, torch.Tensor) else at
            parts = [part if part is None else part[at] for part in parts]
            shape = (-1, *shape[1:])
        with torch.no_grad():
            values, scale, zero_point = parts
            kept = QuantizedTensor(stored.format, values, scale, zero_point, stored.columns, stored.group_size)
            real = dequantize(kept).reshape(shape)
            real = real.transpose(*stored.turned) if stored.turned else real
            real = real.to(self._parameters[LIKE].dtype)  # type: ignore[union-attr]
        if isinstance(rows, torch.Tensor):
            return real.view(*rows.shape, *real.shape[1:])
        return real[0] if isinstance(rows, int) else real

    def float_weights(self) -> list[torch.Tensor]:
        """Return what the module shows as its float weights: tensors whose values nobody has read by that."""
        return [getattr(self, name) for name in self._stored]

    def _read(self, name: str, rows: Any) -> torch.Tensor:
        """Return a float weight's values for code outside of this module; warn once of each place that asks."""
        place = frames.caller() or "a library"
        if (told := f"{name} is read by {place}") not in self.readers:
            path, by = _paths(self)
            kind = f"a quantized {type(self).__name__} {self._stored[name].shape}{path and f' at {path!r}'}"
            reader = f"{by and f'{by!r}, '}{place}"
            self.readers[told] = f"{name} is read by {reader}"
            warn(
                f"the {name} of {kind} is read by {reader}. Its values are dequantized anew at each read, which takes "
                "longer than calling the layer. If that runs often, leave the layer float (QConfigMapping."
                f"set_module_name({repr(path) if path else 'its path'}, None)), or keep a copy of your own: "
                f".{name}.clone(). fxquant.explain lists such readers",
                past=("fxquant", "torch"),
            )
        with torch.inference_mode(False):
            return self.dequantize(name, rows)

    def __getattr__(self, name: str) -> Any:
        stored = self.__dict__.get("_stored", {}).get(name)
        if stored is None:
            return super().__getattr__(name)
        if torch.compiler.is_compiling():
            return self.dequantize(name)
        values, like = self._buffers[stored.key], self._parameters[LIKE]
        assert values is not None
        assert like is not None
        known = _SHOWN.get(values)  # type: ignore[no-untyped-call]
        weight = None if known is None else known()
        if weight is None or (weight.shape, weight.dtype) != (stored.shape, like.dtype):
            told = f"the {name} of a quantized {type(self).__name__}"
            read = functools.partial(self._read, name)
            weight = FloatWeight(read, told, stored.shape, like.dtype, values.device, not stored.turned)
            _SHOWN[values] = weakref.ref(weight)
        return weight

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse(name)
        for weight, stored in self._stored.items():  # parametrizations delete what they replace
            if name in (stored.key, f"{weight}_scale", f"{weight}_zero_point"):
                raise ReadOnlyError(
                    f"{name} is a part of the {weight} of a quantized {type(self).__name__} and cannot be deleted or "
                    "reparametrized; do that to the float model and quantize it again"
                )
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter as nn.Module does; ReadOnlyError for the name of a quantized weight, or for one."""
        self._refuse(name)
        if isinstance(param, FloatWeight):  # torch.nn.utils.prune registers the weight as weight_orig
            raise ReadOnlyError(
                f"{name} cannot be {param._name}, which is no parameter and cannot be pruned or reparametrized. "
                "Do that to the float model and quantize it again; a float copy is nn.Parameter(weight)"
            )
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        """Register a buffer as nn.Module does; ReadOnlyError for the name of a quantized weight."""
        self._refuse(name)
        super().register_buffer(name, tensor, persistent)

    def _refuse(self, name: str) -> None:
        """Raise ReadOnlyError for the name of a float weight, which nothing can be assigned to."""
        if name in self.__dict__.get("_stored", {}):
            raise ReadOnlyError(
                f"the {name} of a quantized {type(self).__name__} is dequantized from {self._stored[name].key} and "
                "cannot be set or deleted; change the float model and quantize it again"
            )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._stored})  # type: ignore[no-untyped-call]

    # Moving, saving and loading

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModule:
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
        """Make what a move, a copy or a pickle made of the frozen parameter one again: torch's makes plain ones."""
        like = self._parameters.get(LIKE)
        if like is not None and type(like) is nn.Parameter:
            self._parameters[LIKE] = frozen(like)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}{LIKE}", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.take_old_keys(state_dict, prefix)
        own = {prefix + name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        errors: list[str] = args[-1]
        mismatched = dtype_errors(own, state_dict)
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
        """Return a line for each float weight in a state_dict that has no values for this module's own."""
        return [
            f"{prefix}{name} is a weight that is not quantized, or otherwise: here it is {stored.key}. Load it into "
            "the float model and quantize that"
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


def _paths(module: nn.Module) -> tuple[str, str]:
    """Return the path of a module whose weight is read now, and of the user's module that reads it; "" if not known.

    Both are paths in the outermost module that is running and has the module in it.
    """
    found, reader = ("", ""), None
    for thing, is_users in frames.receivers():
        if isinstance(thing, nn.Module) and thing is not module:
            reader = thing if reader is None and is_users else reader
            paths = {id(part): path for path, part in thing.named_modules()}
            if id(module) in paths:
                found = paths[id(module)], paths.get(id(reader), "")
    return found


def moved_dtype(move: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.dtype:
    """Return what a move (nn.Module._apply's function: .half(), .to(dtype), .cuda(), …) makes of tensors of a dtype."""
    return move(torch.zeros(1, dtype=dtype)).dtype


def refuse_script() -> nn.Module:
    """Raise ModelStateError where torch.jit.script takes a quantized model."""
    raise ModelStateError(
        "a quantized model cannot become TorchScript, which torch deprecates; use "
        "torch.export.export(quantized, inputs) or torch.compile(quantized)"
    )


def dtype_errors(own: Mapping[str, Any], incoming: Mapping[str, Any]) -> list[str]:
    """Return a line for each incoming tensor whose values would be cast to another kind of number."""
    return [
        f"{name} holds {tensor.dtype}, the state_dict has {incoming[name].dtype}: it belongs to a model that was "
        "quantized differently, or not at all"
        for name, tensor in own.items()
        if isinstance(incoming.get(name), torch.Tensor)
        and isinstance(tensor, torch.Tensor)
        and incoming[name].dtype != tensor.dtype
        and not (incoming[name].is_floating_point() and tensor.dtype == torch.float32)
    ]
