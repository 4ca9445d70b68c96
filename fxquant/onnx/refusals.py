"""What has no ONNX form, as data: docs/onnx.md lists it, and to_onnx raises an error for it that names the site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A call of an operator that has no ONNX form.

    operator: its name. what, why: for the error and the documentation. applies: asked with the call's arguments, by
    name, as the exported graph has them (fx nodes for tensors).
    """

    operator: str
    what: str
    why: str
    cure: str
    applies: Callable[[Any], bool]


def _is_packed(a: Any) -> bool:
    return a.batch_sizes is not None


def _has_symbols(numbers: Any) -> bool:
    return any(not isinstance(number, int) for number in numbers or ())


def _does_not_divide(a: Any) -> bool:
    if _has_symbols(a.size) or 0 in a.size:
        return True
    sizes = a.x.meta["val"].shape[2:]
    pairs = zip(sizes, a.size, strict=True)
    return any(out != 1 and (not isinstance(n, int) or n % out) for n, out in pairs) and set(a.size) != {1}


PACKED = Refusal(
    operator="lstm",
    what="a recurrent layer called with a packed sequence",
    why="a Scan runs all sequences for the same number of steps, and has no place for a batch that shrinks",
    cure="call the layer with a padded batch",
    applies=_is_packed,
)

REFUSALS = (
    PACKED,
    dataclasses.replace(PACKED, operator="rnn"),
    Refusal(
        operator="adaptive_pool_value",
        what="an adaptive average pooling to a size that does not divide the input's, or is not known",
        why="ONNX has average poolings of one window size alone",
        cure="pool to a size that divides the input's, or leave the pooling float",
        applies=_does_not_divide,
    ),
    Refusal(
        operator="pool_value",
        what="an average pooling with both ceil_mode and a divisor",
        why="ONNX's AveragePool divides by the size of a window alone",
        cure="leave out one of the two",
        applies=lambda a: bool(a.ceil_mode) and a.divisor is not None,
    ),
    Refusal(
        operator="pad_value",
        what="padding by a number that depends on the input",
        why="the translation writes the numbers into the file",
        cure="pad by a constant",
        applies=lambda a: _has_symbols(a.pad),
    ),
    Refusal(
        operator="resize_value",
        what="an interpolation to a size that depends on the input",
        why="the translation writes the numbers into the file",
        cure="give scale_factor, or a constant size",
        applies=lambda a: _has_symbols(a.size),
    ),
)
"""All of them."""


def find_refusal(operator: str, a: Any) -> Refusal | None:
    """Return why a call has no ONNX form, or None."""
    return next((row for row in REFUSALS if row.operator == operator and row.applies(a)), None)
