"""The dynamically quantized LSTM, GRU and RNN."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxquant import ops
from fxquant.errors import ReadOnlyError
from fxquant.formats import FLOAT32
from fxquant.nn.base import Quantize, QuantizedModule, quantize_alone
from fxquant.nn.float_weight import FloatWeight
from fxquant.nn.recurrent_calls import RecurrentCalls, States
from fxquant.nn.stored import LIKE
from fxquant.numerics import to_floats
from fxquant.qconfig import QConfig, default_dynamic_qconfig

_LAYER_OPTIONS: dict[str, Any] = {
    "num_layers": 1,
    "batch_first": False,
    "bidirectional": False,
    "proj_size": 0,
    "dropout": 0.0,
}


def _bias_name(cell: str) -> str:
    return f"bias{cell}" if cell else "gate_bias"  # `bias` of a cell says whether there is one


class DynamicQuantizedRecurrent(RecurrentCalls, QuantizedModule):
    """What LSTM, GRU and RNN share: quantized weights, called as the nn module is; made by `from_float`.

    Input tokens and each step's hidden states are quantized as they come, each with a scale of its own, so that a
    sequence gives the same bits alone, in any batch, and step by step. The buffers are named as torch names the weights
    (weight_ih_l0_int8: (G·H, I), weight_ih_l0_scale: (G·H,) float32, …; weight_ih_l0: the float one); bias_l0 is the
    sum of the two float biases. Only the sum is known, so bias_ih_l0 reads as bias_l0 and bias_hh_l0 as zeros, except
    for a GRU's n gate, whose two biases are kept apart. Both are read-only. Each weight may have a format of its own
    (`QConfig.parts`), which its values' key names; in groups of N columns the scale is (G·H, ceil(I / N)) bfloat16;
    float16 and float32 ones have no scale, float32 ones no other key. Dropout between layers is for training only and
    has no part here.
    """

    def __init__(
        self, module: Any, qconfig: QConfig = default_dynamic_qconfig, quantize: Quantize = quantize_alone
    ) -> None:
        super().__init__(qconfig)
        self.input_size, self.hidden_size, self.bias = module.input_size, module.hidden_size, module.bias
        for name, default in _LAYER_OPTIONS.items():  # a cell has none of them
            setattr(self, name, getattr(module, name, default))
        sides = ("", "_reverse") if self.bidirectional else ("",)
        is_cell = isinstance(module, nn.RNNCellBase)
        self._cells = [""] if is_cell else [f"_l{layer}{side}" for layer in range(self.num_layers) for side in sides]
        matrices = ("ih", "hh", "hr") if self.proj_size else ("ih", "hh")
        names = [f"weight_{matrix}{cell}" for cell in self._cells for matrix in matrices]
        self._weights: list[str] = []  # the keys of their values
        self._formats: list[str] = []
        self._scales = [f"{name}_scale" for name in names]
        self._biases = [_bias_name(cell) for cell in self._cells] if self.bias else []
        for name in names:
            weight, part = getattr(module, name), qconfig.of(name)
            quantized = to_floats(weight, FLOAT32) if part is None else quantize(weight, part)
            self._weights.append(self.set_weight(name, quantized, weight))
            self._formats.append(quantized.format.name)
        parts = [part for part in map(qconfig.of, names) if part is not None]  # which agree: see graph/plan/rules.py
        self._rows = all(part.per_token for part in parts), next((part.qmax for part in parts if part.has_qmax), 255)
        for cell in self._cells if self.bias else ():
            self.join_biases(cell, getattr(module, f"bias_ih{cell}"), getattr(module, f"bias_hh{cell}"))

    # The float module's attributes

    def float_bias(self, name: str) -> torch.Tensor | None:
        """Return `bias_ih_l0` or another of a float module's biases, (G·H,); None for a name that is none of them."""
        side, cell = name[:7], name[7:]
        if side not in ("bias_ih", "bias_hh") or cell not in self._cells:
            return None
        (joined,) = self.own([_bias_name(cell)])
        values = joined.detach() if side == "bias_ih" else torch.zeros_like(joined)
        if side == "bias_hh" and (hidden := self._parameters.get(f"hidden_{_bias_name(cell)}")) is not None:
            values[-len(hidden) :] = hidden.detach()
        return values.to(self._parameters[LIKE].dtype)  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("bias_") or "_cells" not in self.__dict__:
            return super().__getattr__(name)
        if not self.bias:
            return None if name in ("bias_ih", "bias_hh") and self._cells == [""] else super().__getattr__(name)
        values = self.float_bias(name)
        if values is None or torch.compiler.is_compiling():
            return super().__getattr__(name) if values is None else values
        return FloatWeight(lambda _: values, f"the {name} of {self._name()}", values.shape, values.dtype, values.device)

    def _refuse(self, name: str) -> None:
        super()._refuse(name)
        if name.startswith("bias_") and self.__dict__.get("bias") and self.float_bias(name) is not None:
            raise ReadOnlyError(
                f"the {name} of {self._name()} is kept in a sum and cannot be set or deleted; "
                "change the float model and quantize it again"
            )

    @property
    def _all_weights(self) -> list[list[str]]:
        """The names of a float LSTM's, GRU's or RNN's parameters, a list for each layer and direction."""
        if self._cells == [""]:
            raise AttributeError(f"{type(self).__name__} has no _all_weights, nor has a float cell")
        names = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if self.bias else ())]
        names += ["weight_hr"] if self.proj_size else []
        return [[name + cell for name in names] for cell in self._cells]

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @property
    def all_weights(self) -> list[list[torch.Tensor]]:
        """The float weights and biases, a list for each layer and direction, as the float module has it."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @classmethod
    def from_float(
        cls, module: Any, qconfig: QConfig = default_dynamic_qconfig, quantize: Quantize = quantize_alone
    ) -> DynamicQuantizedRecurrent:
        """Return the quantized form of a float module of the same name, which is left as it is."""
        return cls(module, qconfig, quantize)

    def join_biases(self, cell: str, bias_ih: torch.Tensor, bias_hh: torch.Tensor) -> None:
        """Register a cell's biases as its operator wants them."""
        self.set_bias(_bias_name(cell), bias_ih.float() + bias_hh.float())

    def matrices(self, x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the weights and their scales, empty ones for float weights."""
        buffers: dict[str, Any] = self._buffers
        try:  # all of them are buffers: a third of the time that own() takes
            weights, scales = (list(map(buffers.__getitem__, names)) for names in (self._weights, self._scales))
        except KeyError:  # parametrized
            weights, scales = self.own(self._weights), self.own(self._scales)
        return weights, [x.new_empty(0, dtype=torch.float32) if scale is None else scale for scale in scales]

    def extra_repr(self) -> str:
        """Return what print shows: the sizes, the options that differ from the defaults, and the scheme."""
        defaults = {**_LAYER_OPTIONS, "bias": True, "dropout": self.dropout}
        options = [f"{name}={getattr(self, name)}" for name in defaults if getattr(self, name) != defaults[name]]
        return ", ".join([str(self.input_size), str(self.hidden_size), *options, str(self.qconfig)])


class DynamicQuantizedLSTM(DynamicQuantizedRecurrent):
    """An nn.LSTM with quantized weights. docs/numerics.md, "LSTM"."""

    has_cell_state = True
    mode = "LSTM"

    def run(self, x: torch.Tensor, sizes: torch.Tensor | None, states: States) -> States:
        """Return (output, h, c)."""
        h0, c0 = states
        weights, scales = self.matrices(x)
        biases, how = self.own(self._biases), (self.bidirectional, *self._rows, self._formats)
        return ops.lstm(x, sizes, h0, c0, weights, scales, biases, *how)


class DynamicQuantizedRNN(DynamicQuantizedRecurrent):
    """An nn.RNN (tanh or relu) with quantized weights. docs/numerics.md, "RNN output"."""

    def __init__(
        self, module: Any, qconfig: QConfig = default_dynamic_qconfig, quantize: Quantize = quantize_alone
    ) -> None:
        super().__init__(module, qconfig, quantize)
        self.nonlinearity = module.nonlinearity
        self.mode = f"RNN_{module.nonlinearity.upper()}"
        self._hidden_biases: list[str] = []

    def run(self, x: torch.Tensor, sizes: torch.Tensor | None, states: States) -> States:
        """Return (output, h)."""
        weights, scales = self.matrices(x)
        biases, hidden_biases = self.own(self._biases), self.own(self._hidden_biases)
        how = (self.mode.lower(), self.bidirectional, *self._rows, self._formats)
        return ops.rnn(x, sizes, states[0], weights, scales, biases, hidden_biases, *how)


class DynamicQuantizedGRU(DynamicQuantizedRNN):
    """An nn.GRU with quantized weights. hidden_bias_l0: (H,), the n gate's hidden bias, which is not added to the
    other.

    docs/numerics.md, "GRU and RNN".
    """

    promotes = True

    def __init__(
        self, module: Any, qconfig: QConfig = default_dynamic_qconfig, quantize: Quantize = quantize_alone
    ) -> None:
        DynamicQuantizedRecurrent.__init__(self, module, qconfig, quantize)
        self.mode = "GRU"
        self._hidden_biases = [f"hidden_{name}" for name in self._biases]

    def join_biases(self, cell: str, bias_ih: torch.Tensor, bias_hh: torch.Tensor) -> None:
        """Register b_ih + b_hh of the gates r and z with b_in, and b_hn."""
        both = 2 * self.hidden_size
        joined = torch.cat((bias_ih[:both].float() + bias_hh[:both].float(), bias_ih[both:].float()))
        self.set_bias(_bias_name(cell), joined)
        self.set_bias(f"hidden_{_bias_name(cell)}", bias_hh[both:].float())
