"""Weights as the operators take them: stored values, scales, and the name of the format that they are in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxquant.errors import ArgumentError, DTypeError, ShapeError
from fxquant.formats import Format
from fxquant.numerics import QuantizedTensor
from fxquant.ops.library import plain, vector


def check_format(operator: str, name: str, known: Sequence[Format]) -> Format:
    """Return the format of a name, or raise ArgumentError unless it is one of those."""
    for row in known:
        if row.name == name:
            return row
    names = ", ".join(repr(row.name) for row in known)
    raise ArgumentError(f"a quantized {operator} takes one of the formats {names}, got {name!r}")


def check_matrix(name: str, weight: QuantizedTensor, outputs: int) -> None:
    """Raise DTypeError or ShapeError unless a weight is an (outputs, columns) matrix as its format stores it."""
    row, values, scale = weight.format, weight.values, weight.scale
    stored, wanted = (outputs, row.stored_columns(weight.columns)), None
    if row.scale is None:
        fits = scale is None or scale.numel() == 0
    elif not row.group_sizes:
        wanted, fits = f"{row.scale} ({outputs},)", scale is not None and scale.numel() == outputs
    elif weight.group_size in row.group_sizes:
        shape = (outputs, -(-weight.columns // weight.group_size))
        wanted, fits = f"{row.scale} {shape}", scale is not None and tuple(scale.shape) == shape
    else:
        wanted, fits = f"one a group of {' or '.join(map(str, row.group_sizes))} columns", False
    is_typed = values.dtype == row.storage and (not row.group_sizes or (scale is not None and scale.dtype == row.scale))
    if is_typed and fits and tuple(values.shape) == stored:
        return
    got = None if scale is None else f"{scale.dtype} {tuple(scale.shape)}"
    raise (ShapeError if is_typed else DTypeError)(
        f"{name}, ({outputs}, {weight.columns}) in {row.name}: expected {_told(row.storage, stored, wanted)}, "
        f"got {_told(values.dtype, tuple(values.shape), got)}"
    )


def _told(dtype: torch.dtype, shape: tuple[int, ...], scale: str | None) -> str:
    return f"{dtype} {shape} with {'no scale' if scale is None else f'scale {scale}'}"


def check_qmax(operator: str, qmax: int) -> None:
    """Raise ArgumentError unless qmax is the greatest integer of activations of 1 to 8 bits."""
    if not 1 <= qmax <= 255:
        raise ArgumentError(f"a quantized {operator} takes qmax from 1 to 255, got {qmax}; 255 is 8 bits, 127 is 7")


def prepare_scale(weight: QuantizedTensor) -> torch.Tensor | None:
    """Return a weight's scale as the library takes it, or raise ShapeError."""
    if weight.format.scale is None or weight.scale is None:
        return None
    return plain(weight.scale) if weight.format.group_sizes else vector("scale", weight.scale, weight.values.shape[0])
