"""How one tensor becomes integers, as a frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from fxquant.errors import QConfigError

Axis = Literal["tensor", "channel", "row", "group"]

GROUP_SIZES = (32, 64, 128)
INT16_MAX = 32767  # the end of the range on both sides: -32768 is not used

_DTYPES = {
    "int8": torch.int8,
    "int16": torch.int16,
    "uint8": torch.uint8,
    "uint4": torch.uint8,
    "int4": torch.uint8,
    "float16": torch.float16,
}
_LIMITS = {
    "int8": (-128, 127),
    "int16": (-INT16_MAX, INT16_MAX),
    "uint8": (0, 255),
    "uint4": (0, 15),
    "int4": (-8, 7),
    "float16": (0, 0),
}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """How one tensor becomes integers: x ≈ (q - zero_point) * scale with q in [qmin, qmax].

    dtype: "int8", "int16", "uint8", "uint4", "int4" (two values a byte) or "float16" (no integers: stored in half
        precision). "int16" is symmetric over all of its range, ±32767.
    symmetric: zero_point is 0, the range is that of the largest magnitude.
    axis: where scales are shared: "tensor" (one), "channel" (one an index of dimension 0 of a weight), "row"
        (one a last-dimension row of an activation: a token, a time step), "group" (one a `group_size` columns of each
        row of a weight: the way of int4).
    dynamic: measured at each call (activations) instead of once (weights).
    scale_steps: how many steps the measured range is divided into; None means qmax - qmin for an affine spec and qmax
        for a symmetric one.
    group_size: 32, 64 or 128 for axis "group", else None.

    Raises QConfigError when the fields contradict each other.
    """

    dtype: str
    qmin: int = 0
    qmax: int = 0
    symmetric: bool = False
    axis: Axis = "tensor"
    dynamic: bool = False
    scale_steps: float | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise QConfigError(f"TensorSpec dtype {self.dtype!r} is not one of {', '.join(_DTYPES)}")
        low, high = _LIMITS[self.dtype]
        if not low <= self.qmin <= self.qmax <= high or (self.qmin == self.qmax and self.is_integer):
            raise QConfigError(f"TensorSpec range [{self.qmin}, {self.qmax}] does not fit {self.dtype} [{low}, {high}]")
        if self.axis not in get_args(Axis):
            raise QConfigError(f"TensorSpec axis {self.axis!r} is not one of {', '.join(map(repr, get_args(Axis)))}")
        if self.axis == "group" and self.group_size not in GROUP_SIZES:
            raise QConfigError(f"TensorSpec group_size must be 32, 64 or 128 for axis 'group', got {self.group_size}")
        if self.axis != "group" and self.group_size is not None:
            raise QConfigError(f"TensorSpec group_size={self.group_size} needs axis 'group', got {self.axis!r}")
        if (self.dtype == "int4") != (self.axis == "group"):
            raise QConfigError(
                f"TensorSpec axis 'group' and dtype 'int4' go together, got {self.axis!r} and {self.dtype!r}"
            )
        if self.dtype == "int4" and not (self.symmetric and self.qmin < 0):
            raise QConfigError("TensorSpec of int4 must be symmetric=True with qmin below 0, -8 say")
        if self.dtype == "int16" and not (self.symmetric and self.qmax == -self.qmin == INT16_MAX):
            raise QConfigError(
                f"TensorSpec of int16 must be symmetric=True with qmin=-{INT16_MAX} and qmax={INT16_MAX}, got {self}"
                f" [{self.qmin}, {self.qmax}]"
            )

    @property
    def is_integer(self) -> bool:
        """Whether values are stored as integers."""
        return self.dtype != "float16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the tensor that holds the values."""
        return _DTYPES[self.dtype]

    @property
    def bits(self) -> int:
        """Bits a stored value takes."""
        return {"uint4": 4, "int4": 4, "int16": 16, "float16": 16}.get(self.dtype, 8)

    def __str__(self) -> str:
        if not self.is_integer:
            return self.dtype
        kind = "symmetric" if self.symmetric else "affine"
        narrow = f" 0–{self.qmax}" if self.dtype == "uint8" and self.qmax < 255 else ""
        size = f" of {self.group_size}" if self.group_size else ""
        return f"{self.dtype}{narrow} {kind} per {self.axis}{size}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
