"""Which lines of a diff are shown: repeated blocks once, and the lines near a change."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LEAST_HIDDEN = 4  # lines; hiding fewer would only confuse

Line = tuple[str, str]
"""A line of a cell: its text, and the name of its colour in the palette, or ""."""


@dataclass(frozen=True)
class DiffRow:
    """One node of either graph. sign: " " kept, "~" changed, "-" removed, "+" added; note: its scheme, or why not.

    before, after: what it is; after is "" where nothing changed. note_before: where only a scheme, a dtype or an
    argument changed, what it was. path: of the module that it calls. inputs_before, inputs_after: the nodes it reads.
    is_float: whether it is a candidate that stays float; fused_into: where what it did is done now, or "".
    sqnr_db, kernel, ms, float_ms: of its site, as `compare` and `profile` measured it; None and "" where they did not.

    In what is shown, a line of sign "⋮" stands for unchanged ones left out, one of sign "×" for changed ones repeated:
    it has the bytes and milliseconds of all of them, and the worst SQNR.
    """

    sign: str
    name: str
    before: str
    after: str
    note: str
    bytes_before: int
    bytes_after: int
    note_before: str = ""
    path: str = ""
    inputs_before: tuple[str, ...] = ()
    inputs_after: tuple[str, ...] = ()
    sqnr_db: float | None = None
    kernel: str = ""
    ms: float | None = None
    float_ms: float | None = None
    is_float: bool = False
    fused_into: str = ""

    @property
    def decision(self) -> str:
        """What became of it in a word: "changed", "added", "removed", "float" (and why is in its note) or "same"."""
        if self.sign == " " and self.is_float:
            return "float"
        return {"~": "changed", "×": "changed", "+": "added", "-": "removed"}.get(self.sign, "same")


def fold(rows: Sequence[DiffRow]) -> list[DiffRow]:
    """Return the lines with each repeated block once, and a line that says how often it stands there.

    Lines are equal here if only the numbers in their names and notes differ: layers_0_norm, layers_1_norm.
    """
    return [row for row, _ in unfolded(rows)]


def unfolded(rows: Sequence[DiffRow]) -> list[tuple[DiffRow, Sequence[DiffRow]]]:
    """Return the same, each line with the repeated ones that it stands for, or none."""
    keys = [_key(row) for row in rows]
    result: list[tuple[DiffRow, Sequence[DiffRow]]] = []
    start = 0
    while start < len(rows):
        period, times = _best_run(keys, start)
        run = rows[start : start + period * times]
        result += [(row, ()) for row in run[:period]]
        if times > 1:
            result.append((_repeats(run, period, times), run[period:]))
        start += len(run)
    return result


def sides(row: DiffRow) -> tuple[list[Line], list[Line]]:
    """Return what a line says of either graph; if only a scheme, dtype or argument changed, that alone has colour."""
    now, notes = row.after or row.before, [(row.note, "dim")] if row.note else []
    if row.sign in "×⋮" or (row.sign == " " and row.after):  # stands for others
        return [(row.before, "dim")], [(row.after, "dim")] if row.after else []
    if row.sign == " ":
        return [(row.before, "")], [
            (now, ""),
            *((text, "dim" if row.decision == "same" else row.decision) for text, _ in notes),
        ]
    if row.sign in "+-":
        return [(row.before, "removed")] * (row.sign == "-"), [(row.after, "added")] * (row.sign == "+") + notes
    if row.before == row.after:
        was = [(row.note_before, "removed")] if row.note_before else []
        return [(row.before, ""), *was], [(now, ""), *((text, "added") for text, _ in notes)]
    return [(row.before, "removed")], [(now, "added"), *notes]


def _repeats(run: Sequence[DiffRow], period: int, times: int) -> DiffRow:
    """Return the line that stands for a run's repeated blocks, with the totals of the whole run."""
    worst = min((row.sqnr_db for row in run if row.sqnr_db is not None), default=None)
    ms, float_ms = (
        sum(numbers) if (numbers := [n for row in run if (n := getattr(row, name)) is not None]) else None
        for name in ("ms", "float_ms")
    )
    return DiffRow(
        sign="×" if any(row.sign != " " for row in run) else " ",
        name=f"{times} times",
        before=f"the {period} lines above" if period > 1 else "the line above",
        after=f"… {run[-1].name}",
        note="",
        bytes_before=sum(row.bytes_before for row in run),
        bytes_after=sum(row.bytes_after for row in run),
        sqnr_db=worst,
        ms=ms,
        float_ms=float_ms,
    )


def near_changes(rows: Sequence[DiffRow], context: int) -> list[DiffRow]:
    """Return the lines that are changed or within `context` lines of one that is."""
    changed = [i for i, row in enumerate(rows) if row.sign != " "]
    shown = {j for i in changed for j in range(i - context, i + context + 1)}
    result: list[DiffRow] = []
    for is_shown, run in itertools.groupby(enumerate(rows), lambda pair: pair[0] in shown):
        part = [row for _, row in run]
        result += part if is_shown else [DiffRow("⋮", "", f"{len(part)} unchanged", "", "", 0, 0)]
    return result


def _key(row: DiffRow) -> tuple[Any, ...]:
    name, note = (re.sub(r"_?\d+", "", text) for text in (row.name, row.note))
    return row.sign, name, row.before, row.after, note, row.note_before, row.kernel, row.bytes_before, row.bytes_after


def _best_run(keys: Sequence[Any], start: int) -> tuple[int, int]:
    """Return the length of the block at a start and how often it stands there, so that most lines are hidden."""
    best, hidden = (1, 1), _LEAST_HIDDEN - 1
    for period in range(1, (len(keys) - start) // 2 + 1):
        if keys[start] != keys[start + period]:
            continue
        times = 1
        while keys[start : start + period] == keys[start + times * period : start + (times + 1) * period]:
            times += 1
        if (times - 1) * period > hidden:
            best, hidden = (period, times), (times - 1) * period
    return best
