"""Linear forms in other spellings, with a constant matrix: x @ w, torch.mm, torch.addmm, torch.einsum.

Each becomes `torch.ops.fxquant.linear`. Without a constant matrix such a call is no candidate: attention multiplies
activations.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from fxquant.nn.fused import expanded_bmm
from fxquant.operators.base import (
    PRODUCTS,
    Call,
    NewCall,
    Operator,
    never_refuse,
)
from fxquant.operators.linear import convert_linear, refuse_bias

_FORM = re.compile(r"(?P<rows>(?:[A-Za-z]|\.\.\.)*)(?P<i>[A-Za-z]),(?P<weight>[A-Za-z]{2})->(?P=rows)(?P<o>[A-Za-z])")


def _refuse_addmm(operands: dict[str, Any]) -> str | None:
    if operands.get("beta", 1) != 1 or operands.get("alpha", 1) != 1:
        return "its beta or alpha is not 1"
    return refuse_bias(operands["input"], operands["mat2"].shape[1])


def _convert_addmm(call: Call) -> NewCall:
    return convert_linear(call, x="mat1", bias="input")


def _explicit(equation: str) -> str:
    """Return an equation with its output: where none is written, the letters that occur once, in alphabetical order."""
    if "->" in equation:
        return equation
    letters = sorted(letter for letter in set(equation) - set(",.") if equation.count(letter) == 1)
    return f"{equation}->{'...' if '...' in equation else ''}{''.join(letters)}"


def _layout(equation: Any) -> str:
    """Return how an einsum's weight lies, "io" or "oi", or "" for what is no linear form of its last operand."""
    form = _FORM.fullmatch(_explicit(equation.replace(" ", ""))) if isinstance(equation, str) else None
    if form is None:
        return ""
    letters = [*form["rows"].replace(".", ""), form["i"], form["o"]]
    if len(set(letters)) != len(letters):  # a letter that occurs twice would be summed or a diagonal
        return ""
    return {form["i"] + form["o"]: "io", form["o"] + form["i"]: "oi"}.get(form["weight"], "")


def _is_io(operands: dict[str, Any]) -> bool:
    return "equation" not in operands or _layout(operands["equation"]) == "io"


def _refuse_einsum(operands: dict[str, Any]) -> str | None:
    layout = _layout(operands["equation"])
    if not layout:
        return f"its equation {operands['equation']!r} is none like '...i,oi->...o' or '...i,io->...o'"
    x, weight = operands["input"], operands["weight"]
    if x.shape[-1] != weight.shape[layout.index("i")]:
        return "it stretches a dimension of size 1"
    return None


def _row(
    name: str,
    summary: str,
    functions: tuple[Callable[..., Any] | str, ...],
    operands: tuple[str, ...],
    weight: str,
    refuse_call: Callable[[dict[str, Any]], str | None] = never_refuse,
    convert_function: Callable[[Call], NewCall] = convert_linear,
) -> Operator:
    """Return a row, whose weight is (I, O) unless it is an einsum's."""
    return Operator(
        name=name,
        summary=summary,
        functions=functions,
        operands=operands,
        weights=(weight,),
        may_lack_weight=True,
        is_transposed=_is_io,
        schemes=PRODUCTS,
        convert_function=convert_function,
        refuse_call=refuse_call,
    )


MATMUL = _row(
    "matmul",
    "x @ weight with a constant weight (I, O), which may be a transpose: x @ w.t()",
    (operator.matmul, torch.matmul, torch.linalg.matmul, "matmul", expanded_bmm),
    ("input", "other"),
    "other",
)
MM = _row("mm", "x @ weight of two matrices, the second constant, (I, O)", (torch.mm, "mm"), ("input", "mat2"), "mat2")
ADDMM = _row(
    "addmm",
    "bias + x @ weight with a constant weight (I, O), where beta and alpha are 1",
    (torch.addmm, "addmm"),
    ("input", "mat1", "mat2", "beta", "alpha"),
    "mat2",
    _refuse_addmm,
    _convert_addmm,
)
EINSUM = _row(
    "einsum",
    "an input and a constant matrix: '...i,oi->...o', 'bti,io->bto'",
    (torch.einsum,),
    ("equation", "input", "weight"),
    "weight",
    _refuse_einsum,
)
