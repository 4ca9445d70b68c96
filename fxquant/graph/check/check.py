"""After convert: the quantized model is run once on the example inputs, beside the prepared one, and must do the same.

Counting calls shows the sites that the quantized model skips, or runs less often than float: something outside the
model's modules may hold the float layer (a global, a class), or forward picks layers by their type. A run with only
that site quantized tells which. Such sites stay float. One warning names changed shapes and dtypes, NaN where float has
none, and an SQNR below 10 dB, unless a little noise in the float model's layers changes as much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fxquant.errors import CheckError, warn
from fxquant.graph import edit
from fxquant.graph.check.example_run import NOISE_DB, Pass, Uses
from fxquant.graph.check.noise import LEAST_SQNR_DB, is_by_values, is_random, selects, shaken_runs, site_errors, sqnrs
from fxquant.graph.record import Coverage, Record, Site, Skipped, keep_record, record_of
from fxquant.graph.references import repoint
from fxquant.graph.why import Reason, Why, because

_ROUNDS, _SHOWN = 3, 3
_HELP = "fxquant.suggest_mapping finds a mapping that keeps to a budget"
_STATIC_HELP = "fxquant.sensitivity which of them to leave float; does the data for calibration look like these inputs?"


def checked(prepared: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return a prepared model converted and checked on its example inputs. Sites that it does not run stay float.

    Raises CheckError if the quantized model fails on them, and warns once about all else. If the model cannot be
    checked, its record says why. Both models run as mirrors, without hooks, and are left as they were.
    """
    quantized, record = convert(prepared), _record(prepared)
    name, why_not = type(prepared).__name__, _why_not(prepared, record)
    if why_not or record.example is None or record.example.inputs is None:
        return keep_record(quantized, _record(quantized).advance(unchecked=why_not))
    inputs, uses = record.example.inputs, Uses(prepared, record.sites)
    expected = Pass(prepared, dict(enumerate(record.sites)), inputs, uses)
    if expected.error is not None:
        message = f"prepared, it fails on its example inputs now ({type(expected.error).__name__}: {expected.error})"
        warn(f"this {name} was converted without a check: {message}; was it moved or cast in between?")
        return keep_record(quantized, _record(quantized).advance(unchecked=message))
    floats: dict[int, Reason] = {}
    comparison = _compare(expected, quantized)
    for _ in range(_ROUNDS):
        if not comparison.missed:
            break
        floats.update(comparison.missed)
        quantized = convert(_leave(prepared, record, floats))
        comparison = _compare(expected, quantized)
    if (error := comparison.error) is not None:
        raise CheckError(
            f"this {name} runs on its example inputs in float and fails once it is quantized, at "
            f"{edit.user_frame(error) or 'a place in forward'}: {type(error).__name__}: {error}\n"
            "  Leave what that line works with float (a qconfig of None), or take the model as it is: "
            "convert_fx(prepared, check=False)"
        ) from error
    lines = [*_describe_floats(record, floats), *comparison.remarks]
    if comparison.sqnr_db < LEAST_SQNR_DB and not is_random(expected):
        errors = site_errors(expected, quantized, _record(quantized).sites)
        if not (min(errors, default=(0.0,))[0] >= NOISE_DB and selects(expected)):
            has_static = any(site.is_static for site in record.sites)
            lines.append(_noise_line(comparison, errors, has_static))
    if lines:
        warn("".join([f"this {name} was checked on its example inputs:", *(f"\n  - {line}" for line in lines)]))
    return quantized


def _record(model: nn.Module) -> Record:
    record = record_of(model)
    assert record is not None
    return record


class _Comparison(NamedTuple):
    """What one comparison showed.

    missed: the numbers of the sites that the quantized model does not run, and why. sqnr_db: of the worst output;
    output: its name. error: the failure, if it failed.
    """

    missed: dict[int, Reason]
    remarks: list[str]
    sqnr_db: float = float("inf")
    output: str = ""
    error: Exception | None = None


def _why_not(prepared: nn.Module, record: Record) -> str:
    """Return why a prepared model cannot be checked, or ""."""
    if any(tensor.is_meta for tensor in (*prepared.parameters(), *prepared.buffers())):
        return "it was on the meta device, and had no values"
    no_inputs = record.example is None or record.example.inputs is None
    return "the prepared model came from a pickle, which leaves the example inputs out" if no_inputs else ""


def _compare(expected: Pass, quantized: nn.Module) -> _Comparison:
    """Run a quantized model and return how that differs from the float run."""
    places = {(site.path, site.call): number for number, site in enumerate(_record(expected.model).sites)}
    sites = {places[site.path, site.call]: site for site in _record(quantized).sites}
    got = Pass(quantized, sites, expected.inputs, expected.uses)
    missed = {number: because(Why.PASSED_BY) for number in sites if number in got.used}
    lost = ((expected.ran.keys() | expected.used) & sites.keys()) - got.ran.keys() - got.read - missed.keys()
    lost = {number for number in lost if _avoids(expected, quantized, number, sites[number])}
    missed = {**dict.fromkeys(sorted(lost), because(Why.UNCALLED)), **missed}
    fewer = [number for number in sorted(got.ran) if got.ran[number] < expected.ran[number] and number not in missed]
    for number in fewer if got.error is None else ():
        if number not in got.read:
            calls = _calls_alone(expected, quantized, number, sites[number])
            missed.update({} if calls is None else {number: because(Why.CALLED_LESS, expected.ran[number], calls)})
    if got.error is not None:
        return _Comparison(missed, [], error=got.error)
    worst = min(sqnrs(expected.floats, got.floats), default=(float("inf"), ""))
    return _Comparison(missed, _differences(expected, got), *worst)


def _avoids(expected: Pass, quantized: nn.Module, number: int, site: Site) -> bool:
    """Return whether forward runs a site in float, but not with that site alone quantized.

    Otherwise a router chose differently on quantized values, or random numbers did.
    """
    alone = _alone(expected, quantized, number, site)
    if number in alone.ran or number in alone.read:
        return False
    again = expected.again({number: site})
    return number in again.ran or number in again.used


def _calls_alone(expected: Pass, quantized: nn.Module, number: int, site: Site) -> int | None:
    """Return how often forward calls a site with that site alone quantized, if that is less than in float.

    None if it is not, or if a little noise in the float model changes it too: then values decide.
    """
    alone = _alone(expected, quantized, number, site)
    if alone.error is not None or alone.ran[number] >= expected.ran[number]:
        return None
    is_by_values = any(shaken.ran[number] != expected.ran[number] for shaken in shaken_runs(expected))
    return None if is_by_values else alone.ran[number]


def _alone(expected: Pass, quantized: nn.Module, number: int, site: Site) -> Pass:
    """Return a run of the float model in which one site is quantized."""
    hybrid = edit.mirror(expected.model)
    layer = hybrid.get_submodule(site.path)
    edit.swap_module(hybrid, site.path, edit.mirror(quantized.get_submodule(site.path)))
    repoint(hybrid.modules(), {id(layer): hybrid.get_submodule(site.path)})
    return expected.again({number: site}, hybrid)


def _differences(expected: Pass, got: Pass) -> list[str]:
    """Return a line for each output with another shape or dtype than in float, or NaN where that has none."""
    lines = []
    for name, tensor in expected.tensors.items():
        what, result = f"output {name!r}" if name else "the output", got.tensors.get(name)
        if result is None:
            lines.append(f"{what}, {_shape(tensor)} in float, is missing from the quantized model's outputs")
        elif _shape(result) != _shape(tensor):
            if not is_by_values(expected, name, result):
                lines.append(f"{what} is {_shape(result)}, in float {_shape(tensor)}")
        elif name in expected.floats and name in got.floats:
            lost = expected.floats[name].isfinite() & ~got.floats[name].isfinite()
            if lost.any():
                lines.append(f"{what} has {int(lost.sum())} NaN or infinite values where float has none")
    extra = [name for name in got.tensors if name not in expected.tensors]
    if extra:
        lines.append(f"the quantized model gives {', '.join(map(repr, extra[:_SHOWN]))}, which float does not")
    return lines


def _shape(tensor: torch.Tensor) -> str:
    shape = "nested" if tensor.is_nested else str(tuple(tensor.shape))
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _leave(prepared: nn.Module, record: Record, floats: Mapping[int, Reason]) -> nn.Module:
    """Return a mirror of a prepared model in which some sites, by number, stay float for these reasons."""
    sites = tuple(site for number, site in enumerate(record.sites) if number not in floats)
    skipped = tuple(
        Skipped(
            path=record.sites[number].path,
            kind=record.sites[number].kind,
            why=floats[number],
            entry=record.sites[number].entry,
            float_bytes=record.sites[number].float_bytes,
            opt_out=record.sites[number].opt_out,
        )
        for number in sorted(floats)
    )
    coverage = _coverage(prepared, record, [record.sites[number] for number in floats])
    return keep_record(
        edit.mirror(prepared), record.advance(sites=sites, skipped=(*record.skipped, *skipped), coverage=coverage)
    )


def _coverage(prepared: nn.Module, record: Record, floats: Sequence[Site]) -> Coverage:
    """Return the coverage once some sites are float too. A weight that a float candidate shares counted so already."""

    def weights(path: str) -> dict[Any, int]:
        if path in modules:
            held = list(modules[path].parameters())
        else:
            tensor = edit.get_tensor(prepared, path)
            held = [] if tensor is None else [tensor]
        return {edit.identity(t): t.numel() * t.element_size() for t in held if t.dim() > 1}

    modules = dict(prepared.named_modules(remove_duplicate=False))
    already = {key for part in record.skipped for key in weights(part.path)}
    lost = {key: size for site in floats for key, size in weights(site.path).items() if key not in already}
    return Coverage(record.coverage.quantized_bytes - sum(lost.values()), record.coverage.total_bytes)


def _describe_floats(record: Record, floats: Mapping[int, Reason]) -> list[str]:
    """Return a line for each reason for which sites stay float, with their names."""
    lines = []
    for reason in dict.fromkeys(floats.values()):
        names = [f"{record.sites[i].path} ({record.sites[i].kind})" for i in sorted(floats) if floats[i] == reason]
        lines.append(f"{', '.join(names)} stay{'s' if len(names) == 1 else ''} float: {reason}")
    return lines


def _noise_line(comparison: _Comparison, errors: Sequence[tuple[float, str, str]], has_static: bool) -> str:
    """Return a line about an output's SQNR and the worst sites. has_static: whether some are static."""
    worst = ", ".join(f"{name or 'the model'} ({kind}) {sqnr_db:.1f} dB" for sqnr_db, name, kind in errors[:_SHOWN])
    output = f"output {comparison.output!r}" if comparison.output else "the output"
    return (
        f"{output} has an SQNR of {comparison.sqnr_db:.1f} dB against float, less than {LEAST_SQNR_DB:.0f}; the worst "
        f"sites: {worst}. fxquant.compare says more about them, {_STATIC_HELP if has_static else _HELP}"
    )
