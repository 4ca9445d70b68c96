"""The operator table: one row a family. A user's own rows go beside them: `operators=(*OPERATORS, MY_ROW)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fxquant.operators.attention import ATTENTION
from fxquant.operators.base import Call, NewCall, Operator, Scheme
from fxquant.operators.embedding import EMBEDDING, EMBEDDING_BAG
from fxquant.operators.linear import LINEAR
from fxquant.operators.linear_forms import ADDMM, EINSUM, MATMUL, MM
from fxquant.operators.recurrent import CELL, LSTM, RNN
from fxquant.operators.transposed import TRANSPOSED_LINEAR

OPERATORS: tuple[Operator, ...] = (
    LINEAR,
    MATMUL,
    MM,
    ADDMM,
    EINSUM,
    ATTENTION,
    LSTM,
    RNN,
    CELL,
    EMBEDDING,
    EMBEDDING_BAG,
    TRANSPOSED_LINEAR,
)
"""The operator table: a row a family of layers. Yours go beside ours: `operators=(*OPERATORS, MY_ROW)`."""


def find_module_row(operators: Sequence[Operator], kind: type[nn.Module]) -> Operator | None:
    """Return the row whose modules hold this exact type; of several the last, so that a user's row overrides ours."""
    names = (kind, f"{kind.__module__}.{kind.__qualname__}")
    return next((row for row in reversed(operators) if any(name in row.modules for name in names)), None)


def find_function_row(operators: Sequence[Operator], function: Callable[..., Any] | str) -> Operator | None:
    """Return the row that holds this function, or method by its name; of several the last."""
    return next((row for row in reversed(operators) if function in row.functions), None)


def find_row(operators: Sequence[Operator], name: str) -> Operator | None:
    """Return the row of this name; of several the last."""
    return next((row for row in reversed(operators) if row.name == name), None)


__all__ = [
    "OPERATORS",
    "Call",
    "NewCall",
    "Operator",
    "Scheme",
    "find_function_row",
    "find_module_row",
    "find_row",
]
