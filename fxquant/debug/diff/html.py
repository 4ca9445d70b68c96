"""A graph diff as HTML: a table for a notebook, and a page that links the two graphs and the kernels."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from fxquant.debug.diff.fold import DiffRow, Line, sides, unfolded
from fxquant.debug.report.page import DECISIONS, page, themed
from fxquant.debug.report.table import megabytes

# Translucent backgrounds: a notebook's theme is unknown, and its text colour is kept.
_GROUNDS = {
    "changed": "background:rgba(212,160,23,.28)",
    "added": "background:rgba(46,160,67,.28)",
    "removed": "background:rgba(218,54,51,.28)",
    "float": "background:rgba(137,87,229,.28)",
    "dim": "opacity:.8",
}
_STYLE = """
.controls{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:.5rem 1.2rem;align-items:center}
.controls{padding:.5rem 0}
input[type=search]{font:inherit;padding:.3rem .5rem;flex:1 1 12rem;min-width:0}
.key{padding:0 .4rem;white-space:nowrap}td:first-child{font-weight:bold;text-align:center}
th:first-child{width:1.5rem}table{table-layout:fixed}
td.cell{cursor:pointer}td.cell:empty{cursor:default}.cell b{font-weight:600}.cell div{font-size:.92em}
.bar{display:block;height:5px;margin-top:4px;min-width:1px}td button{font:inherit;padding:.2rem .6rem}
tr.lit td.cell:not(:empty),tr:target td{outline:2px solid;outline-offset:-2px}
@media(max-width:44rem){thead{display:none}table,tbody,tr,td{display:block}tr{padding:.5rem 0;border-bottom:1px solid}
 td,td:first-child{width:auto;border:0;text-align:left;padding:.15rem 0 .15rem .7rem}td:empty{display:none}
 td.cell{width:auto}td[data-side]:not(:empty)::before{content:attr(data-side);display:block;font-size:.8em}}
tr{scroll-margin-top:7rem}.bare td:nth-child(4),.bare th:nth-child(4){display:none}
[hidden]{display:none!important}
"""
_COLORS = (
    ".controls{background:$paper}tr{border-color:$line}tr.lit td.cell,tr:target td{outline-color:$focus}"
    ".bar{background:$dim}td::before{color:$dim}"
    "input,button{background:$same_fill;color:$ink;border:1px solid $line;border-radius:4px}"
    + "".join(f".{name}{{color:${name};background:${name}_fill}}" for name in DECISIONS if name != "same")
)
_SCRIPT = """
const $=q=>document.querySelector(q),rows=[...document.querySelectorAll("tbody tr:not(.run)")],
 runs=[...document.querySelectorAll("tr.run")];let pinned=null;
const light=row=>rows.forEach(r=>
 r.classList.toggle("lit",!!row&&(r==row||r.dataset.with==row.id||row.dataset.with==r.id)));
const show=()=>{const words=$("#search").value.toLowerCase(),changed=$("#changed").checked;
 let found=0;
 rows.forEach(r=>{const is=(!words||r.textContent.toLowerCase().includes(words))&&
  (!changed||r.dataset.decision!="same");
  found+=is;r.hidden=!is||(r.dataset.run!==undefined&&!words&&!$("#"+r.dataset.run).open)});
 runs.forEach(r=>{r.hidden=!!words||(changed&&r.dataset.decision=="same");
  const b=r.querySelector("button");b.ariaExpanded=!!r.open;b.textContent=r.open?"hide":"show"});
 $("#found").textContent=words||changed?`${found} of ${rows.length} nodes`:""};
runs.forEach(r=>r.querySelector("button").onclick=()=>{r.open=!r.open;show()});
rows.forEach(r=>{r.onmouseenter=()=>pinned||light(r);r.onmouseleave=()=>pinned||light(null);
 r.querySelectorAll(".cell:not(:empty)").forEach(c=>{c.tabIndex=0;c.onfocus=()=>pinned||light(r);c.onblur=()=>pinned||light(null);
  c.onclick=e=>{if(e.target.tagName!="A"){pinned=pinned==r?null:r;light(pinned||r)}};
  c.onkeydown=e=>{if(e.key=="Enter"&&e.target==c)c.click()}})});
document.onkeydown=e=>{if(e.key=="Escape"){pinned=null;light(null)}};
document.onclick=e=>{const to=e.target.hash&&$(e.target.hash);
 if(to&&to.hidden){$("#search").value="";$("#changed").checked=false;
 if(to.dataset.run)$("#"+to.dataset.run).open=true;show()}};
$("#search").oninput=$("#changed").onchange=show;$(".controls").hidden=false;show();
"""


def diff_table(headers: Sequence[str], rows: Sequence[Sequence[Sequence[Line]]], footer: Sequence[str]) -> str:
    """Return a table for a notebook; every text is escaped."""
    head = "".join(f'<th style="text-align:left">{html.escape(header)}</th>' for header in headers)
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:left">{"<br>".join(map(_span, cell))}</td>' for cell in row)
        + "</tr>\n"
        for row in rows
    )
    notes = "".join(f"<p>{html.escape(line)}</p>" for line in footer)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>{notes}"


def _span(line: Line) -> str:
    text, color = html.escape(line[0]), _GROUNDS.get(line[1], "")
    return f'<span style="{color}">{text}</span>' if color and text else text


def diff_page(rows: Sequence[DiffRow], stages: tuple[str, str], footer: Sequence[str]) -> str:
    """Return a self-contained page: each node of both graphs and its kernel in one line, linked to what it reads."""
    places = {row.name: f"n{i}" for i, row in enumerate(rows)}
    modules = {row.path: places[row.name] for row in rows if row.path}
    largest = max((size for row in rows for size in (row.bytes_before, row.bytes_after)), default=0)
    is_bare = not any(map(_details, rows))  # no column for what was not measured
    parts = []
    for number, (row, hidden) in enumerate(unfolded(rows)):
        if not hidden:
            parts.append(_row(row, places, modules, largest, stages))
            continue
        parts.append(
            f'<tr class="run" id="run{number}" data-decision="{row.decision}"><td>×</td>'
            f'<td colspan="{2 if is_bare else 3}">'
            f"{html.escape(f'{row.name} {row.before} {row.after}')}"
            f"{_details(row)} <button>show</button></td></tr>\n"
        )
        parts += [_row(part, places, modules, largest, stages, f"run{number}") for part in hidden]
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *stages, "kernel and measurements"))
    css = ' class="bare"' if is_bare else ""
    keys = " ".join(
        f'<span class="key {name}">{sign} {"stays float" if name == "float" else name}</span>'
        for name, sign in DECISIONS.items()
        if sign
    )
    body = (
        f"<p>{'<br>'.join(map(html.escape, footer))}</p><p>{keys}</p>\n"
        '<p class="dim">Point at a node to mark it with its counterpart, its kernel and what was fused into it; click '
        "to keep the mark. ← names what it reads.</p>\n"
        '<div class="controls" hidden><input type="search" id="search" aria-label="Search" placeholder="Search names, '
        'types, reasons"><label><input type="checkbox" id="changed"> only changes and what stays float</label>'
        '<output id="found"></output></div>\n'
        f"<table{css}><thead><tr>{heads}</tr></thead>\n<tbody>{''.join(parts)}</tbody></table>\n"
    )
    return page(f"Graph diff: {stages[0]} → {stages[1]}", body, _STYLE + themed(_COLORS), _SCRIPT)


def _row(
    row: DiffRow,
    places: dict[str, str],
    modules: dict[str, str],
    largest: int,
    stages: tuple[str, str],
    run: str = "",
) -> str:
    """Return one node as a line of the table: its sign, the cells of both graphs, and its kernel."""
    fused = modules.get(row.fused_into, "")
    marks = (f' data-run="{run}"' if run else "") + (f' data-with="{fused}"' if fused else "")
    was, now = sides(row)
    cells = [
        _cell(row, was, row.bytes_before, largest, _reads(row.inputs_before, places)) if row.sign != "+" else "",
        _cell(row, now, row.bytes_after, largest, _reads(row.inputs_after, places)) if row.sign != "-" else "",
        _details(row),
    ]
    if row.sign == "-" and row.note:
        cells[1] = f'<div class="dim">{html.escape(row.note)}</div>'
    columns = "".join(
        f'<td class="cell" data-side="{html.escape(title)}">{cell}</td>'
        for title, cell in zip((*stages, "kernel"), cells, strict=True)
    )
    decision = row.decision
    return (
        f'<tr id="{places[row.name]}" data-decision="{decision}"{marks}>'
        f'<td class="{decision}">{DECISIONS[decision]}</td>{columns}</tr>\n'
    )


def _cell(row: DiffRow, lines: Sequence[Line], count: int, largest: int, reads: str) -> str:
    """Return a node's cell for one graph: name, type, scheme or reason, bytes with a bar, and what it reads."""
    texts = "".join(
        f'<div><span class="{color}">{html.escape(text)}</span></div>' if color else f"<div>{html.escape(text)}</div>"
        for text, color in lines
    )
    width = 100 * count / largest if largest else 0
    size = f'<div>{megabytes(count)}<span class="bar" style="width:{width:.2f}%"></span></div>' if count else ""
    return f"<b>{html.escape(row.name)}</b>{texts}{size}{reads}"


def _reads(names: Sequence[str], places: dict[str, str]) -> str:
    """Return links to the nodes that a node reads."""
    links = ", ".join(f'<a href="#{places[name]}">{html.escape(name)}</a>' for name in names if name in places)
    return f'<div class="dim">← {links}</div>' if links else ""


def _details(row: DiffRow) -> str:
    """Return a node's kernel, milliseconds and SQNR."""
    unquantized = "" if row.float_ms is None else f", float {row.float_ms:.3f} ms"
    texts = [
        row.kernel,
        "" if row.ms is None else f"{row.ms:.3f} ms{unquantized}",
        "" if row.sqnr_db is None else "exact" if row.sqnr_db == math.inf else f"SQNR {row.sqnr_db:.1f} dB",
    ]
    return "".join(f"<div>{html.escape(text)}</div>" for text in texts if text)
