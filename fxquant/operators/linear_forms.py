"""Linear's other call patterns, with a constant matrix: x @ w, torch.mm, torch.addmm, torch.einsum.

Each becomes `fxquant.ops.linear`, as F.linear does. Without a constant matrix such a call is no candidate: attention
multiplies activations.
"""

from __future__ import annotations

import functools
import operator
import re
from typing import Any

import torch

from fxquant.nn.fused import expanded_bmm
from fxquant.operators.base import CallPattern

_FORM = re.compile(r"(?P<rows>(?:[A-Za-z]|\.\.\.)*)(?P<i>[A-Za-z]),(?P<weight>[A-Za-z]{2})->(?P=rows)(?P<o>[A-Za-z])")


def refuse_bias(bias: Any, outputs: int) -> str | None:
    """Return why a call's bias, by its example's shape, cannot be added in the kernel, or None."""
    shape = tuple(getattr(bias, "shape", ()))  # a number, in torch's older addmm(beta, input, mat1, mat2=…), has none
    if bias is None or shape == (outputs,):
        return None
    return f"what it adds has shape {shape}, not a bias's ({outputs},)"


def _refuse_addmm(operands: dict[str, Any]) -> str | None:
    if operands.get("beta", 1) != 1 or operands.get("alpha", 1) != 1:
        return "its beta or alpha is not 1"
    return refuse_bias(operands["bias"], operands["weight"].shape[1])


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


def _refuse_einsum(operands: dict[str, Any]) -> str | None:
    layout = _layout(operands["equation"])
    if not layout:
        return f"its equation {operands['equation']!r} is none like '...i,oi->...o' or '...i,io->...o'"
    x, weight = operands["input"], operands["weight"]
    if x.shape[-1] != weight.shape[layout.index("i")]:
        return "it stretches a dimension of size 1"
    return None


def _is_io(operands: dict[str, Any]) -> bool:
    return "equation" not in operands or _layout(operands["equation"]) == "io"


_form = functools.partial(CallPattern, may_lack_weight=True, is_transposed=_is_io)

LINEAR_FORMS = (
    _form(
        summary="x @ weight with a constant weight (I, O), which may be a transpose: x @ w.t()",
        functions=(operator.matmul, torch.matmul, torch.linalg.matmul, "matmul", expanded_bmm),
        operands=("input", "other"),
        roles=("input", "weight"),
    ),
    _form(
        summary="x @ weight of two matrices, the second constant, (I, O)",
        functions=(torch.mm, "mm"),
        operands=("input", "mat2"),
        roles=("input", "weight"),
    ),
    _form(
        summary="bias + x @ weight with a constant weight (I, O), where beta and alpha are 1",
        functions=(torch.addmm, "addmm"),
        operands=("input", "mat1", "mat2", "beta", "alpha"),
        roles=("bias", "input", "weight", "beta", "alpha"),
        refuse_call=_refuse_addmm,
    ),
    _form(
        summary="an input and a constant matrix: '...i,oi->...o', 'bti,io->bto'",
        functions=(torch.einsum,),
        operands=("equation", "input", "weight"),
        refuse_call=_refuse_einsum,
    ),
)
