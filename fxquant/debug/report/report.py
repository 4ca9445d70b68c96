"""What the views that are tables of rows share: printing, sorting, and handing the rows on."""

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
    """One column of a printed table. field: the row's attribute that it is sorted by; cell: a row's text.

    is_number: whether it is set flush right; is_name: whether a terminal shows of a long one the end alone.
    """

    header: str
    field: str
    width: int
    cell: Callable[[Any], str]
    is_number: bool = True
    is_name: bool = False


class Report:
    """Rows that print as a table, in a terminal and in a notebook. A dataclass of `rows`, and what its footer says."""

    title: ClassVar[str] = ""
    columns: ClassVar[tuple[Column, ...]]
    rows: tuple[Any, ...]

    @property
    def footer(self) -> tuple[str, ...]:
        """The lines under the table."""
        return ()

    def _shown(self) -> tuple[list[Column], list[tuple[str, ...]]]:
        """Return the columns in which some row has something to say, and their cells."""
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
        """Return the same with its rows sorted by a column, named as in the table or by the rows' attribute.

        Numbers come largest first, decibels smallest first (the worst), text from a to z; what has no value comes last.
        Raises ColumnError for a name that is neither.
        """
        found = next((c for c in self.columns if column in (c.header, c.field)), None)
        field = column if found is None else found.field
        if self.rows and not hasattr(self.rows[0], field):
            known = [name for c in self.columns for name in (c.header, c.field)] + list(asdict(self.rows[0]))
            raise ColumnError(f"{type(self).__name__} has no column {column!r}{nearest(column, known)}")
        empty = [row for row in self.rows if getattr(row, field) != getattr(row, field)]  # a NaN
        filled = [row for row in self.rows if getattr(row, field) == getattr(row, field)]
        is_rising = field.endswith("_db") or any(isinstance(getattr(row, field), str) for row in filled)
        filled.sort(key=operator.attrgetter(field), reverse=is_rising == reverse)
        return replace(self, rows=(*filled, *empty))  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain dicts, tuples, strings and numbers, as json.dumps takes them."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def to_json(self) -> str:
        """Return to_dict as JSON in the strict sense: a NaN is null, infinities are "Infinity" and "-Infinity".

        Those two words are what float() and JavaScript's Number() read.
        """
        return json.dumps(_strict(self.to_dict()), ensure_ascii=False, allow_nan=False)

    def figure(self) -> str:
        """Return the SVG drawing that goes with the table on its page, or ""."""
        return ""

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the table as an HTML page that stands alone, sorted by a click; write it where a path is given."""
        columns, cells = self._shown()
        values = [[_sort_value(getattr(row, column.field)) for column in columns] for row in self.rows]
        rows = [list(zip(texts, keys, strict=True)) for texts, keys in zip(cells, values, strict=True)]
        headers = [(column.header, column.is_number) for column in columns]
        return write(path, table_page(self.title or type(self).__name__, headers, rows, self.footer, self.figure()))

    def to_dataframe(self) -> Any:
        """Return the rows as a pandas.DataFrame. Raises MissingPackageError where pandas is not installed."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise MissingPackageError(
                "to_dataframe needs pandas, which is not installed: pip install pandas, or take to_dict()"
            ) from error
        return pandas.DataFrame([asdict(row) for row in self.rows])


def _strict(value: Any) -> Any:
    """Return a value as strict JSON takes it."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _sort_value(value: Any) -> str:
    """Return what a page sorts a cell by, in JavaScript's words; "" for what has no value."""
    return "" if value is None or value != value else str(value).replace("inf", "Infinity")
