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
    for weight_format in known:
        if weight_format.name == name:
            return weight_format
    names = ", ".join(repr(weight_format.name) for weight_format in known)
    raise ArgumentError(f"a quantized {operator} takes one of the formats {names}, got {name!r}")


def check_matrix(name: str, weight: QuantizedTensor, outputs: int) -> None:
    """Raise DTypeError or ShapeError unless a weight is an (outputs, columns) matrix as its format stores it."""
    weight_format, values, scale = weight.format, weight.values, weight.scale
    stored, wanted = (outputs, weight_format.stored_columns(weight.columns)), None
    if weight_format.scale is None:
        fits = scale is None or scale.numel() == 0
    elif not weight_format.group_sizes:
        wanted, fits = f"{weight_format.scale} ({outputs},)", scale is not None and scale.numel() == outputs
    elif weight.group_size in weight_format.group_sizes:
        shape = (outputs, -(-weight.columns // weight.group_size))
        wanted, fits = f"{weight_format.scale} {shape}", scale is not None and tuple(scale.shape) == shape
    else:
        wanted, fits = f"one a group of {' or '.join(map(str, weight_format.group_sizes))} columns", False
    is_typed = values.dtype == weight_format.storage and (
        not weight_format.group_sizes or (scale is not None and scale.dtype == weight_format.scale)
    )
    if is_typed and fits and tuple(values.shape) == stored:
        return
    got = _describe(values.dtype, tuple(values.shape), None if scale is None else f"{scale.dtype} {tuple(scale.shape)}")
    raise (ShapeError if is_typed else DTypeError)(
        f"{name}, ({outputs}, {weight.columns}) in {weight_format.name}: "
        f"expected {_describe(weight_format.storage, stored, wanted)}, got {got}"
    )


def _describe(dtype: torch.dtype, shape: tuple[int, ...], scale: str | None) -> str:
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
