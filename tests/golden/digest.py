"""Hashes of results. Names of the library's fields that a refactor may change stand here and nowhere else."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

import fxquant
from tests.samples import leaves


def digest(*values: Any) -> str:
    """Return the SHA-256 of tensors (shape, dtype and bytes; any NaN as good as another) and of plain values."""
    result = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            result.update(f"{tuple(value.shape)} {value.dtype}".encode())
            result.update(_bytes(value))
        else:
            result.update(repr(value).encode())
        result.update(b";")
    return result.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_neg().reshape(-1).contiguous()
    if plain.is_floating_point():
        plain = torch.where(plain.isnan(), torch.full_like(plain, float("nan")), plain)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def outputs(result: Any) -> str:
    """Return the hash of all tensors of a result."""
    return digest(*leaves(result))


def state(quantized: nn.Module) -> str:
    """Return the hash of a state_dict: keys, dtypes, shapes and bytes, in the order of the keys."""
    return digest(*(part for item in sorted(quantized.state_dict().items(), key=lambda item: item[0]) for part in item))


def figures(quantized: nn.Module) -> str:
    """Return the hash of explain's numbers, none of its sentences, and of the model's size."""
    told = fxquant.explain(quantized)
    rows = sorted(
        (row.path, row.call, row.is_quantized, row.float_bytes, row.saved_bytes, [_numbers(x) for x in _exact(row)])
        for row in told.rows
    )
    size = sum(t.nbytes for t in quantized.state_dict().values() if isinstance(t, torch.Tensor))
    return digest(rows, told.coverage.quantized_bytes, told.coverage.total_bytes, told.saved_bytes, size)


def _exact(row: Any) -> list[Any]:
    """Return a row's regressions of bytes: those of time depend on the machine."""
    return [regression for regression in row.regressions if not regression.source]


def _numbers(row: Any) -> list[Any]:
    """Return a row's numbers in ascending order: they may get other names."""
    return sorted(value for value in vars(row).values() if isinstance(value, (int, float)))


def comparison(found: Any) -> str:
    """Return the hash of compare's numbers."""
    rows = [
        (row.path, row.call, row.calls, row.sqnr_db, row.max_error, row.local_sqnr_db, row.local_max_error, row.peak)
        for row in found.rows
    ]
    return digest(rows, found.output_sqnr_db, found.output_relative_rms, found.output_max_error)


def sensitivity(found: Any) -> str:
    """Return the hash of sensitivity's numbers."""
    rows = [(row.path, row.call, row.saved_bytes, row.alone, row.without, row.damage, row.gain) for row in found.rows]
    return digest(rows, found.float_metric, found.quantized_metric)
