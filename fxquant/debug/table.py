"""What the debugging views share: sizes for people, names that fit a column, tables for a terminal and a notebook."""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate


def megabytes(count: int) -> str:
    """Return a byte count for people: "113.94 MB", "48.1 kB", "640 B"."""
    if count >= 100_000:
        return f"{count / 1e6:.2f} MB"
    return f"{count / 1e3:.1f} kB" if count >= 1000 else f"{count} B"


def shorten(name: str, width: int) -> str:
    """Return a name that fits a column, its beginning left out if need be: the end tells more."""
    return name if len(name) <= width else "…" + name[-(width - 1) :]


def site_name(row: Any) -> str:
    """Return what a row's site is called: its path, of a functional call its weight's path and the call's name."""
    return f"{row.path} ({row.call})" if row.call else row.path or "(the model)"


def text_table(
    rows: Sequence[Sequence[str]], headers: Sequence[str], widths: Sequence[int], alignments: Sequence[str] = ()
) -> str:
    """Return a table for a terminal, cells wrapped to the widths. alignments: "left" or "right"; default: left."""
    table: str = tabulate(
        rows,
        headers=headers,
        tablefmt="simple",
        maxcolwidths=list(widths),
        disable_numparse=True,
        break_on_hyphens=False,
        colalign=list(alignments) if rows and alignments else None,
    )
    return table


def wants_color() -> bool:
    """Return whether what is printed now may be coloured: on a terminal, unless NO_COLOR is set (no-color.org)."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, code: str) -> str:
    """Return a text whose lines a terminal shows in a colour, by its ANSI code; without a code the text itself."""
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" for line in text.split("\n")) if text and code else text


def html_table(rows: Sequence[Sequence[str]], headers: Sequence[str], caption: str) -> str:
    """Return the same table for a notebook; every cell is escaped."""
    table: str = tabulate(rows, headers=headers, tablefmt="html", disable_numparse=True)
    return f"{table}<p>{html.escape(caption)}</p>"
