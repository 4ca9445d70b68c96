"""The trade-off curve as an SVG, drawn without a package."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 640, 400
_LEFT, _END, _TOP, _FLOOR = 76, 616, 28, 344  # of the plot, in pixels
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.axis{stroke:#999;stroke-width:1}.grid{stroke:#eee;stroke-width:1}"
    ".front{fill:none;stroke:#2563eb;stroke-width:1.5}.in{fill:#2563eb}.out{fill:#fff;stroke:#b45309;stroke-width:1.5}"
    ".limit{stroke:#b45309;stroke-width:1;stroke-dasharray:5 4}.chosen{fill:none;stroke:#111;stroke-width:2}"
    "rect{fill:#fff}.limit-text{fill:#b45309}"
)


class Dot(NamedTuple):
    """One measured model. label: shown under the pointer. is_best: whether no other is both smaller and better."""

    x: float
    y: float
    label: str
    is_within: bool
    is_best: bool
    is_chosen: bool


class _Axes(NamedTuple):
    """The ticks of both axes, which span the values."""

    xs: list[float]
    ys: list[float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return where a value is drawn, in pixels."""
        across, up = (x - self.xs[0]) / (self.xs[-1] - self.xs[0]), (y - self.ys[0]) / (self.ys[-1] - self.ys[0])
        return round(_LEFT + across * (_END - _LEFT), 1), round(_TOP + (1 - up) * (_FLOOR - _TOP), 1)


def draw_curve(dots: Sequence[Dot], limit: float, x_label: str, y_label: str) -> str:
    """Return an SVG of the dots (hollow outside the limit, the chosen one ringed) and the limit as a line."""
    dots = [dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y)]
    limits = [limit] if math.isfinite(limit) else []
    axes = _Axes(_ticks([0.0, *(dot.x for dot in dots)]), _ticks([*(dot.y for dot in dots), *limits]))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" role="img">',
        f"<title>{html.escape(f'{y_label} against {x_label}')}</title><style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}"/>',
        *_grid(axes),
    ]
    for height in (axes.at(axes.xs[0], value)[1] for value in limits):
        parts.append(f'<line class="limit" x1="{_LEFT}" y1="{height}" x2="{_END}" y2="{height}"/>')
        parts.append(f'<text class="limit-text" x="{_END}" y="{height - 5}" text-anchor="end">budget</text>')
    middle = _LEFT + (_END - _LEFT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 14}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(f'<text x="12" y="16">{html.escape(y_label)}</text>')
    line = " ".join("{},{}".format(*axes.at(dot.x, dot.y)) for dot in sorted(dots) if dot.is_best)
    parts.append(f'<polyline class="front" points="{line}"/>')
    return "\n".join([*parts, *(part for dot in dots for part in _draw(dot, *axes.at(dot.x, dot.y))), "</svg>\n"])


def _grid(axes: _Axes) -> Iterator[str]:
    """Yield the axes, and a line and a number for each tick."""
    for y in axes.ys:
        height = axes.at(axes.xs[0], y)[1]
        yield f'<line class="grid" x1="{_LEFT}" y1="{height}" x2="{_END}" y2="{height}"/>'
        yield f'<text x="{_LEFT - 8}" y="{height + 4}" text-anchor="end">{y:.6g}</text>'
    for x in axes.xs:
        yield f'<text x="{axes.at(x, axes.ys[0])[0]}" y="{_FLOOR + 18}" text-anchor="middle">{x:.6g}</text>'
    yield f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{_FLOOR}H{_END}"/>'


def _draw(dot: Dot, x: float, y: float) -> Iterator[str]:
    title = f"<title>{html.escape(dot.label)}</title>"
    yield f'<circle class="{"in" if dot.is_within else "out"}" cx="{x}" cy="{y}" r="4">{title}</circle>'
    if dot.is_chosen:
        yield f'<circle class="chosen" cx="{x}" cy="{y}" r="9"/>'
        yield f'<text x="{x + 13}" y="{y - 8}">suggested</text>'


def _ticks(values: Sequence[float]) -> list[float]:
    """Return four to ten evenly spaced round numbers that span the values."""
    least, most = min(values), max(values)
    span = most - least or abs(most) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 8)
    first = math.floor(least / step)
    count = math.ceil(most / step - 1e-9) - first
    return [round((first + i) * step, 12) for i in range(max(count, 1) + 1)]
