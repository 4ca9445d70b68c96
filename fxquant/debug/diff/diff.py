"""graph_diff: what changed between two graphs, node by node, why, and what that costs and saves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from torch import nn

from fxquant.debug.diff.fold import DiffRow, Line, fold, near_changes, sides
from fxquant.debug.diff.html import diff_page, diff_table
from fxquant.debug.diff.rows import diff_rows
from fxquant.debug.diff.svg import diff_drawing
from fxquant.debug.measure.compare import Comparison
from fxquant.debug.measure.profile import Profile
from fxquant.debug.report.page import write
from fxquant.debug.report.report import Column, Report
from fxquant.debug.report.table import decibels, megabytes, paint, printable, shorten, text_table, wants_color
from fxquant.errors import ArgumentError, ModelStateError
from fxquant.graph import edit
from fxquant.graph.record import Record, record_of

LAYOUTS = ("unified", "side_by_side")
_ANSI = {"removed": "31", "added": "32", "changed": "33", "float": "35", "dim": "2", "": ""}


def _signed(row: DiffRow) -> str:
    """Return the colour of a line's sign and name, which are coloured if the node changed."""
    return "dim" if row.sign in "⋮×" else row.decision if row.sign != " " else ""


def _before(row: DiffRow) -> list[Line]:
    return sides(row)[0]


def _after(row: DiffRow) -> list[Line]:
    now = sides(row)[1]
    return now[1:] if row.sign == " " else now  # in a unified diff, `before` already says what it is


def _named(row: DiffRow, side: int) -> list[Line]:
    """Return the lines of one of two graphs side by side, with the node's name."""
    lines = sides(row)[side]
    if row.sign in "+-" and row.sign != "-+"[side]:  # only the other graph has it
        return lines
    return [(": ".join(filter(None, [shorten(row.name, 30), text])), color) for text, color in lines[:1]] + lines[1:]


def _sizes(row: DiffRow) -> list[Line]:
    """Return the sizes as one cell; equal ones once."""
    before, after = megabytes(row.bytes_before), megabytes(row.bytes_after)
    if not row.bytes_before and not row.bytes_after:
        return []
    if row.sign in "+-" or row.bytes_before == row.bytes_after:
        return [(after if row.sign == "+" else before, "")]
    return [(before, ""), (f"→ {after}", "")]


def _size(count: int) -> list[Line]:
    return [(megabytes(count), "")] if count else []


def _milliseconds(row: DiffRow) -> list[Line]:
    now = [] if row.ms is None else [f"{row.ms:.3f}"]
    return [(text, "") for text in ([f"{row.float_ms:.3f}", f"→ {now[0]}"] if row.float_ms is not None else now)]


def _decibels(row: DiffRow) -> list[Line]:
    return [] if row.sqnr_db is None else [(decibels(row.sqnr_db), "")]


@dataclass(frozen=True)
class _Column:
    """One column: its header, its width on a terminal, and the lines of a cell."""

    header: str
    width: int
    lines: Callable[[DiffRow], list[Line]]


_SIGN = _Column("", 1, lambda row: [(row.sign, _signed(row))])
_MEASURED = (
    _Column("SQNR", 8, _decibels),
    _Column("kernel", 12, lambda row: [(row.kernel, "")]),
    _Column("ms", 9, _milliseconds),
)
_COLUMNS = {
    "unified": (
        _SIGN,
        _Column("node", 22, lambda row: [(shorten(row.name, 28), _signed(row))]),
        _Column("before", 22, _before),
        _Column("after", 30, _after),
        _Column("size", 14, _sizes),
        *_MEASURED,
    ),
    "side_by_side": (
        _Column("before", 32, lambda row: _named(row, 0)),
        _Column("size", 9, lambda row: _size(row.bytes_before)),
        _SIGN,
        _Column("after", 32, lambda row: _named(row, 1)),
        _Column("size", 9, lambda row: _size(row.bytes_after)),
        *_MEASURED,
    ),
}


@dataclass(frozen=True)
class GraphDiff(Report):
    """The difference between two graphs: print it, show it in a notebook, or iterate over its lines, one for each node.

    to_html and to_svg draw the two graphs side by side. stages: what the two are, such as "float" and "quantized";
    remark: what the diff leaves out, or "". context, is_folded, color, layout: how it is shown, as in graph_diff.
    """

    rows: tuple[DiffRow, ...]
    bytes_before: int
    bytes_after: int
    quantized: int
    candidates: int
    outcome: str = ""
    context: int | None = None
    is_folded: bool = True
    color: bool | None = None
    layout: str = "unified"
    stages: tuple[str, str] = ("before", "after")
    remark: str = ""

    title: ClassVar[str] = "Graph diff"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("node", "name", 0, lambda row: row.name),
        Column("size", "bytes_after", 0, lambda row: megabytes(row.bytes_after)),
        Column("SQNR", "sqnr_db", 0, lambda row: str(row.sqnr_db)),
    )  # to sort by; _COLUMNS says how it is shown

    @property
    def total(self) -> str:
        """The last line: bytes before and after, their ratio, and how many candidates are quantized."""
        ratio = f", {self.bytes_before / self.bytes_after:.2f}×" if self.bytes_after else ""  # packed weights count 0
        outcome = f"; {self.outcome}" if self.candidates else ""
        return f"{megabytes(self.bytes_before)} → {megabytes(self.bytes_after)}{ratio}{outcome}"

    @property
    def footer(self) -> tuple[str, ...]:
        """The lines under the table: the remark, if any, and the total."""
        return (*filter(None, [self.remark]), self.total)

    @property
    def shown(self) -> list[DiffRow]:
        """The lines that are printed."""
        rows = fold(self.rows) if self.is_folded else list(self.rows)
        return rows if self.context is None else near_changes(rows, self.context)

    def __str__(self) -> str:
        is_colored = wants_color() if self.color is None else self.color
        columns, table = self._lines()
        colors = _ANSI if is_colored else dict.fromkeys(_ANSI, "")
        cells = [["\n".join(paint(text, colors[color]) for text, color in cell) for cell in row] for row in table]
        text = text_table(cells, [column.header for column in columns], [column.width for column in columns])
        return printable("\n".join([text, "", *self.footer]))

    def _repr_html_(self) -> str:
        columns, table = self._lines()
        return diff_table([column.header for column in columns], table, self.footer)

    def _lines(self) -> tuple[list[_Column], list[list[list[Line]]]]:
        """Return the layout's columns, without measured ones that are empty, and their cells."""
        shown = self.shown
        chosen = [
            column
            for column in _COLUMNS[self.layout]
            if column not in _MEASURED or any(text for row in shown for text, _ in column.lines(row))
        ]
        return chosen, [[column.lines(row) for column in chosen] for row in shown]

    def to_dict(self) -> dict[str, Any]:
        """Return all lines, sizes and counts as plain dicts, tuples, strings and numbers, as json.dumps takes them."""
        names = ("bytes_before", "bytes_after", "quantized", "candidates", "stages", "remark")
        return {"rows": tuple(map(asdict, self.rows)), **{name: getattr(self, name) for name in names}}

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return a self-contained page: both graphs and the kernels side by side, linked and searchable.

        Every node is in it, with repeated blocks closed at first, and no weights. path: where to write it.
        """
        return write(path, diff_page(self.rows, self.stages, self.footer))

    def to_svg(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return a drawing of both graphs side by side, with a bar for each node's bytes. path: where to write it.

        Repeated blocks are always folded.
        """
        return write(path, diff_drawing(self.rows, self.stages, self.footer))


def graph_diff(
    before: nn.Module,
    after: nn.Module,
    *,
    context: int | None = None,
    only_changed: bool = False,
    fold: bool = True,
    color: bool | None = None,
    layout: str = "unified",
    errors: Comparison | None = None,
    times: Profile | None = None,
) -> GraphDiff:
    """Return what changed between two models: float, fused, prepared or quantized, or any torch.fx.GraphModule.

    A model that is not a graph is traced; if one does not trace, both are compared module by module. Nodes are matched
    by name, which fxquant's passes keep. errors, times: what `compare` and `profile` measured on these models; each
    node gets its site's SQNR (as it runs), kernel and milliseconds.

    How it is shown (`rows` always has all nodes): layout: "unified" or "side_by_side". context: show only changes, with
    so many lines around each; only_changed: context=0. fold: show a block that repeats, layer after layer, once. color:
    None for colours on a terminal, unless NO_COLOR is set; the signs say the same.
    Raises ArgumentError for an unknown layout or another kind of report, ModelStateError for a report of other models.
    """
    _check_view(layout, context)
    rows, remark = diff_rows(before, after)
    record = record_of(after) or record_of(before) or Record(stage="float")
    return GraphDiff(
        _measured(_measured(rows, "errors", errors, Comparison), "times", times, Profile),
        edit.byte_count(before),
        edit.byte_count(after),
        quantized=len(record.sites),
        candidates=len(record.sites) + len(record.skipped),
        outcome=record.outcome,
        context=0 if only_changed and context is None else context,
        is_folded=fold,
        color=color,
        layout=layout,
        stages=_stages(before, after),
        remark=remark,
    )


def _check_view(layout: str, context: Any) -> None:
    """Raise ArgumentError for an unknown layout, or a context that is not a number of lines."""
    if layout not in LAYOUTS:
        raise ArgumentError(f"graph_diff takes layout='unified' or 'side_by_side', got {layout!r}")
    if context is not None and (not isinstance(context, int) or context < 0):
        raise ArgumentError(f"graph_diff takes context=the number of lines around a change, 0 or more, got {context!r}")


def _stages(before: nn.Module, after: nn.Module) -> tuple[str, str]:
    """Return the names of the two graphs: what they are, if that differs."""
    old, new = (record.stage if (record := record_of(model)) else "float" for model in (before, after))
    return ("before", "after") if old == new else (old, new)


def _measured(rows: tuple[DiffRow, ...], name: str, report: Any, report_type: type[Report]) -> tuple[DiffRow, ...]:
    """Return the lines with what a report measured on their sites, or raise."""
    if report is None:
        return rows
    if not isinstance(report, report_type):
        maker = "compare" if report_type is Comparison else "profile"
        raise ArgumentError(f"graph_diff takes {name}=the result of {maker}, got {type(report).__name__}")
    fields = {"sqnr_db"} if report_type is Comparison else {"kernel", "ms", "float_ms"}
    known = {place: row for row in report.rows if (place := row.call or row.path)}
    sites = [known.get(row.name) or known.get(row.path) for row in rows]
    if known and not any(sites):
        raise ModelStateError(
            f"{name} is a report of other models: none of its sites ({', '.join(list(known)[:4])}, …) is in these "
            "graphs; measure the models that you compare here"
        )
    measured = [_values(site, fields) if site else {} for site in sites]
    return tuple(replace(row, **values) for row, values in zip(rows, measured, strict=True))


def _values(site: Any, fields: set[str]) -> dict[str, Any]:
    """Return some of the fields measured on a site, without those that are NaN because it was never called."""
    if not site.calls:
        return {"kernel": "never called"} if "kernel" in fields else {}
    return {field: value for field in fields if (value := getattr(site, field)) == value}
