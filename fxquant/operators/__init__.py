"""The operator table: an operator for each family of layers. Add your own: `operators=(*OPERATORS, MY_OPERATOR)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fxquant.operators.attention import ATTENTION
from fxquant.operators.base import Call, CallPattern, NewCall, Operator, Scheme
from fxquant.operators.convolution import CONVOLUTION
from fxquant.operators.embedding import EMBEDDING, EMBEDDING_BAG
from fxquant.operators.linear import LINEAR
from fxquant.operators.recurrent import CELL, LSTM, RNN
from fxquant.operators.static import STATIC_CONVOLUTION, STATIC_LINEAR
from fxquant.operators.transposed import TRANSPOSED_LINEAR

RENAMED = dict.fromkeys(("matmul", "mm", "addmm", "einsum"), LINEAR.name)
"""The names of operators that had others in files of before 0.1.0."""

OPERATORS: tuple[Operator, ...] = (
    LINEAR,
    ATTENTION,
    LSTM,
    RNN,
    CELL,
    EMBEDDING,
    EMBEDDING_BAG,
    TRANSPOSED_LINEAR,
    CONVOLUTION,
    STATIC_LINEAR,
    STATIC_CONVOLUTION,
)
"""The operator table, an `Operator` for each family of layers. Add your own: `operators=(*OPERATORS, MY_OPERATOR)`."""


def find_module_operator(
    operators: Sequence[Operator], module_type: type[nn.Module], is_static: bool | None = False
) -> Operator | None:
    """Return the last operator whose modules hold this exact type: a user's overrides ours.

    is_static: whether a static one is asked for; None: either.
    """
    names = (module_type, f"{module_type.__module__}.{module_type.__qualname__}")
    known = (operator for operator in reversed(operators) if is_static is None or operator.is_static is is_static)
    return next((operator for operator in known if any(name in operator.modules for name in names)), None)


def find_function_operator(
    operators: Sequence[Operator], function: Callable[..., Any] | str, is_static: bool = False
) -> Operator | None:
    """Return the last operator that holds this function, or method by its name. is_static: whether a static one."""
    known = (operator for operator in reversed(operators) if operator.is_static is is_static)
    return next((operator for operator in known if operator.find_pattern(function) is not None), None)


def find_operator(operators: Sequence[Operator], name: str) -> Operator | None:
    """Return the last operator that has, or else had, this name."""
    by_name = {operator.name: operator for operator in operators}
    return by_name.get(name) or by_name.get(RENAMED.get(name, ""))


__all__ = [
    "OPERATORS",
    "RENAMED",
    "Call",
    "CallPattern",
    "NewCall",
    "Operator",
    "Scheme",
    "find_function_operator",
    "find_module_operator",
    "find_operator",
]
