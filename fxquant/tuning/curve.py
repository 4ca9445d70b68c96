"""The trade-off curve as an SVG of its own: no package draws it, and any browser shows it."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 400, 76, 24, 28, 56
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.axis{stroke:#999;stroke-width:1}.grid{stroke:#eee;stroke-width:1}"
    ".front{fill:none;stroke:#2563eb;stroke-width:1.5}.in{fill:#2563eb}.out{fill:#fff;stroke:#b45309;stroke-width:1.5}"
    ".limit{stroke:#b45309;stroke-width:1;stroke-dasharray:5 4}.chosen{fill:none;stroke:#111;stroke-width:2}"
    "rect{fill:#fff}.limit-text{fill:#b45309}"
)


class Dot(NamedTuple):
    """One measured model. label: shown where the pointer rests on it. is_best: no other is both smaller and better."""

    x: float
    y: float
    label: str
    is_within: bool
    is_best: bool
    is_chosen: bool


def draw_curve(dots: Sequence[Dot], limit: float, x_label: str, y_label: str) -> str:
    """Return an SVG of the dots, those outside the limit hollow, the chosen one ringed, and the limit as a line."""
    dots = [dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y)]
    limits = [limit] if math.isfinite(limit) else []
    xs, ys = _ticks([0.0, *(dot.x for dot in dots)]), _ticks([*(dot.y for dot in dots), *limits])
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - xs[0]) / (xs[-1] - xs[0]), (y - ys[0]) / (ys[-1] - ys[0])
        return round(_LEFT + across * width, 1), round(_TOP + (1 - up) * height, 1)

    bottom, right = _TOP + height, _LEFT + width
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" role="img">',
        f"<title>{html.escape(f'{y_label} against {x_label}')}</title><style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}"/>',
    ]
    for y in ys:
        row = at(xs[0], y)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{row}" x2="{right}" y2="{row}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{row + 4}" text-anchor="end">{y:.6g}</text>')
    for x in xs:
        column = at(x, ys[0])[0]
        parts.append(f'<text x="{column}" y="{bottom + 18}" text-anchor="middle">{x:.6g}</text>')
    parts.append(f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    for row in (at(xs[0], value)[1] for value in limits):
        parts.append(f'<line class="limit" x1="{_LEFT}" y1="{row}" x2="{right}" y2="{row}"/>')
        parts.append(f'<text class="limit-text" x="{right}" y="{row - 5}" text-anchor="end">budget</text>')
    parts.append(f'<text x="{_LEFT + width / 2}" y="{_HEIGHT - 14}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(f'<text x="12" y="16">{html.escape(y_label)}</text>')
    line = " ".join("{},{}".format(*at(dot.x, dot.y)) for dot in sorted(dots) if dot.is_best)
    parts.append(f'<polyline class="front" points="{line}"/>')
    for dot in dots:
        x, y = at(dot.x, dot.y)
        told = f"<title>{html.escape(dot.label)}</title>"
        parts.append(f'<circle class="{"in" if dot.is_within else "out"}" cx="{x}" cy="{y}" r="4">{told}</circle>')
        if dot.is_chosen:
            parts.append(f'<circle class="chosen" cx="{x}" cy="{y}" r="9"/>')
            parts.append(f'<text x="{x + 13}" y="{y - 8}">suggested</text>')
    return "\n".join([*parts, "</svg>\n"])


def _ticks(values: Sequence[float]) -> list[float]:
    """Return four to ten round numbers, evenly apart, that span the values."""
    least, most = min(values), max(values)
    span = most - least or abs(most) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 8)
    first = math.floor(least / step)
    count = math.ceil(most / step - 1e-9) - first
    return [round((first + i) * step, 12) for i in range(max(count, 1) + 1)]
