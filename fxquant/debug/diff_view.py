"""What of a diff is shown: repeated blocks folded into one, and the rows near a change."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LEAST_HIDDEN = 4  # rows; to hide fewer would only puzzle


@dataclass(frozen=True)
class DiffRow:
    """One node of either graph. sign: " " kept, "~" changed, "-" removed, "+" added; note: its scheme, or why not.

    In what is shown, a row of sign "⋮" stands for unchanged ones left out, one of sign "×" for changed ones repeated.
    """

    sign: str
    name: str
    before: str
    after: str
    note: str
    bytes_before: int
    bytes_after: int


def fold(rows: Sequence[DiffRow]) -> list[DiffRow]:
    """Return the rows with each block that follows upon itself once, and a row that says how often.

    Rows are alike where only numbers in their names and notes differ: layers_0_norm, layers_1_norm.
    """
    keys = [_key(row) for row in rows]
    result: list[DiffRow] = []
    start = 0
    while start < len(rows):
        period, times = _best_run(keys, start)
        run = rows[start : start + period * times]
        result += run[:period]
        if times > 1:
            sign = "×" if any(row.sign != " " for row in run) else " "
            above = f"the {period} rows above" if period > 1 else "the row above"
            sizes = sum(row.bytes_before for row in run), sum(row.bytes_after for row in run)
            result.append(DiffRow(sign, f"{times} times", above, f"… {run[-1].name}", "", *sizes))
        start += len(run)
    return result


def near_changes(rows: Sequence[DiffRow], context: int) -> list[DiffRow]:
    """Return the rows that are changed or within `context` rows of one that is."""
    changed = [i for i, row in enumerate(rows) if row.sign != " "]
    shown = {j for i in changed for j in range(i - context, i + context + 1)}
    result: list[DiffRow] = []
    for is_shown, run in itertools.groupby(enumerate(rows), lambda pair: pair[0] in shown):
        part = [row for _, row in run]
        result += part if is_shown else [DiffRow("⋮", "", "unchanged", "", "", 0, 0)]
    return result


def _key(row: DiffRow) -> tuple[Any, ...]:
    name, note = (re.sub(r"_?\d+", "", text) for text in (row.name, row.note))
    return row.sign, name, row.before, row.after, note, row.bytes_before, row.bytes_after


def _best_run(keys: Sequence[Any], start: int) -> tuple[int, int]:
    """Return the length of the block at a start and how often it stands there: the run that hides the most rows."""
    best, hidden = (1, 1), _LEAST_HIDDEN - 1
    for period in range(1, (len(keys) - start) // 2 + 1):
        times = 1
        while keys[start : start + period] == keys[start + times * period : start + (times + 1) * period]:
            times += 1
        if (times - 1) * period > hidden:
            best, hidden = (period, times), (times - 1) * period
    return best
