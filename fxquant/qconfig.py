"""QConfig: how the activations and the weights of one operator become integers; and the presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fxquant.errors import QConfigError, warn
from fxquant.formats import INT16_MAX, Activation
from fxquant.numerics import QuantizedTensor, to_floats
from fxquant.observers import (
    GroupMinMaxObserver,
    LeastErrorObserver,
    MinMaxObserver,
    Observer,
    PerChannelMinMaxObserver,
)
from fxquant.ranges import Learned, LeastError, MovingAverage
from fxquant.spec import TensorSpec

_DEFAULTS: dict[str, type[Observer]] = {
    "tensor": MinMaxObserver,
    "channel": PerChannelMinMaxObserver,
    "group": GroupMinMaxObserver,
}


@dataclass(frozen=True)
class QConfig:
    """How an operator is quantized.

    activation: how its input becomes integers at each call; None: it stays float (weight-only). weight: how its weights
    do, once. weight_observer: the Observer class that finds a weight's range; None: the min-max observer of the
    weight's axis. parts: the operator's weights that have a qconfig of their own, by name, or None to stay float32. A
    mapping's entries for weights ("lstm.weight_ih_l0") make them; a mapping accepts no qconfig that has them already.
    gptq: whether int8 weights are rounded with GPTQ where data is given, as 4- and 3-bit ones are: `with_gptq`.

    An operator without activations (an embedding) uses only the weight's half.
    """

    activation: TensorSpec | None
    weight: TensorSpec
    weight_observer: type[Observer] | None = None
    parts: tuple[tuple[str, QConfig | None], ...] = ()
    gptq: bool = False

    def __post_init__(self) -> None:
        for name, spec in (("activation", self.activation), ("weight", self.weight)):
            if not isinstance(spec, TensorSpec) and not (name == "activation" and spec is None):
                called = getattr(spec, "name", None) or getattr(spec, "__name__", "…")
                hint = f"; write {called}.with_args()" if hasattr(spec, "with_args") else ""
                raise QConfigError(f"QConfig.{name} must be a TensorSpec, got {type(spec).__name__}{hint}")
        if self.weight.dynamic or self.weight.axis == "token":
            raise QConfigError(f"QConfig.weight is quantized once, per tensor or per channel; got '{self.weight}'")
        if isinstance(self.weight.range, Learned) and not (self.weight.symmetric and self.weight.is_integer):
            raise QConfigError(f"QConfig.weight learns the step of symmetric integers, got '{self.weight}'")
        if self.weight.range is not None and not isinstance(self.weight.range, Learned):
            raise QConfigError(
                f"QConfig.weight has the range of an activation, {self.weight.range}; a weight of torch.ao's has "
                "dtype=torch.int8"
            )
        if self.activation is not None and self.is_static and self.activation.dtype == "int8":
            raise QConfigError(
                f"QConfig.activation is calibrated as uint8, got '{self.activation}'; leave dtype out, or write "
                "torch.uint8: the zero point covers values below 0"
            )
        if self.activation is not None and self.activation.axis in ("channel", "group"):
            raise QConfigError(f"QConfig.activation has one scale a token or one a tensor; got '{self.activation}'")
        if self.gptq and not (self.weight.symmetric and self.weight.axis in ("channel", "group")):
            raise QConfigError(f"GPTQ rounds symmetric weights per channel or per group, not '{self.weight}'")
        self.make_observer()

    @property
    def is_static(self) -> bool:
        """Whether activations would need calibration."""
        return self.activation is not None and self.activation.is_integer and not self.activation.dynamic

    @property
    def is_learned(self) -> bool:
        """Whether training learns a step size of it."""
        specs = (self.weight, self.activation)
        return any(spec is not None and isinstance(spec.range, Learned) for spec in specs)

    @property
    def as_dynamic(self) -> QConfig:
        """What an operator without a static form gets: activations are quantized as it runs, one scale a token."""
        if not self.is_static or self.activation is None:
            return self
        activation = dataclasses.replace(self.activation, axis="token", dynamic=True, range=None)
        return dataclasses.replace(self, activation=activation)

    @property
    def has_qmax(self) -> bool:
        """Whether activations become integers of a range that can be chosen."""
        return self.activation is not None and self.activation.dtype == Activation.UINT8.value

    @property
    def per_token(self) -> bool:
        """Whether activations have one scale a token (else one a tensor)."""
        return self.activation is None or self.activation.axis == "token"

    @property
    def per_row(self) -> bool:
        """The old name of `per_token`."""
        warn("QConfig.per_row is now .per_token", category=DeprecationWarning)
        return self.per_token

    @property
    def qmax(self) -> int:
        """The greatest activation integer: 255, 127 with a reduced range, 32767 of int16."""
        return 255 if self.activation is None or not self.activation.is_integer else self.activation.qmax

    def layout(self, columns: int) -> tuple[str, int, int]:
        """Return the arguments format, group_size and in_features of the operator linear for a weight of so many
        columns.
        """
        size = self.weight.group_size or 0
        return self.weight.dtype, size, columns if size else 0

    def of(self, name: str) -> QConfig | None:
        """Return what one of the operator's weights gets; None: it stays float32."""
        return dict(self.parts).get(name, self.whole)

    @property
    def whole(self) -> QConfig:
        """What the weights get that have no qconfig of their own."""
        return dataclasses.replace(self, parts=()) if self.parts else self

    def make_observer(self) -> Observer | None:
        """Return a fresh observer for one weight, None for a format of floats."""
        if not self.weight.is_integer:
            return None
        return (self.weight_observer or _DEFAULTS[self.weight.axis])(self.weight)

    def quantize_weight(self, weight: torch.Tensor) -> QuantizedTensor:
        """Return a weight as this qconfig wants it; on the meta device, meta tensors of the right shapes."""
        observer = self.make_observer()
        return to_floats(weight, self.weight.format) if observer is None else observer.quantize(weight)

    def with_reduce_range(self) -> QConfig:
        """Return the same with 7-bit activations, 0–127, as torch.ao's `reduce_range=True`."""
        if self.activation is None or not self.has_qmax:
            raise QConfigError(f"reduce_range needs uint8 activations, this qconfig has {self.activation}")
        return dataclasses.replace(self, activation=dataclasses.replace(self.activation, qmax=127))

    def with_gptq(self) -> QConfig:
        """Return the same, whose weights are rounded with GPTQ where convert_fx is given data. QConfigError for weights
        that are not symmetric, one scale an output channel or group. docs/numerics.md, "GPTQ error".
        """
        return dataclasses.replace(self, gptq=True)

    def with_group_size(self, group_size: int) -> QConfig:
        """Return the same with groups of 32, 64 or 128 columns; QConfigError for weights that have no groups."""
        return dataclasses.replace(self, weight=dataclasses.replace(self.weight, group_size=group_size))

    def __str__(self) -> str:
        return self.tell(lambda part: f"{part.weight}" + (f", activation {part.activation}" if part.activation else ""))

    def tell(self, name: Callable[[QConfig], str]) -> str:
        """Return it as text. name: gives the text of a qconfig without parts."""
        weights: dict[QConfig | None, list[str]] = {}
        for weight, qconfig in self.parts:
            weights.setdefault(qconfig, []).append(weight)
        parts = [f"{', '.join(names)} {name(part) if part else 'float32'}" for part, names in weights.items()]
        return "; ".join((name(self.whole), *parts))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; the observer by its name."""
        observer = self.weight_observer
        return {
            "activation": None if self.activation is None else self.activation.to_dict(),
            "weight": self.weight.to_dict(),
            "weight_observer": None if observer is None else observer.__name__,
            "parts": [[name, part and part.to_dict()] for name, part in self.parts],
            **({"gptq": True} if self.gptq else {}),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> QConfig:
        """Return the qconfig that `to_dict` described. A custom observer is not restored: the weights exist already."""
        known = {observer.__name__: observer for observer in (*_DEFAULTS.values(), LeastErrorObserver)}
        activation = fields["activation"]
        return cls(
            None if activation is None else TensorSpec.from_dict(activation),
            TensorSpec.from_dict(fields["weight"]),
            known.get(fields["weight_observer"]),
            tuple((name, part and cls.from_dict(part)) for name, part in fields.get("parts", ())),
            bool(fields.get("gptq", False)),
        )


_TOKENS = TensorSpec(dtype="uint8", qmin=0, qmax=255, axis="token", dynamic=True)
_WHOLE = TensorSpec(dtype="uint8", qmin=0, qmax=255, axis="tensor", dynamic=True)
_CHANNELS = TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis="channel")

default_dynamic_qconfig = QConfig(activation=_TOKENS, weight=_CHANNELS)
"""uint8 affine activations, one scale a token, 8 bits; int8 symmetric weights, one scale an output channel."""

per_tensor_dynamic_qconfig = QConfig(
    activation=_WHOLE,
    weight=TensorSpec(dtype="int8", qmin=-128, qmax=127, symmetric=True, axis="tensor", scale_steps=127.5),
)
"""torch.ao's default_dynamic_qconfig: one scale a tensor; `.with_reduce_range()` for its 7-bit activations."""

per_channel_dynamic_qconfig = QConfig(
    activation=_WHOLE,
    weight=TensorSpec(dtype="int8", qmin=-128, qmax=127, symmetric=True, axis="channel", scale_steps=127.5),
)
"""torch.ao's per_channel_dynamic_qconfig: one activation scale a tensor, one weight scale an output channel."""

default_static_qconfig = QConfig(
    activation=TensorSpec(dtype="uint8", qmin=0, qmax=255, axis="tensor", range=LeastError()), weight=_CHANNELS
)
"""Calibrated: uint8 affine activations, one scale a value, its range of the least error; int8 weights per channel."""

default_qconfig = default_static_qconfig
"""torch.ao's name of it."""

default_qat_qconfig = QConfig(
    activation=TensorSpec(dtype="uint8", qmin=0, qmax=255, axis="tensor", range=MovingAverage()), weight=_CHANNELS
)
"""For training: default_static_qconfig with ranges that follow the batches, MovingAverage(0.01)."""

int4_dynamic_qconfig = QConfig(
    activation=_TOKENS,
    weight=TensorSpec(dtype="int4", qmin=-8, qmax=7, symmetric=True, axis="group", group_size=64),
)
"""uint8 affine activations, one scale a token; int4 weights, one scale 64 columns of an output channel, or
`.with_group_size(32)`."""

int3_dynamic_qconfig = QConfig(
    activation=_TOKENS,
    weight=TensorSpec(dtype="int3", qmin=-4, qmax=3, symmetric=True, axis="group", group_size=64),
)
"""int4_dynamic_qconfig, but int3 weights: a quarter smaller, twice as coarse, for what tolerates it, with GPTQ."""

int16_dynamic_qconfig = QConfig(
    activation=TensorSpec(dtype="int16", qmin=-INT16_MAX, qmax=INT16_MAX, symmetric=True, axis="token", dynamic=True),
    weight=TensorSpec(dtype="int16", qmin=-INT16_MAX, qmax=INT16_MAX, symmetric=True, axis="channel"),
)
"""int16 symmetric activations, one scale a token; int16 symmetric weights, one scale an output channel: where int8 is
too coarse. Half of float's memory, and as exact and as independent of other tokens as int8."""

float16_dynamic_qconfig = QConfig(activation=None, weight=TensorSpec(dtype="float16"))
"""float16 weights, computed in float32: half the memory, nearly no error."""

float_qparams_weight_only_qconfig = QConfig(
    activation=None, weight=TensorSpec(dtype="uint8", qmin=0, qmax=255, axis="channel")
)
"""Embeddings: uint8 rows, affine with a real-valued zero point, as torch.ao's preset of this name."""

float_qparams_weight_only_qconfig_4bit = QConfig(
    activation=None, weight=TensorSpec(dtype="uint4", qmin=0, qmax=15, axis="channel")
)
"""Embeddings: 4-bit affine rows, two values a byte, as torch.ao's preset of this name."""

uint4_weight_only_qconfig = QConfig(
    activation=None,
    weight=float_qparams_weight_only_qconfig_4bit.weight,
    weight_observer=LeastErrorObserver,
)
"""Embeddings: the same, but each row's range clipped to where its squared error is least, a fifth less."""

BEST = {
    qconfig.weight.dtype: qconfig
    for qconfig in (
        default_dynamic_qconfig,
        int4_dynamic_qconfig,
        int3_dynamic_qconfig,
        int16_dynamic_qconfig,
        float16_dynamic_qconfig,
        float_qparams_weight_only_qconfig,
        uint4_weight_only_qconfig,
    )
}
"""The preset that makes the most of each format, by its name."""

PRESETS = {
    "default_static_qconfig": default_static_qconfig,
    "default_qat_qconfig": default_qat_qconfig,
    "default_dynamic_qconfig": default_dynamic_qconfig,
    "per_tensor_dynamic_qconfig": per_tensor_dynamic_qconfig,
    "per_channel_dynamic_qconfig": per_channel_dynamic_qconfig,
    "int4_dynamic_qconfig": int4_dynamic_qconfig,
    "int3_dynamic_qconfig": int3_dynamic_qconfig,
    "int16_dynamic_qconfig": int16_dynamic_qconfig,
    "float16_dynamic_qconfig": float16_dynamic_qconfig,
    "float_qparams_weight_only_qconfig": float_qparams_weight_only_qconfig,
    "float_qparams_weight_only_qconfig_4bit": float_qparams_weight_only_qconfig_4bit,
    "uint4_weight_only_qconfig": uint4_weight_only_qconfig,
}
