"""Where a site comes out larger or slower than float: its bytes are exact, its speed is looked up among measurements.

The measurements are in speed.json, which names the one machine and the command that they are from: float torch and
fxquant in turns, over rows and sizes (`benchmarks/speed_table.py`).
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fxquant.debug.report.table import megabytes, shorten
from fxquant.graph.record import Site
from fxquant.operators import RENAMED
from fxquant.qconfig import QConfig

_SLOWER_BELOW = 0.95
"""The ratio of float's time to ours under which a site is called slower; nearer to 1 is the noise of measuring."""

_SLOWER_BY_US = 1.0
"""The least time worth a line: below is a Python call's overhead, whatever it computes."""


@dataclass(frozen=True)
class Regression:
    """What one site costs more than float. kind: "larger" or "slower"; quantized, unquantized: bytes, or microseconds.

    what: of what the two figures are; opt_out: the mapping entry that would leave the site float; source: where they
    were measured, "" for bytes, which are exact.
    """

    path: str
    kind: str
    quantized: float
    unquantized: float
    what: str
    opt_out: str
    source: str = ""

    def __str__(self) -> str:
        if self.kind == "larger":
            figures = f"{megabytes(int(self.quantized))} instead of {megabytes(int(self.unquantized))}"
        else:
            figures = f"about {self.quantized:.3g} us instead of {self.unquantized:.3g} us"
        where = shorten(self.path or "the model", 24)
        return f"{self.kind} than float: {where}, {figures} for {self.what};\n    {self.opt_out} leaves it float"


@dataclass(frozen=True)
class Speed:
    """What one call took, in microseconds, for an input of so many rows and a layer of size inputs → size outputs."""

    rows: int
    size: int
    quantized_us: float
    float_us: float

    @property
    def is_slower(self) -> bool:
        """Whether float is faster by more than noise and a call's overhead."""
        return self.float_us / self.quantized_us < _SLOWER_BELOW and self.quantized_us - self.float_us > _SLOWER_BY_US


@dataclass(frozen=True)
class SpeedTable:
    """Measured speeds by the operator's name and the weights' dtype. source: the machine, kernels and date of them."""

    source: str
    speeds: dict[tuple[str, str], tuple[Speed, ...]]

    def find(self, operator: str, qconfig: QConfig, shape: tuple[int, ...]) -> Speed | None:
        """Return what was measured at the nearest lower rows and size, or at the least; None where nothing was.

        shape: rows, inputs, outputs. The size is their geometric mean, which a square layer of as many weights has.
        """
        name = RENAMED.get(operator, operator)
        measured = () if qconfig.parts else self.speeds.get((name, qconfig.weight.dtype), ())
        if not measured or not shape:
            return None
        rows, inputs, outputs = shape
        for key, wanted in (("size", math.sqrt(inputs * outputs)), ("rows", rows)):
            known = {getattr(speed, key) for speed in measured}
            nearest = max((value for value in known if value <= wanted), default=min(known))
            measured = tuple(speed for speed in measured if getattr(speed, key) == nearest)
        return measured[0]


@functools.cache
def speed_table() -> SpeedTable:
    """Return the measurements that come with the package."""
    plain = json.loads(resources.files("fxquant.debug").joinpath("speed.json").read_text(encoding="utf-8"))
    speeds: dict[tuple[str, str], tuple[Speed, ...]] = {}
    for name, sides in plain["rows"].items():
        operator, dtype, shape = name.split()
        rows, size = shape.split("x")
        speed = Speed(int(rows), int(size), sides["fxquant"], sides["float"])
        speeds[operator, dtype] = (*speeds.get((operator, dtype), ()), speed)
    machine = plain["machine"]
    source = f"{machine['cpu']}, {machine['date'][:10]}, where {machine['kernel']}"
    return SpeedTable(source, speeds)


def regressions_of(site: Site) -> tuple[Regression, ...]:
    """Return what a converted site costs more than float: bytes, and time where its shape is known."""
    found = []
    if site.int_bytes > site.float_bytes:
        found.append(Regression(site.path, "larger", site.int_bytes, site.float_bytes, "its tensors", site.opt_out))
    table = speed_table()
    speed = table.find(site.operator, site.qconfig, site.shape)
    if speed is not None and speed.is_slower:
        what = f"{speed.rows} rows of {speed.size} → {speed.size}"
        found.append(
            Regression(site.path, "slower", speed.quantized_us, speed.float_us, what, site.opt_out, table.source)
        )
    return tuple(found)


def __getattr__(name: str) -> Any:
    """Return Regression by the name that it had, with a DeprecationWarning."""
    if name != "Loss":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("fxquant.debug.regressions.Loss is now Regression", DeprecationWarning, stacklevel=2)
    return Regression
