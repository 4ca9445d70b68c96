"""What the debugging views share: sizes for people, names that fit a column, tables for a terminal and a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence

from tabulate import tabulate


def megabytes(count: int) -> str:
    """Return a byte count for people: "113.94 MB", "48.1 kB", "640 B"."""
    if count >= 100_000:
        return f"{count / 1e6:.2f} MB"
    return f"{count / 1e3:.1f} kB" if count >= 1000 else f"{count} B"


def shorten(name: str, width: int) -> str:
    """Return a name that fits a column, its beginning left out if need be: the end tells more."""
    return name if len(name) <= width else "…" + name[-(width - 1) :]


def text_table(rows: Sequence[Sequence[str]], headers: Sequence[str], widths: Sequence[int]) -> str:
    """Return a table for a terminal, cells wrapped to the widths."""
    table: str = tabulate(
        rows,
        headers=headers,
        tablefmt="simple",
        maxcolwidths=list(widths),
        disable_numparse=True,
        break_on_hyphens=False,
    )
    return table


def html_table(rows: Sequence[Sequence[str]], headers: Sequence[str], caption: str) -> str:
    """Return the same table for a notebook; every cell is escaped."""
    table: str = tabulate(rows, headers=headers, tablefmt="html", disable_numparse=True)
    return f"{table}<p>{html.escape(caption)}</p>"
