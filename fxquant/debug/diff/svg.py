"""A graph diff as a drawing: two columns of boxes with a bar for each node's bytes, and lines for what is read."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fxquant.debug.diff.fold import DiffRow, sides, unfolded
from fxquant.debug.report.page import DECISIONS, drawing
from fxquant.debug.report.table import megabytes, shorten, wrap

_BOX, _GAP, _LANE, _MARGIN, _LINE, _CHAR = 300, 90, 9, 14, 15, 7.3
_HIGHEST, _ALL = 160, 1600  # pixels for the bytes of the largest node, and of all together, at most
_KEY = 132
_STYLE = (
    ".wire{fill:none;stroke:$dim;stroke-width:1.2}.tie{stroke:$line;stroke-dasharray:3 3}.small{fill:$dim}"
    ".bold{font-weight:bold}"
    "polygon{fill:$dim}rect{stroke-width:1.2}.folded{stroke-dasharray:5 3}.bytes{stroke:none;opacity:.55}"
    + "".join(
        f"rect.{name}{{fill:${name}_fill;stroke:${name}}}rect.bytes.{name}{{fill:${name}}}text.{name}{{fill:${name}}}"
        for name in DECISIONS
    )
)


@dataclass
class _Box:
    """One node of one of the graphs. top, height: of the box; bar: the pixels of it that show its bytes."""

    row: DiffRow
    decision: str
    lines: list[str]
    size: str
    bar: float
    top: float = 0

    @property
    def height(self) -> float:
        return _LINE * len(self.lines) + 9 + (self.bar + 4 if self.bar else 0)

    @property
    def end(self) -> float:
        return self.top + self.height


@dataclass
class _Wire:
    """A line from a box to those further down that read it: beside the column, in a lane, with branches."""

    source: int
    ends: list[int]
    lane: int = 0


def diff_drawing(rows: Sequence[DiffRow], stages: tuple[str, str], footer: Sequence[str]) -> str:
    """Return an SVG drawing of both graphs, with repeated blocks once and a box that says how often."""
    shown = unfolded(rows)
    place = {part.name: i for i, (row, hidden) in enumerate(shown) for part in (hidden or (row,))}
    columns = [_boxes([row for row, _ in shown], side) for side in (0, 1)]
    notes = wrap("\n".join(footer), int((2 * _BOX + _GAP) / _CHAR)).split("\n")
    top = start = float(80 + _LINE * len(notes))
    for i in range(len(shown)):
        pair = [column[i] for column in columns if i in column]
        for box in pair:
            box.top = top
        top += max(box.height for box in pair) + 14
    reads = [
        {(place.get(read, -1), place[row.name]) for row in rows for read in row.inputs_before},
        {(place.get(read, -1), place[row.name]) for row in rows for read in row.inputs_after},
    ]
    straight, wires = zip(*(map(_wires, columns, reads)), strict=True)
    widths = [_MARGIN + _LANE * max([0, *(wire.lane for wire in side)]) for side in wires]
    places = widths[0], widths[0] + _BOX + _GAP
    parts = [_head(notes, start, zip(places, stages, strict=True))]
    for i in columns[0].keys() & columns[1].keys():
        parts.append(f'<path class="wire tie" d="M{places[0] + _BOX} {columns[0][i].top + 12:g}h{_GAP}"/>')
    for x, column, pairs, beside, way in zip(places, columns, straight, wires, (-1, 1), strict=True):
        parts += [_down(x + _BOX / 2, column[a].end, column[b].top) for a, b in pairs]
        parts += [_around(wire, column, x if way < 0 else x + _BOX, way) for wire in beside]
        parts += [_draw(box, x) for box in column.values()]
    width = places[1] + _BOX + widths[1]
    return drawing(f"Graph diff: {stages[0]} → {stages[1]}", width, top + 4, "\n".join(parts), _STYLE)


def _boxes(rows: Sequence[DiffRow], side: int) -> dict[int, _Box]:
    """Return the boxes of one graph by the numbers of their lines."""
    single = [max(row.bytes_before, row.bytes_after) for row in rows if not _is_folded(row)]
    scale = min(_HIGHEST / max([1, *single]), _ALL / max(1, sum(single)))
    boxes = {}
    for i, row in enumerate(rows):
        if row.sign == "+-"[side]:  # only the other graph has it
            continue
        count = row.bytes_after if side else row.bytes_before
        decision = row.decision if side or row.sign == "-" else "same"
        sign = "×" if _is_folded(row) else DECISIONS[decision]
        bar = 0.0 if _is_folded(row) or not count else max(count * scale, 1.0)
        lines = [f"{sign} {row.name}".strip(), *(text for text, _ in sides(row)[side])]
        boxes[i] = _Box(row, decision, lines, megabytes(count) if count else "", bar)
    return boxes


def _is_folded(row: DiffRow) -> bool:
    return row.sign == "×" or (row.sign == " " and bool(row.after))


def _wires(column: dict[int, _Box], reads: Iterable[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[_Wire]]:
    """Return the wires straight down to the next box, and those around others, each in a lane that is free there."""
    order = {number: i for i, number in enumerate(column)}
    straight: list[tuple[int, int]] = []
    around: dict[int, _Wire] = {}
    for a, b in sorted(reads):
        if a not in order or b not in order or a >= b:
            continue
        if order[b] == order[a] + 1:
            straight.append((a, b))
        else:
            around.setdefault(a, _Wire(a, [])).ends.append(b)
    free: list[int] = []  # for each lane, the number of the box where its last wire ends
    for wire in around.values():
        lane = next((i for i, end in enumerate(free) if end <= wire.source), len(free))
        free[lane : lane + 1] = [max(wire.ends)]
        wire.lane = lane + 1
    return straight, list(around.values())


def _down(x: float, start: float, end: float) -> str:
    """Return an arrow straight down."""
    head = f"{x:g},{end:g} {x - 4:g},{end - 6:g} {x + 4:g},{end - 6:g}"
    return f'<path class="wire" d="M{x:g} {start:g}V{end:g}"/><polygon points="{head}"/>'


def _around(wire: _Wire, column: dict[int, _Box], edge: float, way: int) -> str:
    """Return the line from a box around others, with an arrow to each that reads it. way: -1 on the left, 1 right."""
    out, begin = edge + way * _LANE * wire.lane, column[wire.source].end - 6
    ends = [column[end].top + 9 for end in wire.ends]
    path = f"M{edge:g} {begin:g}H{out:g}V{max(ends):g}" + "".join(f"M{out:g} {y:g}H{edge:g}" for y in ends)
    tip = edge + 6 * way
    heads = "".join(f'<polygon points="{edge:g},{y:g} {tip:g},{y - 4:g} {tip:g},{y + 4:g}"/>' for y in ends)
    return f'<path class="wire" d="{path}"/>{heads}'


def _draw(box: _Box, x: float) -> str:
    """Return a box with its texts, shortened to fit, and a title with the whole of them."""
    fold, css = " folded" if _is_folded(box.row) else "", "small" if box.decision == "same" else box.decision
    parts = [
        f"<g><title>{html.escape(chr(10).join([*box.lines, box.size]).strip())}</title>"
        f'<rect class="{box.decision}{fold}" x="{x:g}" y="{box.top:g}" width="{_BOX}" height="{box.height:g}" rx="4"/>'
        f'<text class="{css}" text-anchor="end" x="{x + _BOX - 8:g}" y="{box.top + 15:g}">{box.size}</text>'
    ]
    for i, line in enumerate(box.lines):
        room = int((_BOX - 16) / _CHAR) - (0 if i else len(box.size) + 2)
        text = html.escape(shorten(line, room))
        style = f"bold {box.decision}" if i == 0 else css
        parts.append(f'<text class="{style}" x="{x + 8:g}" y="{box.top + 15 + _LINE * i:g}">{text}</text>')
    if box.bar:
        place = f'x="{x + 4:g}" y="{box.end - box.bar - 4:g}" width="{_BOX - 8}" height="{box.bar:g}"'
        parts.append(f'<rect class="bytes {box.decision}" {place}/>')
    return "".join([*parts, "</g>"])


def _head(notes: Sequence[str], start: float, titles: Iterable[tuple[float, str]]) -> str:
    """Return the totals, the key to the colours, and the columns' titles above where the boxes start."""
    parts = [f'<text x="{_MARGIN}" y="{22 + _LINE * i}">{html.escape(line)}</text>' for i, line in enumerate(notes)]
    for i, name in enumerate(name for name, sign in DECISIONS.items() if sign):
        x, key = _MARGIN + _KEY * i, "stays float" if name == "float" else name
        parts.append(f'<rect class="{name}" x="{x}" y="{start - 59:g}" width="14" height="14"/>')
        parts.append(f'<text x="{x + 20}" y="{start - 47:g}">{DECISIONS[name]} {key}</text>')
    parts += [f'<text class="bold" x="{x:g}" y="{start - 14:g}">{html.escape(stage)}</text>' for x, stage in titles]
    return "".join(parts)
