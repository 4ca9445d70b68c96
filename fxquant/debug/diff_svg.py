"""A graph diff as a drawing: two columns of boxes, each as high as its node has bytes, and lines for what is read."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fxquant.debug.diff_view import DiffRow, sides, unfolded
from fxquant.debug.page import DECISIONS, drawing
from fxquant.debug.table import megabytes, shorten

_BOX, _GAP, _LANE, _MARGIN, _LINE, _CHAR = 300, 90, 9, 14, 15, 7.3
_HIGHEST, _ALL = 160, 1600  # pixels that the largest node's bytes may take, and all of them together
_KEY, _TOP = 132, 92
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
    """One node of one of the graphs. top, height: of the box; bar: pixels of it for its bytes."""

    row: DiffRow
    side: int
    lines: list[str]
    bar: float
    top: float = 0

    @property
    def height(self) -> float:
        return _LINE * len(self.lines) + 9 + (self.bar + 4 if self.bar else 0)

    @property
    def end(self) -> float:
        return self.top + self.height


def diff_drawing(rows: Sequence[DiffRow], stages: tuple[str, str], footer: Sequence[str]) -> str:
    """Return an SVG drawing of both graphs; repeated blocks are one, with a box that says how often."""
    shown = unfolded(rows)
    place = {part.name: i for i, (row, hidden) in enumerate(shown) for part in (hidden or (row,))}
    columns = [_boxes([row for row, _ in shown], side) for side in (0, 1)]
    top = float(_TOP)
    for i in range(len(shown)):
        pair = [column[i] for column in columns if i in column]
        for box in pair:
            box.top = top
        top += max(box.height for box in pair) + 14
    lanes, wires = [], []
    for side, column in enumerate(columns):
        pairs = {
            (place[read], place[row.name])
            for row in rows
            for read in (row.inputs_before, row.inputs_after)[side]
            if place.get(read, -1) in column and place[row.name] in column and place[read] < place[row.name]
        }
        count, drawn = _wires(column, sorted(pairs))
        lanes.append(_MARGIN + _LANE * count)
        wires.append(drawn)
    left, right = lanes[0], lanes[0] + _BOX + _GAP
    width = right + _BOX + lanes[1]
    parts = [_head(stages, footer, left, right, width)]
    for side, (column, x) in enumerate(zip(columns, (left, right), strict=True)):
        edge, way = (x, -1) if side == 0 else (x + _BOX, 1)
        parts += [_wire(column[a], column[b], lane, x, edge, way) for a, b, lane in wires[side]]
    for i in range(len(shown)):
        if i in columns[0] and i in columns[1]:
            y = columns[0][i].top + 12
            parts.append(f'<path class="wire tie" d="M{left + _BOX} {y:g}H{right}"/>')
    parts += [_draw(box, x) for column, x in zip(columns, (left, right), strict=True) for box in column.values()]
    return drawing(f"Graph diff: {stages[0]} → {stages[1]}", width, top + 10, "\n".join(parts), _STYLE)


def _boxes(rows: Sequence[DiffRow], side: int) -> dict[int, _Box]:
    """Return the boxes of one graph by their rows' numbers."""
    counts = [count for row in rows for count in (row.bytes_before, row.bytes_after)]
    scale = min(_HIGHEST / max([1, *counts]), _ALL / max(1, sum(max(r.bytes_before, r.bytes_after) for r in rows)))
    boxes = {}
    for i, row in enumerate(rows):
        told = [text for text, _ in sides(row)[side] if text]
        if row.sign == "-+"[1 - side] or (row.sign == "-" and side == 1):
            continue
        count = row.bytes_after if side else row.bytes_before
        size = f" {megabytes(count)}" if count else ""
        told[:1] = [told[0] + size] if told else [size]
        name = f"{DECISIONS[row.decision] if side or row.sign == '-' else ''} {row.name}".strip()
        bar = (
            0.0 if _is_folded(row) else count * scale
        )  # its bytes are those of the boxes that it repeats, and many more
        boxes[i] = _Box(row, side, [name, *told], max(bar, 1.0) if bar else 0.0)
    return boxes


def _is_folded(row: DiffRow) -> bool:
    return row.sign == "×" or (row.sign == " " and bool(row.after))


def _wires(column: dict[int, _Box], pairs: Iterable[tuple[int, int]]) -> tuple[int, list[tuple[int, int, int]]]:
    """Return how many lanes there are beside a column, and each wire with its lane: 0 straight down to the next box."""
    order = {number: i for i, number in enumerate(column)}
    free: list[int] = []  # by lane, the row where its last wire ends
    wires = []
    for a, b in sorted(pairs, key=lambda pair: (pair[0], pair[1] - pair[0])):
        if order[b] == order[a] + 1:
            wires.append((a, b, 0))
            continue
        lane = next((i for i, end in enumerate(free) if end <= a), len(free))
        free[lane : lane + 1] = [b]
        wires.append((a, b, lane + 1))
    return len(free), wires


def _wire(a: _Box, b: _Box, lane: int, x: float, edge: float, way: int) -> str:
    """Return the line from a box to one that reads it, straight down or around those between by its lane."""
    if lane == 0:
        middle = x + _BOX / 2
        return f'<path class="wire" d="M{middle:g} {a.end:g}V{b.top:g}"/>{_arrow(middle, b.top, 0)}'
    out, begin, end = edge + way * _LANE * lane, a.end - 6, b.top + 8
    return f'<path class="wire" d="M{edge:g} {begin:g}H{out:g}V{end:g}H{edge:g}"/>{_arrow(edge, end, -way)}'


def _arrow(x: float, y: float, way: int) -> str:
    """Return an arrow's head that ends at a point: downward, or to the left (-1) or right (1)."""
    back = x - 6 * way
    points = f"{x:g},{y:g} {x - 4:g},{y - 6:g} {x + 4:g},{y - 6:g}"
    return f'<polygon points="{points if way == 0 else f"{x:g},{y:g} {back:g},{y - 4:g} {back:g},{y + 4:g}"}"/>'


def _draw(box: _Box, x: float) -> str:
    """Return a box with its texts, and a title that has them whole."""
    row = box.row
    decision = row.decision if box.side or row.sign == "-" else "same"
    fold = " folded" if _is_folded(row) else ""
    title = html.escape("\n".join(box.lines))
    parts = [f"<g><title>{title}</title>"]
    parts.append(
        f'<rect class="{decision}{fold}" x="{x:g}" y="{box.top:g}" width="{_BOX}" height="{box.height:g}" rx="4"/>'
    )
    for i, line in enumerate(box.lines):
        css = f"bold {decision}" if i == 0 else "small" if decision == "same" else decision
        text = html.escape(shorten(line, int((_BOX - 16) / _CHAR)))
        parts.append(f'<text class="{css}" x="{x + 8:g}" y="{box.top + 15 + _LINE * i:g}">{text}</text>')
    if box.bar:
        y = box.end - box.bar - 4
        parts.append(
            f'<rect class="bytes {decision}" x="{x + 4:g}" y="{y:g}" width="{_BOX - 8}" height="{box.bar:g}"/>'
        )
    return "".join([*parts, "</g>"])


def _head(stages: tuple[str, str], footer: Sequence[str], left: float, right: float, width: float) -> str:
    """Return the total, the key to the colours, and the columns' titles."""
    lines = shorten("; ".join(footer), int((width - 28) / _CHAR))
    parts = [f'<text x="{_MARGIN}" y="22">{html.escape(lines)}</text>']
    for i, (name, sign) in enumerate((n, s) for n, s in DECISIONS.items() if s):
        left_of, told = _MARGIN + _KEY * i, "stays float" if name == "float" else name
        parts.append(f'<rect class="{name}" x="{left_of}" y="34" width="14" height="14"/>')
        parts.append(f'<text x="{left_of + 20}" y="46">{sign} {told}</text>')
    for x, stage in ((left, stages[0]), (right, stages[1])):
        parts.append(f'<text class="bold" x="{x:g}" y="{_TOP - 14}">{html.escape(stage)} graph</text>')
    return "".join(parts)
