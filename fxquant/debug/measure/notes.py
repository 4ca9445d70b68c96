"""Measured values, kept in a file as they come, so that an interrupted run can go on where it stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fxquant.debug.measure.trial import Trial
from fxquant.debug.report.table import site_name
from fxquant.errors import ArgumentError, CheckpointError


class Notes:
    """Values by the names of what was measured, in memory and, if a path is given, in a file.

    The file's first line describes the run: the sites, their qconfigs, and `Trial.ends`, by which model, metric and
    data are recognized. Each further line holds one name and its values, so a crash loses one line at most.
    """

    def __init__(self, path: str | os.PathLike[str] | None, trial: Trial) -> None:
        self._path = None if path is None else Path(path)
        self._values: dict[str, tuple[float, ...]] = {}
        if self._path is not None:
            self._open(self._path, str(path), trial)

    def ask(self, key: str, measure: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
        """Return the values kept under a name, or measure and keep them."""
        if key not in self._values:
            self._values[key] = measure()
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, self._values[key]]) + "\n")
        return self._values[key]

    def _open(self, path: Path, name: str, trial: Trial) -> None:
        """Begin a file, or read the values of an earlier run. Raises CheckpointError if that was another run."""
        sites = [f"{site_name(site)}, {site.float_bytes} bytes: {site.qconfig}" for site in trial.record.sites]
        about = {"sites": sites, "batches": len(trial.batches), "ends": (ends := trial.ends())}
        if not trial.is_default:
            self._values = {"float": (ends[0],), "quantized": (ends[1],)}
        try:
            if not path.exists():
                path.write_text(json.dumps(about) + "\n", encoding="utf-8")
                return
        except OSError as error:
            raise ArgumentError(
                f"resume={name!r} cannot be written: {error.strerror}; give a file in a folder that exists"
            ) from error
        whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
        try:
            kept, *values = map(json.loads, whole.split("\n"))
            if set(kept) != set(about):
                raise ValueError
            kept["ends"] = list(map(float, kept["ends"]))
            self._values.update((str(key), tuple(map(float, numbers))) for key, numbers in values)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is not a file that sensitivity wrote; remove it to start afresh") from error
        _check_run(path, kept, about, trial.is_default)
        if torn:
            path.write_text(whole + "\n", encoding="utf-8")


def _check_run(path: Path, kept: dict[str, Any], about: dict[str, Any], is_default: bool) -> None:
    """Raise CheckpointError unless a file's first line describes this run."""
    if {**kept, "ends": 0} != {**about, "ends": 0}:
        raise CheckpointError(f"{path} was kept for another model, mapping or data; remove it to start afresh")
    old, new = kept["ends"], about["ends"]
    if len(old) != len(new) or not all(map(_is_same, old, new)):
        what = "Σ y² of each batch's float output" if is_default else "the metric, float and quantized,"
        raise CheckpointError(
            f"{path} was kept for another metric, data or weights: {what} was {_listed(old)}, now it is "
            f"{_listed(new)}; remove it to start afresh"
        )


def _is_same(old: float, new: float) -> bool:
    """Return whether two measured values are equal up to float rounding, as after a change of the thread count."""
    return math.isclose(old, new, rel_tol=1e-4, abs_tol=1e-9) or (math.isnan(old) and math.isnan(new))


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values[:3]) + (", …" if len(values) > 3 else "")
