"""What the quantized modules share: integers under keys of their own, and the float weights that they stand for.

A weight `weight_ih_l0` is kept as the buffers `weight_ih_l0_int8` (or another format's name), `weight_ih_l0_scale`
and, where affine, `weight_ih_l0_zero_point`, which no float model's state_dict fits. The attribute `weight_ih_l0`
is the float weight, a `FloatWeight`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxquant import frames
from fxquant.errors import ModelStateError, ReadOnlyError, warn
from fxquant.formats import FLOAT32
from fxquant.nn.float_weight import FloatWeight
from fxquant.nn.stored import LIKE, Stored, StoredWeights, turn
from fxquant.nn.training import frozen, warn_of_training
from fxquant.numerics import QuantizedTensor, dequantize
from fxquant.qconfig import QConfig

Quantize: TypeAlias = Callable[[torch.Tensor, QConfig], QuantizedTensor]

_SHOWN = WeakTensorKeyDictionary()
"""The float weight in use of each tensor of integers, by a weak reference: tied ones are the same object."""


def quantize_alone(weight: torch.Tensor, qconfig: QConfig) -> QuantizedTensor:
    """Return the weight as the qconfig wants it; `convert_fx` passes a function that keeps tied weights tied."""
    return qconfig.quantize_weight(weight.contiguous())


class QuantizedModule(StoredWeights):
    """A module whose weights are kept as integers. `set_weight` registers them, `own` is the fast way to them.

    Biases stay frozen float parameters. Moving the module to another dtype leaves the integers and scales as they are;
    a table then gives the new dtype, the others follow their input. A state_dict of another kind (a float one, say)
    does not fit: its keys are reported as missing and unexpected; one that holds integers under the float weights'
    names, as fxquant wrote it before 0.1.0, is read.
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
        groups: int = 1,
    ) -> str:
        """Register a quantized weight as buffers and return the key of its values.

        like: the float weight, whose shape and dtype `module.<name>` has; by default float32 in the values' shape.
        turned, groups: two dimensions of it that are swapped in the quantized one, in so many groups (`turn`).
        """
        weight_format, shape = (
            weight.format,
            (*weight.values.shape[:-1], weight.columns) if like is None else tuple(like.shape),
        )
        key = name + weight_format.suffix
        for buffer, tensor in zip((key, f"{name}_scale", f"{name}_zero_point"), weight.tensors, strict=True):
            self.register_buffer(buffer, tensor)
        if weight_format is not FLOAT32:
            self._stored[name] = Stored(key, weight_format, weight.columns, weight.group_size, shape, turned, groups)
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
        """Raise ModelStateError: quantized weights cannot be initialized again."""
        raise ModelStateError(
            f"the weights of a quantized {type(self).__name__} cannot be reset; initialize the float model and "
            "quantize that"
        )

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
            real = turn(real, stored.turned, stored.groups) if stored.turned else real
            real = real.to(self._parameters[LIKE].dtype)  # type: ignore[union-attr]
        if isinstance(rows, torch.Tensor):
            return real.view(*rows.shape, *real.shape[1:])
        return real[0] if isinstance(rows, int) else real

    def float_weights(self) -> list[torch.Tensor]:
        """Return what the module shows as its float weights, without reading their values."""
        return [getattr(self, name) for name in self._stored]

    def _read(self, name: str, rows: Any) -> torch.Tensor:
        """Return a float weight's values for code outside of this module; warn once for each place that reads them."""
        place = frames.caller() or "a library"
        if (reading := f"{name} is read by {place}") not in self.readers:
            path, by = _paths(self)
            owner = f"a quantized {type(self).__name__} {self._stored[name].shape}{path and f' at {path!r}'}"
            reader = f"{by and f'{by!r}, '}{place}"
            self.readers[reading] = f"{name} is read by {reader}"
            warn(
                f"the {name} of {owner} is read by {reader}. Its values are dequantized anew at each read, which takes "
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
            description = f"the {name} of a quantized {type(self).__name__}"
            read = functools.partial(self._read, name)
            weight = FloatWeight(read, description, stored.shape, like.dtype, values.device, not stored.turned)
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
                f"{name} cannot be {param._name}, which is not a parameter and cannot be pruned or reparametrized. "
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


def _paths(module: nn.Module) -> tuple[str, str]:
    """Return the path of a module whose weight is read now, and of the user's module that reads it; "" if not known.

    Both are paths in the outermost module that is running and has the module in it.
    """
    result, reader = ("", ""), None
    for receiver, is_users in frames.receivers():
        if isinstance(receiver, nn.Module) and receiver is not module:
            reader = receiver if reader is None and is_users else reader
            paths = {id(part): path for path, part in receiver.named_modules()}
            if id(module) in paths:
                result = paths[id(module)], paths.get(id(reader), "")
    return result


def refuse_script() -> nn.Module:
    """Raise ModelStateError where torch.jit.script takes a quantized model."""
    raise ModelStateError(
        "a quantized model cannot become TorchScript, which torch deprecates; use "
        "torch.export.export(quantized, inputs) or torch.compile(quantized)"
    )
