"""Conditions that decide only whether forward raises: `assert h == 1`, `if w % 32: raise ValueError(w)`.

A graph cannot branch, but it can hold such a condition: the outcome with which forward goes on is known from its
bytecode, and the graph checks it.
"""

from __future__ import annotations

import bisect
import dis
import types
from typing import Any

from torch import fx
from torch.overrides import handle_torch_function, has_torch_function

from fxquant.errors import ArgumentError

_TESTS = ("TO_BOOL", "COMPARE_OP")  # which call __bool__ in Python 3.13; earlier the jump does
_EMPTY = ("CACHE", "NOP", "EXTENDED_ARG", "NOT_TAKEN")
_AHEAD = ("JUMP_FORWARD", "JUMP_ABSOLUTE")


def required_outcome(frame: types.FrameType) -> bool | None:
    """Return what the condition that a frame is testing has to be, lest it raise; None where it may be either."""
    code = [each for each in dis.get_instructions(frame.f_code) if each.opname not in _EMPTY]
    offsets = [each.offset for each in code]
    at = bisect.bisect_left(offsets, frame.f_lasti)
    at += code[at].opname in _TESTS
    name = code[at].opname
    if not name.startswith("POP_JUMP") or not name.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    jumps, stays = (_raises(code, offsets, start) for start in (_target(code[at], offsets), at + 1))
    return None if jumps == stays else name.endswith("IF_TRUE") == stays


def _target(jump: dis.Instruction, offsets: list[int]) -> int:
    return bisect.bisect_left(offsets, int(jump.argval))


def _raises(code: list[dis.Instruction], offsets: list[int], start: int) -> bool:
    """Return whether instructions raise without branching before."""
    at = start
    while at < len(code) and code[at].opname != "RAISE_VARARGS":
        if code[at].opname in _AHEAD:
            at = max(at + 1, _target(code[at], offsets))
        elif code[at].opcode in (*dis.hasjrel, *dis.hasjabs) or code[at].opname.startswith(("RETURN", "YIELD")):
            return False
        else:
            at += 1
    return at < len(code)


@fx.node.has_side_effect
def check_condition(value: Any, required: bool, place: str) -> None:
    """Raise ArgumentError unless a condition has the outcome with which forward goes on. Graphs call this."""
    if has_torch_function((value,)):
        handle_torch_function(check_condition, (value,), value, required, place)
    elif bool(value) is not required:
        raise ArgumentError(f"forward refuses such an input, at {place}")
