"""What pages and drawings share: colours for both themes, and a frame that makes files self-contained."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from string import Template

from fxquant.errors import ArgumentError

LIGHT = {
    "paper": "#ffffff", "ink": "#1d2129", "dim": "#5a6270", "line": "#c9ced6", "focus": "#0b57d0",
    "changed": "#6b4500", "changed_fill": "#fff1cf",
    "added": "#0b5a24", "added_fill": "#dcf4e1",
    "removed": "#9c1616", "removed_fill": "#fde3e0",
    "float": "#54389a", "float_fill": "#ece6fb",
    "same": "#3c434f", "same_fill": "#f1f3f6",
}  # fmt: skip
DARK = {
    "paper": "#14171c", "ink": "#e6e9ee", "dim": "#a3abb8", "line": "#3d4552", "focus": "#8ab4ff",
    "changed": "#ffd58a", "changed_fill": "#40310d",
    "added": "#8fe0a4", "added_fill": "#12351d",
    "removed": "#ffaca4", "removed_fill": "#471a17",
    "float": "#cdbbff", "float_fill": "#2e2455",
    "same": "#c3c9d4", "same_fill": "#20252d",
}  # fmt: skip
"""The colours of texts and backgrounds, by what they mean; there is always another sign of that."""

DECISIONS = {"changed": "~", "added": "+", "removed": "-", "float": "!", "same": ""}
"""What may happen to a node, by the colours' names, and the signs for it."""

_STYLE = """
:root{color-scheme:light dark}*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem;font:16px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.3rem}table{border-collapse:collapse;width:100%}svg{max-width:100%;height:auto}
th,td{padding:.25rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid}
td.number,th.number{text-align:right}td.number{white-space:nowrap}
.scroll{overflow-x:auto}.scroll table{overflow-wrap:normal}
th button{all:unset;cursor:pointer;text-decoration:underline dotted}
:focus-visible,th button:focus-visible{outline:2px solid;outline-offset:2px}
"""
_COLORS = "body{background:$paper;color:$ink}th,td{border-color:$line}a{color:$focus}.dim{color:$dim}"
_SORT = """
document.querySelectorAll("th button").forEach(b=>b.onclick=()=>{
 const th=b.closest("th"),n=th.cellIndex,body=th.closest("table").tBodies[0],up=th.ariaSort!="ascending";
 const value=r=>r.cells[n].dataset.value??r.cells[n].textContent;
 document.querySelectorAll("th").forEach(h=>h.removeAttribute("aria-sort"));
 th.ariaSort=up?"ascending":"descending";
 const order=(x,y)=>x===""?1:y===""?-1:(up?1:-1)*(isNaN(x)||isNaN(y)?x.localeCompare(y):x-y);
 [...body.rows].sort((x,y)=>order(value(x),value(y))).forEach(r=>body.append(r))})
"""


def themed(template: str) -> str:
    """Return CSS with $names from the palette: light, or dark if the reader's system prefers that."""
    light, dark = (Template(template).substitute(colors) for colors in (LIGHT, DARK))
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}"


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """Return a self-contained HTML page. title: text; body: markup; style: CSS for both themes."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}{themed(_COLORS)}{style}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n"
        '<p class="dim">Made by fxquant.debug. This page holds names, types, sizes and measurements, and no weights; '
        f"it loads nothing.</p>\n{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def table_page(
    title: str,
    headers: Sequence[tuple[str, bool]],
    rows: Sequence[Sequence[tuple[str, str]]],
    footer: Sequence[str],
    figure: str = "",
) -> str:
    """Return a page with a table that a click sorts. headers: text and is_number; cells: text and what to sort by."""
    css = [' class="number"' if is_number else "" for _, is_number in headers]
    head = "".join(
        f"<th{style}><button>{html.escape(text)}</button></th>" for (text, _), style in zip(headers, css, strict=True)
    )
    lines = "".join(
        "<tr>"
        + "".join(
            f'<td{style} data-value="{html.escape(value)}">{html.escape(text)}</td>'
            for (text, value), style in zip(row, css, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    notes = "".join(f"<p>{html.escape(line)}</p>\n" for line in footer)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'
    return page(title, f"{figure}\n{table}\n{notes}", script=_SORT)


def drawing(title: str, width: float, height: float, body: str, style: str) -> str:
    """Return a self-contained SVG drawing. title: text; body: markup; style: CSS with $names."""
    font = "text{font:12px ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img">\n<title>{html.escape(title)}</title>\n<style>{font}'
        f"{themed(f'.paper{{fill:$paper}}text{{fill:$ink}}{style}')}</style>\n"
        f'<rect class="paper" width="100%" height="100%"/>\n{body}\n</svg>\n'
    )


def write(path: str | os.PathLike[str] | None, text: str) -> str:
    """Return a page or drawing; if a path is given, write it there.

    Raises ArgumentError for a file that cannot be written, or with the ending of another type.
    """
    if path is None:
        return text
    endings = (".svg",) if text.startswith("<svg") else (".html", ".htm")
    ending = os.path.splitext(str(path))[1].lower()
    if ending not in (*endings, ""):
        raise ArgumentError(f"{str(path)!r} is written as {endings[0][1:]}; give it the ending {endings[0]}")
    try:
        Path(path).write_text(text, encoding="utf-8")
    except (OSError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArgumentError(f"{path!r} cannot be written: {reason}; give a file in a folder that exists") from error
    return text
