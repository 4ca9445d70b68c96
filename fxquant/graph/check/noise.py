"""How far outputs differ from float, and whether a little noise in the float model would change as much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from fxquant.graph.check.example_run import Pass
from fxquant.graph.outputs import Error
from fxquant.graph.record import Site

LEAST_SQNR_DB = 10.0
"""The SQNR of an output below which a warning names the worst sites: the error is then a third of the output."""

REPEATABLE_DB = 40.0
"""The SQNR between two float outputs below which the model draws random numbers that no seed fixes."""

_SHAKES = 8
"""How many runs with noise are made."""


def sqnrs(expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> list[tuple[float, str]]:
    """Return the SQNR in dB, and the name, of each output that both have in the same shape, unless it is 0 in float."""
    known = []
    for name, tensor in expected.items():
        if tensor.numel() and name in got and got[name].shape == tensor.shape:
            error = Error()
            error.add(tensor, got[name])
            if error.signal:
                known.append((error.sqnr_db, name))
    return known


def is_random(expected: Pass) -> bool:
    """Return whether the float model's outputs vary from run to run, so that they show nothing about quantization."""
    return min(sqnrs(expected.floats, expected.again({}).floats), default=(0.0, ""))[0] < REPEATABLE_DB


def shaken_runs(expected: Pass) -> Iterator[Pass]:
    """Yield runs of the float model with noise added to its sites' outputs: at least as much as int8 adds."""
    noise = torch.Generator().manual_seed(0)
    for _ in range(_SHAKES):
        shaken = expected.again(expected.sites, noise=noise)
        if shaken.error is None:
            yield shaken


def selects(expected: Pass) -> bool:
    """Return whether a little noise changes the float model's outputs as much: it selects by values."""
    return any(
        min(sqnrs(expected.floats, shaken.floats), default=(0.0, ""))[0] < LEAST_SQNR_DB
        for shaken in shaken_runs(expected)
    )


def is_by_values(expected: Pass, name: str, got: torch.Tensor) -> bool:
    """Return whether an output's shape differs from float's only in dimensions that a little noise changes too."""
    wanted, free = expected.tensors[name], set[int]()
    if got.dtype != wanted.dtype or got.is_nested or wanted.is_nested or got.dim() != wanted.dim():
        return False
    differ = _unequal(got, wanted)
    for shaken in shaken_runs(expected):
        other = shaken.tensors.get(name)
        if other is not None and not other.is_nested and other.dim() == wanted.dim():
            free |= _unequal(other, wanted)
        if differ <= free:
            return True
    return False


def _unequal(a: torch.Tensor, b: torch.Tensor) -> set[int]:
    """Return the dimensions in which two tensors of one rank differ in size."""
    return {i for i, sizes in enumerate(zip(a.shape, b.shape, strict=True)) if sizes[0] != sizes[1]}


def site_errors(expected: Pass, quantized: nn.Module, sites: Sequence[Site]) -> list[tuple[float, str, str]]:
    """Return the SQNR in dB, the name and the type of each site, worst first, from another run of each model."""
    passes = [expected.again(dict(enumerate(sites)), model, is_kept=True) for model in (expected.model, quantized)]
    errors = []
    for number, site in enumerate(sites):
        error = Error()
        for theirs, ours in zip(*(each.seen.get(number, []) for each in passes), strict=False):
            if theirs.shape == ours.shape:
                error.add(theirs, ours)
        if error.calls:
            errors.append((error.sqnr_db, site.path if site.call is None else f"{site.path} ({site.call})", site.kind))
    return sorted(errors)
