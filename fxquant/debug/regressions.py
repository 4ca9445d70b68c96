"""Where a site comes out larger or slower than float: its bytes are exact, its speed is looked up among measurements.

The measurements are in speed.json, by instruction set, each with the machine and the command that they are from: float
torch and fxquant in turns, over numbers of tokens and sizes (`benchmarks/speed_table.py`).
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from fxquant.debug.report.table import megabytes, shorten
from fxquant.graph.record import Site
from fxquant.operators import RENAMED
from fxquant.ops import kernel_info
from fxquant.qconfig import QConfig

_SLOWER_BELOW = 0.95
"""The ratio of float's time to ours under which a site is called slower; nearer to 1 is the noise of measuring."""

_SLOWER_BY_US = 1.0
"""The least time worth a line: below is a Python call's overhead, whatever it computes."""

_MEASURED_AS = {"nn.RNNCell": "rnn_cell", "torch.einsum": "linear"}
"""The measurements that stand for a kind of layer or call, where they are not the operator's, or those of calls."""

_CALLS = {"linear": "matmul"}
"""The measurements that stand for an operator's calls of functions."""

ISAS = ("amx", "avx512_vnni", "avx_vnni", "avx2", "neon_dot", "portable")
"""The instruction sets from the fastest to the slowest."""


@dataclass(frozen=True)
class Regression:
    """What one site costs more than float. kind: "larger" or "slower"; quantized, unquantized: bytes, or microseconds.

    what: what the two figures are of; opt_out: the mapping entry that would leave the site float; source: where they
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
    """What one call took, in microseconds, for so many tokens and a layer of size inputs → size outputs."""

    tokens: int
    size: int
    quantized_us: float
    float_us: float

    @property
    def is_slower(self) -> bool:
        """Whether float is faster by more than noise and a call's overhead."""
        return self.float_us / self.quantized_us < _SLOWER_BELOW and self.quantized_us - self.float_us > _SLOWER_BY_US


@dataclass(frozen=True)
class SpeedTable:
    """Measured speeds by the operator's name and the weights' dtype. source: the machine, kernels and date of them.

    isa: the kernels' instruction set.
    """

    source: str
    speeds: dict[tuple[str, str], tuple[Speed, ...]]
    isa: str = ""

    def find(
        self, operator: str, qconfig: QConfig, shape: tuple[int, ...], kind: str = "", is_call: bool = False
    ) -> Speed | None:
        """Return what was measured at the nearest lower tokens and size, or at the least; None where nothing was.

        shape: tokens, inputs, outputs. The size is their geometric mean, which a square layer of as many weights has.
        kind: of the layer or call, "nn.RNNCell"; is_call: whether it is a call of a function.
        """
        known = RENAMED.get(operator, operator)
        name = _MEASURED_AS.get(kind) or (_CALLS.get(known, known) if is_call else known)
        tables = [self.speeds.get((name, qconfig.weight.dtype), ()) for name in (name, known)]
        measured = next(filter(None, tables), ())
        if not measured or not shape or qconfig.parts:
            return None
        tokens, inputs, outputs = shape
        for key, wanted in (("size", math.sqrt(inputs * outputs)), ("tokens", tokens)):
            values = {getattr(speed, key) for speed in measured}
            nearest = max((value for value in values if value <= wanted), default=min(values))
            measured = tuple(speed for speed in measured if getattr(speed, key) == nearest)
        return measured[0]


@functools.cache
def measured_tables() -> tuple[SpeedTable, ...]:
    """Return the measurements that come with the package, a table for each instruction set."""
    plain = json.loads(resources.files("fxquant.debug").joinpath("speed.json").read_text(encoding="utf-8"))
    return tuple(_read_table(isa, table) for isa, table in plain.items())


def _read_table(isa: str, plain: dict[str, Any]) -> SpeedTable:
    speeds: dict[tuple[str, str], tuple[Speed, ...]] = {}
    for name, sides in plain["rows"].items():
        operator, dtype, shape = name.split()
        tokens, size = shape.split("x")
        speed = Speed(int(tokens), int(size), sides["fxquant"], sides["float"])
        speeds[operator, dtype] = (*speeds.get((operator, dtype), ()), speed)
    machine = plain["machine"]
    return SpeedTable(f"{machine['cpu']}, {machine['date'][:10]}, where {machine['kernel']}", speeds, isa)


def nearest_table(tables: Sequence[SpeedTable], isa: str | None) -> SpeedTable:
    """Return the table of the nearest instruction set, of two the slower one; its source says so if it is another.

    isa: None where plain torch computes, slower than any.
    """
    place = len(ISAS) if isa is None else ISAS.index(isa)
    table = min(tables, key=lambda table: (abs(ISAS.index(table.isa) - place), -ISAS.index(table.isa)))
    if table.isa == isa:
        return table
    return replace(table, source=f"{table.source} (nothing was measured with {isa or 'plain torch'})")


def speed_table() -> SpeedTable:
    """Return the measurements that are nearest to the kernels in use."""
    return nearest_table(measured_tables(), kernel_info().isa)


def regressions_of(site: Site, is_timed: bool = True) -> tuple[Regression, ...]:
    """Return what a converted site costs more than float: bytes, and time where its shape is known.

    is_timed: False where it does not run on a processor, of which the times are.
    """
    regressions = []
    if site.int_bytes > site.float_bytes:
        regressions.append(
            Regression(site.path, "larger", site.int_bytes, site.float_bytes, "its tensors", site.opt_out)
        )
    if not is_timed:
        return tuple(regressions)
    table = speed_table()
    speed = table.find(site.operator, site.qconfig, site.shape, site.kind, site.call is not None)
    if speed is not None and speed.is_slower:
        what = f"{speed.tokens} token{'' if speed.tokens == 1 else 's'} of {speed.size} → {speed.size}"
        regressions.append(
            Regression(site.path, "slower", speed.quantized_us, speed.float_us, what, site.opt_out, table.source)
        )
    return tuple(regressions)


def __getattr__(name: str) -> Any:
    """Return Regression by the name that it had, with a DeprecationWarning."""
    if name != "Loss":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("fxquant.debug.regressions.Loss is now Regression", DeprecationWarning, stacklevel=2)
    return Regression
