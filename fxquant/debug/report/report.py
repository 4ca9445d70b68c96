"""What the reports share: printing, sorting, and handing the data on."""

from __future__ import annotations

import importlib
import json
import math
import operator
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, TypeVar

from fxquant.debug.report.page import table_page, write
from fxquant.debug.report.table import html_table, printable, text_table
from fxquant.errors import ColumnError, MissingPackageError, nearest

R = TypeVar("R", bound="Report")


@dataclass(frozen=True)
class Column:
    """One column of a printed table. field: the attribute that it is sorted by; cell: gives the text for a line.

    is_number: whether it is aligned right; is_name: whether a terminal shows only the end of a long text.
    """

    header: str
    field: str
    width: int
    cell: Callable[[Any], str]
    is_number: bool = True
    is_name: bool = False


class Report:
    """A table for a terminal and a notebook: a dataclass with `rows`, one for each line, and a footer."""

    title: ClassVar[str] = ""
    columns: ClassVar[tuple[Column, ...]]
    rows: tuple[Any, ...]

    @property
    def footer(self) -> tuple[str, ...]:
        """The lines under the table."""
        return ()

    def _shown(self) -> tuple[list[Column], list[tuple[str, ...]]]:
        """Return the columns that are not empty, and the cells of each line."""
        shown = [c for c in self.columns if not self.rows or any(c.cell(row) for row in self.rows)]
        return shown, [tuple(column.cell(row) for column in shown) for row in self.rows]

    def __str__(self) -> str:
        columns, cells = self._shown()
        alignments = ["right" if column.is_number else "left" for column in columns]
        names = [i for i, column in enumerate(columns) if column.is_name]
        table = text_table(cells, [c.header for c in columns], [c.width for c in columns], alignments, names)
        return printable("\n".join([table, "", *self.footer]))

    def _repr_html_(self) -> str:
        columns, cells = self._shown()
        return html_table(cells, [column.header for column in columns], "; ".join(self.footer))

    def sort(self: R, column: str, reverse: bool = False) -> R:
        """Return the report sorted by a column, given by its header in the table or the attribute of the lines.

        Numbers come largest first, decibels smallest first (the worst), text from a to z, and missing values last.
        Raises ColumnError for an unknown name.
        """
        field = next((c.field for c in self.columns if column in (c.header, c.field)), column)
        if self.rows and not hasattr(self.rows[0], field):
            known = [name for c in self.columns for name in (c.header, c.field)] + list(asdict(self.rows[0]))
            raise ColumnError(f"{type(self).__name__} has no column {column!r}{nearest(column, known)}")
        empty = [row for row in self.rows if getattr(row, field) != getattr(row, field)]  # a NaN
        filled = [row for row in self.rows if getattr(row, field) == getattr(row, field)]
        is_rising = field.endswith("_db") or any(isinstance(getattr(row, field), str) for row in filled)
        filled.sort(key=operator.attrgetter(field), reverse=is_rising == reverse)
        return replace(self, rows=(*filled, *empty))  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, tuples, strings and numbers, as json.dumps takes them."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def to_json(self) -> str:
        """Return to_dict as strict JSON: a NaN is null, infinities are "Infinity" and "-Infinity".

        Python's float() and JavaScript's Number() read those two strings.
        """
        return json.dumps(_strict(self.to_dict()), ensure_ascii=False, allow_nan=False)

    def figure(self) -> str:
        """Return the SVG drawing for the table's page, or ""."""
        return ""

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the table as a self-contained HTML page that a click sorts. path: where to write it."""
        columns, cells = self._shown()
        values = [[_sort_value(getattr(row, column.field)) for column in columns] for row in self.rows]
        rows = [list(zip(texts, keys, strict=True)) for texts, keys in zip(cells, values, strict=True)]
        headers = [(column.header, column.is_number) for column in columns]
        return write(path, table_page(self.title or type(self).__name__, headers, rows, self.footer, self.figure()))

    def to_dataframe(self) -> Any:
        """Return the lines as a pandas.DataFrame. Raises MissingPackageError if pandas is not installed."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise MissingPackageError(
                "to_dataframe needs pandas, which is not installed: pip install pandas, or use to_dict()"
            ) from error
        return pandas.DataFrame([asdict(row) for row in self.rows])


def _strict(value: Any) -> Any:
    """Return a value that strict JSON can hold."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _sort_value(value: Any) -> str:
    """Return what a page sorts a cell by, as JavaScript reads it; "" for a missing value."""
    return "" if value is None or value != value else str(value).replace("inf", "Infinity")
