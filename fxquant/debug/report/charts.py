"""Bar charts as SVG, drawn without a package."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fxquant.debug.report.page import drawing
from fxquant.debug.report.table import shorten

_WIDTH, _LABEL, _VALUE, _BAR, _ROW, _TOP = 720, 230, 76, 12, 36, 56
_STYLE = ".first{fill:$focus}.second{fill:$changed_fill;stroke:$changed;stroke-width:1.5}.dim,.axis{fill:$dim}"


@dataclass(frozen=True)
class Bar:
    """Two values of one thing. A NaN is unknown; infinity fills the chart."""

    name: str
    first: float
    second: float


def bar_chart(title: str, series: tuple[str, str], bars: Sequence[Bar], text: Callable[[float], str]) -> str:
    """Return a drawing with two bars for each thing, one filled, one framed. text: gives a value's label."""
    values = [value for bar in bars for value in (bar.first, bar.second) if math.isfinite(value)]
    room, top = _WIDTH - _LABEL - _VALUE, max([1.0, *values])
    parts = [f'<text x="12" y="20" font-weight="bold">{html.escape(title)}</text>']
    for i, (name, css) in enumerate(zip(series, ("first", "second"), strict=True)):
        x = _LABEL + 130 * i
        parts.append(f'<rect class="{css}" x="{x}" y="30" width="{_BAR}" height="{_BAR}"/>')
        parts.append(f'<text x="{x + 18}" y="40">{html.escape(name)}</text>')
    for i, bar in enumerate(bars):
        y = _TOP + _ROW * i
        label = html.escape(shorten(bar.name, 29))
        parts.append(f"<g><title>{html.escape(f'{bar.name}: {text(bar.first)}, {text(bar.second)}')}</title>")
        parts.append(f'<text x="{_LABEL - 10}" y="{y + 17}" text-anchor="end">{label}</text>')
        for j, (value, css) in enumerate(((bar.first, "first"), (bar.second, "second"))):
            width = 0.0 if math.isnan(value) else room * min(max(value, 0.0), top) / top
            line = y + (_BAR + 2) * j
            parts.append(f'<rect class="{css}" x="{_LABEL}" y="{line}" width="{width:.1f}" height="{_BAR}"/>')
            label_text = html.escape(text(value) or "never called")
            parts.append(f'<text class="dim" x="{_LABEL + width + 6:.1f}" y="{line + 10}">{label_text}</text>')
        parts.append("</g>")
    return drawing(title, _WIDTH, _TOP + _ROW * len(bars) + 8, "\n".join(parts), _STYLE)
