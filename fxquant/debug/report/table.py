"""What the debugging views share: sizes for people, names that fit a column, tables for a terminal and a notebook."""

from __future__ import annotations

import html
import os
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any

from tabulate import tabulate

_TABLE_WIDTH = 100
_ASCII = str.maketrans("→←×⋮…–≈", "><x:.-~")  # as wide, so that columns stand
_ANSI = re.compile(r"\x1b\[[\d;]*m")
_PAINTED = re.compile(r"\x1b\[([\d;]*)m(.*)\x1b\[0m")


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
    rows: Sequence[Sequence[str]],
    headers: Sequence[str],
    widths: Sequence[int],
    alignments: Sequence[str] = (),
    names: Collection[int] = (),
) -> str:
    """Return a table for a terminal, cells wrapped to the widths. alignments: "left" or "right"; default: left.

    A column whose longest word is wider takes the room that the others leave of 100 columns; what is longer still is
    broken at its seams, after . _ / - and before a capital, or, in columns of names, by number, shortened.
    """
    lines = [[line for row in rows for line in _ANSI.sub("", row[i]).split("\n")] for i in range(len(headers))]
    shown = [
        [f"{header}  ", *(line[:width] for line in column)]
        for header, width, column in zip(headers, widths, lines, strict=True)
    ]
    taken = [max(map(len, column)) for column in shown]  # tabulate makes a column wider than its header by two
    spare = _TABLE_WIDTH - sum(taken) - 2 * (len(headers) - 1)
    fitted = list(widths)
    for i, column in enumerate(lines):
        longest = max((len(word) for line in column for word in line.split()), default=0)
        grown = min(max(longest - widths[i], 0), max(spare, 0))
        fitted[i], spare = widths[i] + grown, spare - grown
    table: str = tabulate(
        [[(_cut if i in names else wrap)(cell, fitted[i]) for i, cell in enumerate(row)] for row in rows],
        headers=headers,
        tablefmt="simple",
        disable_numparse=True,
        colalign=list(alignments) if rows and alignments else None,
    )
    return table


def _cut(text: str, width: int) -> str:
    return "\n".join(shorten(line, width) for line in text.split("\n"))


def wrap(text: str, width: int) -> str:
    """Return a text of lines no longer than `width`: broken between words, of a longer word where it has a seam."""
    return "\n".join(part for line in text.split("\n") for part in _wrapped(line, width))


def _wrapped(line: str, width: int) -> list[str]:
    painted = _PAINTED.fullmatch(line)
    if painted:
        return [paint(part, painted[1]) for part in _wrapped(painted[2], width)]
    parts = [""]
    for word in re.split(r"(?<= )", line):
        if len((parts[-1] + word).rstrip()) > width and parts[-1]:
            parts.append("")
        for piece in [word] if len(word.rstrip()) <= width else re.split(r"(?<=[._/-])|(?<=[a-z])(?=[A-Z])", word):
            if len((parts[-1] + piece).rstrip()) > width and parts[-1]:
                parts.append("")
            parts[-1] += piece
            while len(parts[-1].rstrip()) > width:
                parts[-1:] = [parts[-1][:width], parts[-1][width:]]
    return [part.rstrip() for part in parts]


def wants_color() -> bool:
    """Return whether what is printed now may be coloured: on a terminal, unless NO_COLOR is set (no-color.org)."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Return a text as standard output's encoding can show it: in one without our signs (→ × …), in ASCII for them."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
    return text


def paint(text: str, code: str) -> str:
    """Return a text whose lines a terminal shows in a colour, by its ANSI code; without a code the text itself."""
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" for line in text.split("\n")) if text and code else text


def html_table(rows: Sequence[Sequence[str]], headers: Sequence[str], caption: str) -> str:
    """Return the same table for a notebook; every cell is escaped."""
    table: str = tabulate(rows, headers=headers, tablefmt="html", disable_numparse=True)
    return f"{table}<p>{html.escape(caption)}</p>"
