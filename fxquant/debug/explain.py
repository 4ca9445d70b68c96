"""explain: every candidate, what was decided about it, by which rule, and what it saves."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from fxquant.debug.on_gpu import runs_on
from fxquant.debug.regressions import Regression, regressions_of
from fxquant.debug.report.report import Column, Report
from fxquant.debug.report.table import megabytes, site_name
from fxquant.debug.slow_static import slow_static
from fxquant.errors import ModelStateError
from fxquant.graph import edit
from fxquant.graph.convert.clean import clean
from fxquant.graph.convert.convert import convert, convert_modules
from fxquant.graph.convert.invariant import find_dependent
from fxquant.graph.lower import lower
from fxquant.graph.record import Coverage, Record, Site, record_of
from fxquant.graph.values import FloatValue
from fxquant.graph.why import StaysFloat
from fxquant.nn import QuantizedModule
from fxquant.qconfig_mapping import qconfig_name

_SHOWN = 3  # places of one kind and reason


@dataclass(frozen=True)
class ExplainRow:
    """One candidate. decision: its qconfig, or "float: why"; rule: the mapping entry; saved_bytes: 0 if left float.

    saved_bytes counts a weight at each site that shares it; Explanation.saved_bytes counts it once.
    path: of a functional call its weight's, and call its node's name, else "". source: "file.py:12", the line of the
    user's code that makes the call, or "" where the graph does not have it.
    regressions: where it comes out larger or slower than float.
    """

    path: str
    call: str
    kind: str
    operator: str
    is_quantized: bool
    decision: str
    rule: str
    float_bytes: int
    saved_bytes: int
    source: str
    regressions: tuple[Regression, ...] = ()

    @property
    def losses(self) -> tuple[Regression, ...]:
        """The old name of `regressions`."""
        warnings.warn("ExplainRow.losses is now .regressions", DeprecationWarning, stacklevel=2)
        return self.regressions


def _wrap(sentence: str) -> str:
    return textwrap.fill(sentence, 100, subsequent_indent="    ")


def _path(row: ExplainRow) -> str:
    """Return the first cell: where it is; of what was left float the line too, for there one has to look."""
    line = row.source.replace("\\", "/").rpartition("/")[2]
    return site_name(row) + (f"\n{line}" if line and not row.is_quantized else "")


@dataclass(frozen=True)
class Explanation(Report):
    """What became of every candidate: print it, show it in a notebook, sort it, or walk its lines.

    readers: the places that have read the float weight of a quantized layer so far, past the layer.

    coverage: how many bytes of the weights are quantized; outcome: the same as a line. saved_bytes: by how much the
    whole model is smaller. dependent: where batch_invariant=True was asked for, what torch still computes in another
    order in another batch: "place: operator". floats: the values of a static model that stay float between integers,
    and why; has_static: whether there are calibrated sites; slow_static: those of them that are slower than float.
    on_gpu: what runs a model on its CUDA device, a line each.
    """

    rows: tuple[ExplainRow, ...]
    fusions: tuple[str, ...]
    untraced: tuple[str, ...]
    stage: str
    coverage: Coverage
    outcome: str
    saved_bytes: int
    unchecked: str = ""
    unfused: tuple[str, ...] = ()
    dependent: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    has_static: bool = False
    slow_static: tuple[str, ...] = ()
    on_gpu: tuple[str, ...] = ()

    @property
    def total(self) -> str:
        """The last line: how many candidates and how many bytes of their weights are quantized, and what that saves."""
        return f"{self.outcome}, {megabytes(self.saved_bytes)} saved"

    @property
    def remarks(self) -> tuple[str, ...]:
        """The lines between the table and the last: fusions, what is not fused, traced or checked, slow, lossy."""
        regressions = [each for row in self.rows for each in row.regressions]
        sources = dict.fromkeys(each.source for each in regressions if each.source)
        return (
            *(f"fused: {fusion}" for fusion in self.fusions),
            *(f"not fused: {chain}" for chain in self.unfused),
            *(f"not traced: {path}" for path in self.untraced),
            *(_wrap(f"float between integers: {value}") for value in self.floats),
            *(_wrap(f"slow: {kind}") for kind in self.slow_static),
            *(f"slow: {reader}" for reader in self.readers),
            *([f"not checked on example inputs: {self.unchecked}"] if self.unchecked else []),
            *(f"other bits in another batch (docs/numerics.md): {place}" for place in self.dependent),
            *(_wrap(line) for line in self.on_gpu),
            *map(str, regressions),
            *(_wrap(f"such times were measured on {source}; yours may differ") for source in sources),
        )

    title: ClassVar[str] = "Explanation: what became of each layer, and why"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("path", "path", 24, _path, is_number=False, is_name=True),
        Column("was", "kind", 16, lambda row: row.kind, is_number=False, is_name=True),
        Column("now", "decision", 26, lambda row: row.decision, is_number=False),
        Column("decided by", "rule", 12, lambda row: row.rule, is_number=False),
        Column("saved", "saved_bytes", 10, lambda row: megabytes(row.saved_bytes) if row.saved_bytes else ""),
    )

    @property
    def footer(self) -> tuple[str, ...]:
        """The lines under the table: the remarks and the total."""
        return (*self.remarks, self.total)


def explain(model: nn.Module) -> Explanation:
    """Return what became of every candidate of a prepared or quantized model, those inside leaves too.

    A candidate is a module or call that holds a weight of two or more dimensions. Raises ModelStateError for a float
    model: prepare_fx decides.

    Where a site comes out larger than float, or slower by what was measured of its kernel, its
    line says so with both figures and the entry that would leave it float. The mapping is obeyed all the same.
    """
    record = record_of(model)
    if record is None or record.stage == "fused":
        raise ModelStateError(
            f"explain needs the result of prepare_fx or convert_fx, got {type(model).__name__}; "
            "the mapping given to prepare_fx is what decides"
        )
    fusions = tuple(f"{' → '.join(fusion.chain)}, at {fusion.path}" for fusion in record.fusions)
    unfused = tuple(_unfused(record))
    untraced = tuple(f"{path or 'the whole model'}: {why}" for path, why in record.untraced.items())
    quantized, sites = (model, record.sites) if record.stage == "quantized" else _foreseen(model, record)
    saved = record.float_bytes - edit.byte_count(quantized)
    on_gpu = runs_on(model)
    rows = _rows(record.advance(sites=sites), _sources(model), not on_gpu)
    dependent = tuple(_dependent(quantized, record)) if record.batch_invariant else ()
    told = (record.outcome, saved, record.unchecked, unfused, dependent, _readers(model))
    slow = () if on_gpu else tuple(f"{_some(paths)}: {why}" for paths, why in slow_static(quantized))
    values = tuple(_floats(record.values.floats)), bool(record.values.calls), slow, on_gpu
    return Explanation(rows, fusions, untraced, record.stage, record.coverage, *told, *values)


def _unfused(record: Record) -> Iterator[str]:
    """Yield a line for each reason for which chains were not fused, with those chains."""
    for why in dict.fromkeys(unfused.why for unfused in record.unfused):
        chains = [" → ".join(unfused.chain) for unfused in record.unfused if unfused.why == why]
        yield f"{_some(chains)}: {why}"


def _floats(values: Sequence[FloatValue]) -> Iterator[str]:
    """Yield a line for each kind of value that stays float for one reason, and one for all that only read those."""
    causes = [value for value in values if value.why.why is not StaysFloat.READS_FLOATS]
    for call, why in dict.fromkeys((value.kind, value.why) for value in causes):
        named = [value for value in causes if (value.kind, value.why) == (call, why)]
        places = [f"{value.path or value.node}{f' at {value.source}' if value.source else ''}" for value in named]
        yield f"{call} ({_some(places)}): {why}"
    readers = [value.path or value.node for value in values if value.why.why is StaysFloat.READS_FLOATS]
    if readers:
        yield f"what reads such values: {_some(readers)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _dependent(quantized: nn.Module, record: Record) -> Iterator[str]:
    """Yield what of a model that is to be independent of the batch is not, or is not known to be."""
    yield from (f"{place}: {name}" for place, name in find_dependent(quantized))
    for path in record.untraced if record.is_traced else ("",):
        yield f"{path or 'the whole model'}: its own code, which is not traced, may have products of torch's"


def _readers(model: nn.Module) -> tuple[str, ...]:
    """Return a line for each place that has read a quantized module's float weight, and what would make it fast."""
    return tuple(
        f"{path}.{reader}, which dequantizes it each time; set_module_name({path!r}, None) leaves it float"
        for path, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for reader in sorted(module.readers.values())
    )


def _foreseen(model: nn.Module, record: Record) -> tuple[nn.Module, tuple[Site, ...]]:
    """Return what a prepared model would be once converted, and its sites: done on the meta device, without data."""
    twin = edit.mirror(model, "meta")
    if record.is_trained:
        lower(twin, record)
    if isinstance(twin, fx.GraphModule) and record.is_traced:
        sites = convert(
            twin, record.sites, record.operators, batch_invariant=record.batch_invariant, values=record.values
        )
        return clean(twin, model, record.preserved), sites
    return convert_modules(twin, record.sites, record.operators, batch_invariant=record.batch_invariant)


def _sources(model: nn.Module) -> dict[tuple[str, str], str]:
    """Return the user's line that made each node, by "" and its name, and by the path of the module that it calls."""
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    lines: dict[tuple[str, str], str] = {}
    for node in nodes:
        lines[("", node.name)] = edit.node_frame(node)
        if node.op == "call_module":
            lines.setdefault((str(node.target), ""), edit.node_frame(node))
    return lines


def _source(sources: dict[tuple[str, str], str], path: str, call: str | None) -> str:
    return sources.get(("", call) if call else (path, ""), "")


def _rows(record: Record, sources: dict[tuple[str, str], str], is_timed: bool) -> tuple[ExplainRow, ...]:
    quantized = [
        ExplainRow(
            path=site.path,
            call=site.call or "",
            kind=site.kind,
            operator=site.operator,
            is_quantized=True,
            decision=qconfig_name(site.qconfig) + (f", rounded {site.rounding}" if site.rounding else ""),
            rule="; ".join((site.rule, *site.part_rules)),
            float_bytes=site.float_bytes,
            saved_bytes=site.float_bytes - site.int_bytes,
            source=_source(sources, site.path, site.call),
            regressions=regressions_of(site, is_timed),
        )
        for site in record.sites
    ]
    skipped = [
        ExplainRow(
            path=part.path,
            call="" if part.call in (None, part.path) else part.call,
            kind=part.kind,
            operator="",
            is_quantized=False,
            decision=f"float: {part.reason}",
            rule=part.rule,
            float_bytes=part.float_bytes,
            saved_bytes=0,
            source=_source(sources, part.path, part.call),
        )
        for part in record.skipped
    ]
    return tuple(quantized + skipped)
