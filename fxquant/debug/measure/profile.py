"""profile: where a model's milliseconds and bytes go, site by site."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from fxquant.debug.measure.regions import Region, in_words, integer_regions
from fxquant.debug.measure.sites import OpenModel, open_float, open_quantized
from fxquant.debug.report.report import Column, Report
from fxquant.debug.report.table import megabytes, milliseconds, site_name
from fxquant.errors import ExampleInputsError, ModelStateError
from fxquant.graph import edit
from fxquant.graph.call import Inputs, as_arguments
from fxquant.graph.record import Record, record_of
from fxquant.ops import KERNELS, kernel_info

_PLAIN = "plain torch"
_BUSY = 0.2
"""If the parts' medians add up to more or less than the call's by more than this share, do not trust the figures."""


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One site, or "elsewhere": all that is in none. ms: per call of the model; float_ms: NaN without a float model.

    calls: how often a call of the model calls the site. kernel: the operators other than torch's that it calls, and
    what runs them: "linear (amx)", "lstm (plain torch)". label: the same for the table, without what runs nearly all
    operators, which is named below the table.
    """

    path: str
    call: str
    kind: str
    calls: int
    ms: float
    float_ms: float
    bytes: int
    float_bytes: int
    kernel: str = ""
    label: str = ""

    @property
    def speedup(self) -> float:
        """How many times as fast as the float site it is."""
        return self.float_ms / self.ms if self.ms else math.nan


def _times(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1f}×"


def _label(row: ProfileRow) -> str:
    return row.label if row.calls or not row.kind else "never called"


@dataclass(frozen=True, kw_only=True)
class Profile(Report):
    """Every site's milliseconds and bytes, slowest first: print it, show it in a notebook, sort it, or read its lines.

    ms, float_ms: of a whole call; bytes, float_bytes: of a whole model; all milliseconds are medians of the rounds.
    regions: where a static model computes with integers.
    """

    rows: tuple[ProfileRow, ...]
    ms: float
    float_ms: float
    bytes: int
    float_bytes: int
    rounds: int
    threads: int
    kernels: str
    regions: tuple[Region, ...] = ()

    title: ClassVar[str] = "Profile: milliseconds and bytes of each site"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("site", "path", 24, site_name, is_number=False, is_name=True),
        Column("was", "kind", 14, lambda row: row.kind, is_number=False, is_name=True),
        Column("kernel", "kernel", 12, _label, is_number=False),
        Column("calls", "calls", 5, lambda row: str(row.calls or "")),
        Column("ms", "ms", 9, lambda row: milliseconds(row.ms) if row.ms else ""),
        Column("float ms", "float_ms", 9, lambda row: milliseconds(row.float_ms) if row.float_ms else ""),
        Column("speed", "speedup", 6, lambda row: _times(row.speedup)),
        Column("size", "bytes", 9, lambda row: megabytes(row.bytes) if row.bytes else ""),
        Column("float size", "float_bytes", 9, lambda row: megabytes(row.float_bytes) if row.float_bytes else ""),
    )

    @property
    def footer(self) -> tuple[str, ...]:
        """The lines under the table: the totals, and how they were measured."""
        is_alone = math.isnan(self.float_ms)
        speed = f", float {milliseconds(self.float_ms)} ms, {_times(self.float_ms / self.ms)} as fast"
        sizes = megabytes(self.bytes) if is_alone else f"{megabytes(self.float_bytes)} → {megabytes(self.bytes)}"
        sums = [sum(row.ms for row in self.rows), sum(row.float_ms for row in self.rows)]
        calls = [self.ms, self.float_ms]
        is_busy = any(abs(total - call) > _BUSY * call for total, call in zip(sums, calls, strict=True))
        added = " and ".join(milliseconds(total) for total in sums if not math.isnan(total))
        warning = f"the sites add up to {added} ms: the machine was busy with other work; measure again"
        return (
            f"a call: {milliseconds(self.ms)} ms{'' if is_alone else speed}; {sizes}",
            *([warning] if is_busy else []),
            *in_words(self.regions, {row.call or row.path: row.ms for row in self.rows}),
            f"medians of {self.rounds} rounds; {self.threads} thread{'s' if self.threads != 1 else ''}, {self.kernels}",
        )


class _Timer:
    """Adds up the milliseconds of a site's calls."""

    def __init__(self, site: nn.Module) -> None:
        self.ms, self.calls, self._began = 0.0, 0, 0.0
        site.register_forward_pre_hook(self._start)
        site.register_forward_hook(self._stop, prepend=True)

    def _start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.ms += 1000 * (time.perf_counter() - self._began)
        self.calls += 1


class _Kernels(TorchDispatchMode):
    """Notes which operators other than torch's own each site calls."""

    def __init__(self, sites: Sequence[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[dict[tuple[str, str], None]] = [{} for _ in sites]
        self._open: list[int] = []
        self._hooks = [hook for i, site in enumerate(sites) for hook in self._watch(i, site)]

    def _watch(self, number: int, site: nn.Module) -> list[RemovableHandle]:
        begins = site.register_forward_pre_hook(lambda *_: self._open.append(number))
        return [begins, site.register_forward_hook(lambda *_: self._open.remove(number), prepend=True)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operator, and run it."""
        if self._open and func.namespace not in ("aten", "prim", "prims"):
            self.names[self._open[-1]][_kernel(func, args)] = None
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()


def _kernel(operator: torch._ops.OpOverload, args: Sequence[Any]) -> tuple[str, str]:
    """Return an operator's name and what runs it with these arguments, "" if that is unknown."""
    name = operator._schema.name.partition("::")[2]
    if operator.namespace != "fxquant":
        return f"{operator.namespace}.{name}", ""
    kernel = KERNELS[name]
    return name, _usual() if kernel.takes(args) else "Triton" if kernel.takes_on_gpu(args) else _PLAIN


def _usual() -> str:
    """Return what runs the operators on this machine, unless their arguments prevent it."""
    return kernel_info().isa or _PLAIN


def _join(operators: Iterable[tuple[str, str]], but: str = "") -> str:
    """Return operators, each with what runs it in brackets, unless that is `but`."""
    return ", ".join(f"{name} ({where})" if where not in ("", but) else name for name, where in operators)


class _Side:
    """One of the models, and how long its rounds took. The last of its sites' figures is for all that is in no site."""

    def __init__(self, model: nn.Module, opened: OpenModel) -> None:
        self.model, self.sites, self.timers = opened.model, opened.sites, list(map(_Timer, opened.sites))
        self.bytes = edit.byte_count(model)
        inside = edit.byte_count(nn.ModuleList(opened.sites))
        self.sites_bytes = [*map(edit.byte_count, opened.sites), self.bytes - inside]
        self._totals_ms: list[float] = []
        self._sites_ms: list[list[float]] = []

    def run(self, arguments: Inputs) -> None:
        """Run the model, and keep how long that took."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, arguments)
        for timer in self.timers:
            timer.ms, timer.calls = 0.0, 0
        began = time.perf_counter()
        self.model(*args, **kwargs)
        total = 1000 * (time.perf_counter() - began)
        spent = [timer.ms for timer in self.timers]
        self._totals_ms.append(total)
        self._sites_ms.append([*spent, total - sum(spent)])

    @property
    def ms(self) -> float:
        """The median of the rounds, without the first, which warms up."""
        return statistics.median(self._totals_ms[1:])

    @property
    def sites_ms(self) -> list[float]:
        """The same for each site."""
        return [statistics.median(rounds) for rounds in zip(*self._sites_ms[1:], strict=True)]


def profile(model: nn.Module, inputs: Any, *, float_model: nn.Module | None = None, rounds: int = 20) -> Profile:
    """Return the milliseconds and bytes that each site of a model takes, and those of the float model if it is given.

    model: a result of convert_fx, quantize_dynamic, load or prepare_fx; float_model: what it was made from. inputs: one
    call's arguments: a tuple, a dict of keywords or one tensor. rounds: how often each model is called, in turns, after
    a first call to warm up, on torch.get_num_threads() threads.

    The float model runs as prepare_fx traces it: without torch's fast path for transformers, which calls no site by
    itself. Both run as mirrors: neither is changed or hooked. The timing's own microsecond or two per call counts as
    elsewhere.

    Raises ModelStateError for a model that has no record of sites or is not on the CPU, ExampleInputsError for inputs
    that do not fit forward.
    """
    record = _need_profilable(model, rounds)
    arguments = as_arguments(inputs, model)
    sides = [_Side(model, open_quantized(model, record))]
    if float_model is not None:
        sides.append(_Side(float_model, open_float(float_model, record)))
    with torch.no_grad():
        with _Kernels(sides[0].sites) as seen:
            sides[0].run(arguments)
        for side in sides[1:]:
            side.run(arguments)
        for _ in range(rounds):
            for side in sides:
                side.run(arguments)
    ours, theirs = sides[0], sides[1] if len(sides) > 1 else None
    report = Profile(
        rows=_rows(record, ours, theirs, [*seen.names, {}]),
        ms=ours.ms,
        float_ms=theirs.ms if theirs else math.nan,
        bytes=ours.bytes,
        float_bytes=theirs.bytes if theirs else 0,
        rounds=rounds,
        threads=torch.get_num_threads(),
        kernels=f"{kernel_info().isa} kernels" if kernel_info().isa else "plain torch, no native kernels",
        regions=integer_regions(model, record),
    )
    return report.sort("ms")


def _need_profilable(model: nn.Module, rounds: int) -> Record:
    """Return the record of a model that can be profiled, or raise."""
    record = record_of(model)
    if record is None or record.stage == "fused":
        raise ModelStateError(
            f"profile needs the result of prepare_fx, convert_fx or quantize_dynamic, got {type(model).__name__}; the "
            "float model goes beside it: profile(quantized, inputs, float_model=model)"
        )
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        raise ModelStateError("profile times calls on the CPU, and this model is not there; call model.cpu() first")
    if rounds < 1:
        raise ExampleInputsError(f"profile needs at least one round, got rounds={rounds}")
    return record


def _rows(
    record: Record, ours: _Side, theirs: _Side | None, kernels: Sequence[Iterable[tuple[str, str]]]
) -> tuple[ProfileRow, ...]:
    """Return a line for each site, and one for everything else."""
    names = [*((site.path, site.call or "", site.kind) for site in record.sites), ("elsewhere", "", "")]
    calls = [*(timer.calls for timer in ours.timers), 0]
    ms, float_ms = ours.sites_ms, theirs.sites_ms if theirs else []
    return tuple(
        ProfileRow(
            path=path,
            call=call,
            kind=kind,
            calls=calls[i],
            ms=ms[i],
            float_ms=float_ms[i] if theirs else math.nan,
            bytes=ours.sites_bytes[i],
            float_bytes=theirs.sites_bytes[i] if theirs else 0,
            kernel=_join(kernels[i]),
            label=_join(kernels[i], but=_usual()),
        )
        for i, (path, call, kind) in enumerate(names)
    )
