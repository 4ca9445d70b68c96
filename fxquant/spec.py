"""How one tensor becomes integers, as a frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from fxquant.errors import QConfigError, warn
from fxquant.formats import FLOAT32, FORMATS, Format, format_of
from fxquant.ranges import Range, range_from_dict

Axis = Literal["tensor", "channel", "token", "group"]

_OLD_AXIS = "row"  # what "token" was called

_DTYPES = tuple(known.name for known in FORMATS if known is not FLOAT32)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """How one tensor becomes integers: x ≈ (q - zero_point) * scale with q in [qmin, qmax].

    dtype: the name of a format: "int8", "int16", "uint8", "uint4", "int4" (two values a byte), "int3" (8 in 3
        bytes) or "float16" (no integers: stored in half precision). "int16" is symmetric over all of its range, ±32767.
    symmetric: zero_point is 0, the range is that of the largest magnitude.
    axis: where scales are shared: "tensor" (one), "channel" (one for each index of dimension 0 of a weight: an output
        channel, a row of a table), "token" (one for each vector of an activation's last dimension: a token, a time
        step), "group" (one for each `group_size` columns of each output channel).
    dynamic: measured at each call (activations) instead of once (weights).
    scale_steps: how many steps the measured range is divided into; None means qmax - qmin for an affine spec and qmax
        for a symmetric one.
    group_size: 32, 64 or 128 for axis "group", else None.
    range: how the range of a calibrated activation is chosen; None for what is not calibrated.

    Raises QConfigError when the fields contradict each other.
    """

    dtype: str = "uint8"
    qmin: int = 0
    qmax: int = 0
    symmetric: bool = False
    axis: Axis = "tensor"
    dynamic: bool = False
    scale_steps: float | None = None
    group_size: int | None = None
    range: Range | None = None

    def __post_init__(self) -> None:
        if self.axis == _OLD_AXIS:
            warn("TensorSpec axis 'row' is now 'token'", category=DeprecationWarning)
            object.__setattr__(self, "axis", "token")
        if self.dtype not in _DTYPES:
            raise QConfigError(f"TensorSpec dtype {self.dtype!r} is not one of {', '.join(_DTYPES)}")
        low, high = self.format.limits or (0, 0)
        if not low <= self.qmin <= self.qmax <= high or (self.qmin == self.qmax and self.is_integer):
            raise QConfigError(f"TensorSpec range [{self.qmin}, {self.qmax}] does not fit {self.dtype} [{low}, {high}]")
        if self.axis not in get_args(Axis):
            raise QConfigError(f"TensorSpec axis {self.axis!r} is not one of {', '.join(map(repr, get_args(Axis)))}")
        self._check_groups()
        if self.format.is_whole and not (self.symmetric and (self.qmin, self.qmax) == (low, high)):
            raise QConfigError(
                f"TensorSpec of {self.dtype} must be symmetric=True with qmin={low} and qmax={high}, got {self}"
                f" [{self.qmin}, {self.qmax}]"
            )

    def _check_groups(self) -> None:
        """Raise QConfigError unless dtype, axis and group_size go together."""
        sizes = self.format.group_sizes
        if self.axis != "group" and self.group_size is not None:
            raise QConfigError(f"TensorSpec group_size={self.group_size} needs axis 'group', got {self.axis!r}")
        if (self.axis == "group") != bool(sizes):
            grouped = " or ".join(repr(known.name) for known in FORMATS if known.group_sizes)
            raise QConfigError(
                f"TensorSpec axis 'group' and dtype {grouped} go together, got {self.axis!r} and {self.dtype!r}"
            )
        if sizes and self.group_size not in sizes:
            known = f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"
            raise QConfigError(f"TensorSpec group_size must be {known} for axis 'group', got {self.group_size}")
        if sizes and not (self.symmetric and self.qmin < 0):
            raise QConfigError(
                f"TensorSpec of {self.dtype} must be symmetric=True with qmin below 0, its least integer say"
            )

    @property
    def format(self) -> Format:
        """How the values are stored and multiplied: the format named `dtype`."""
        return format_of(self.dtype)

    @property
    def is_integer(self) -> bool:
        """Whether values are stored as integers."""
        return self.format.limits is not None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the tensor that holds the values."""
        return self.format.storage

    @property
    def bits(self) -> int:
        """Bits a stored value takes."""
        return self.format.bits

    def __str__(self) -> str:
        if not self.is_integer:
            return self.dtype
        kind = "symmetric" if self.symmetric else "affine"
        is_narrow = not self.symmetric and (self.qmin, self.qmax) != self.format.limits
        narrow = f" {self.qmin}–{self.qmax}" if is_narrow else ""
        size = f" of {self.group_size}" if self.group_size else ""
        return f"{self.dtype}{narrow} {kind} per {self.axis}{size}"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TensorSpec:
        """Return the spec that `to_dict` described."""
        chosen = fields.get("range")
        return cls(**{**_renamed(fields), "range": None if chosen is None else range_from_dict(chosen)})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what a pickle holds."""
        vars(self).update(_renamed(state))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        chosen = fields.pop("range")
        return fields if chosen is None else {**fields, "range": chosen.to_dict()}


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored spec, with the axis by the name that it has now."""
    return {**fields, "axis": "token"} if fields["axis"] == _OLD_AXIS else fields
