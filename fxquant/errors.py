"""The errors and warnings of fxquant: every one says what, where, what was received and what to do."""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import sys
import warnings
from collections.abc import Iterable, Iterator


class FxQuantError(Exception):
    """Base of every error that fxquant raises for a user's mistake."""


class TraceError(FxQuantError):
    """The model could not be traced into a graph."""


class ModelStateError(FxQuantError):
    """The model is not in the state that the call needs (training mode, not prepared, already converted)."""


class ExampleInputsError(FxQuantError):
    """The example inputs do not fit the model."""


class ArgumentError(FxQuantError, TypeError):
    """A call has an argument that it does not take, or a value of it that the model was not prepared for."""


class QConfigError(FxQuantError):
    """A qconfig or a QConfigMapping says something that cannot be done."""


class MappingNameError(QConfigError):
    """A QConfigMapping entry matches nothing in the model."""


class AttributeNameError(FxQuantError, AttributeError):
    """preserved_attributes names something that the model does not have."""


class CalibrationError(FxQuantError):
    """A static model was converted before values were seen that its scales are found from."""


class DivergedError(FxQuantError, ArithmeticError):
    """A value of a model in quantization-aware training became NaN or infinite."""


class CheckError(FxQuantError):
    """The quantized model fails on the example inputs, on which the float one runs."""


class FixedAttributeError(FxQuantError, AttributeError):
    """An attribute was set that forward read as a constant when it was traced, so that a graph cannot obey."""


class ShapeError(FxQuantError, ValueError):
    """A tensor's shape does not fit a quantized module."""


class DTypeError(FxQuantError, TypeError):
    """A tensor's dtype cannot be taken by a quantized module."""


class ReadOnlyError(FxQuantError, RuntimeError):
    """The float weight of a quantized module was written to, or made a parameter."""


class IndexRangeError(FxQuantError, IndexError):
    """An index lies outside of a quantized table."""


class ColumnError(FxQuantError, LookupError):
    """A report has no such column."""


class MissingPackageError(FxQuantError, ImportError):
    """An optional package is needed and not installed."""


class CheckpointError(FxQuantError):
    """A checkpoint is damaged, foreign, newer than this version, or made for another model."""


class ExportError(FxQuantError):
    """A quantized model has something that the file to be written cannot express."""


class TorchAoError(FxQuantError):
    """A model of torch.ao cannot be converted: it is not dynamically quantized, another model's, or unreadable here."""


class MovedNameError(FxQuantError, AttributeError):
    """A name of torch.ao's that fxquant does not have; the message says what replaces it."""


class MovedImportError(FxQuantError, ImportError):
    """The same, for `from fxquant import name`: Python would hide the message of an AttributeError there."""


_SAID: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("fxquant_said", default=None)


@contextlib.contextmanager
def each_warning_once() -> Iterator[None]:
    """Warn once of each thing in one call of the user's, however often it prepares the model inside."""
    if _SAID.get() is not None:
        yield
        return
    token = _SAID.set(set())
    try:
        yield
    finally:
        _SAID.reset(token)


def warn(message: str, past: tuple[str, ...] = ("fxquant",), category: type[Warning] = UserWarning) -> None:
    """Warn at the user's line: the first that is not fxquant's. past: the packages whose lines are not the user's."""
    said = _SAID.get()
    if said is not None:
        if message in said:
            return
        said.add(message)
    frame, level = sys._getframe(1), 2
    past = (*past, "contextlib")  # which stands between where each_warning_once decorates
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in past:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return "; did you mean 'a' or 'b'?", or what there is to choose from, to end an error message with."""
    known = sorted(set(candidates))
    close = difflib.get_close_matches(word, known, n=count, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(name) for name in close) + "?"
    if not known:
        return "; there is none"
    more = f", … ({len(known)} in all)" if len(known) > 8 else ""
    return "; there are " + ", ".join(repr(name) for name in known[:8]) + more
