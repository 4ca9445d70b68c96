"""What the reports share: figures as text, names that fit a column, tables for a terminal and a notebook."""

from __future__ import annotations

import html
import math
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


def decibels(value: float) -> str:
    """Return an SQNR for people: "41.3 dB", "exact" without any error, "" for a NaN."""
    return "" if math.isnan(value) else "exact" if value == math.inf else f"{value:.1f} dB"


def milliseconds(value: float) -> str:
    """Return a time for people: "0.125", "" for a NaN."""
    return "" if math.isnan(value) else f"{value:.3f}"


def shorten(name: str, width: int) -> str:
    """Return a name that fits a column. A long one loses its beginning, since the end tells more."""
    return name if len(name) <= width else "…" + name[-(width - 1) :]


def first_few(texts: Sequence[str], most: int, attribute: str) -> list[str]:
    """Return the first texts and, if there are more, a last one that names the attribute which holds them all."""
    rest = len(texts) - most
    return [*texts[:most], *([f"… and {rest} more: .{attribute}"] if rest > 0 else [])]


def site_fields(site: Any) -> dict[str, Any]:
    """Return the fields that every report's line about a site has."""
    return {"path": site.path, "call": site.call or "", "kind": site.kind, "operator": site.operator}


def site_name(site: Any) -> str:
    """Return the name of a Site, or of a report's line about one: its path, or a call's weight's path and name."""
    return f"{site.path} ({site.call})" if site.call else site.path or "(the model)"


def text_table(
    rows: Sequence[Sequence[str]],
    headers: Sequence[str],
    widths: Sequence[int],
    alignments: Sequence[str] = (),
    names: Collection[int] = (),
) -> str:
    """Return a table for a terminal, cells wrapped to the widths. alignments: "left" or "right"; default: left.

    A column whose longest word is wider gets the room that the others leave of 100 characters. Longer words are broken
    after . _ / - and before a capital; in columns of names, given by number, they are shortened.
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
    """Return a text in lines no longer than `width`: broken between words, and long words where they have a seam."""
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
    """Return whether to print in colour: on a terminal, unless NO_COLOR is set (no-color.org)."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Return a text that standard output can encode: if it lacks our signs (→ × …), with ASCII in their place."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
    return text


def paint(text: str, code: str) -> str:
    """Return a text with each line in a colour, by its ANSI code; "" leaves it as it is."""
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" for line in text.split("\n")) if text and code else text


def html_table(rows: Sequence[Sequence[str]], headers: Sequence[str], caption: str) -> str:
    """Return the same table for a notebook, with every cell escaped."""
    table: str = tabulate(rows, headers=headers, tablefmt="html", disable_numparse=True)
    return f"{table}<p>{html.escape(caption)}</p>"
