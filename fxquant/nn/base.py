"""What the quantized modules share: plain buffers that keep their dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from fxquant.errors import ModelStateError
from fxquant.numerics import QuantizedTensor
from fxquant.qconfig import QConfig

Quantize: TypeAlias = Callable[[torch.Tensor, QConfig], QuantizedTensor]


def quantize_alone(weight: torch.Tensor, qconfig: QConfig) -> QuantizedTensor:
    """Return the weight as the qconfig wants it; `convert_fx` passes a function that keeps tied weights tied."""
    return qconfig.quantize_weight(weight.contiguous())


class QuantizedModule(nn.Module):
    """A module whose weights are plain buffers: `name`, `name_scale` and, where affine, `name_zero_point`.

    Biases stay frozen float parameters. Moving the module to another dtype leaves the weights and scales as they are,
    and its outputs follow: a table's rows, the others through their input. Loading a state_dict of another kind (a
    float one, say) is an error and never a silent cast.
    """

    def __init__(self, qconfig: QConfig) -> None:
        nn.Module.__init__(self)  # not the next in line, which may be the float type that it stands for
        self.qconfig = qconfig
        self.training = False

    def set_weight(self, name: str, weight: QuantizedTensor) -> None:
        """Register a quantized weight and what it takes to read it as buffers."""
        self.register_buffer(name, weight.values)
        self.register_buffer(f"{name}_scale", weight.scale)
        self.register_buffer(f"{name}_zero_point", weight.zero_point)

    def set_bias(self, name: str, bias: torch.Tensor | None) -> None:
        """Register a bias, copied, as a frozen parameter."""
        self.register_parameter(name, None if bias is None else nn.Parameter(bias.detach().clone(), False))

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise ModelStateError: torch.jit.script asks for this."""
        return refuse_script()

    def own(self, names: Sequence[str]) -> list[Any]:
        """Return own buffers and parameters by name, past nn.Module's slow lookup."""
        buffers, parameters = self._buffers, self._parameters
        return [buffers[name] if name in buffers else parameters[name] for name in names]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModule:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {prefix + name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        mismatched = dtype_errors(own, state_dict)
        errors: list[str] = args[-1]
        errors.extend(mismatched)
        if not mismatched:  # else copying would cast before the error is raised
            super()._load_from_state_dict(state_dict, prefix, *args)


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
