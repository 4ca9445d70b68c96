"""What an architecture of the collection is, and what is measured of it."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxquant import convert_fx, quantize_dynamic
from tests.architectures import oracle
from tests.samples import leaves, prepare

FORMS = ("fx", "eager")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A published architecture, small, with random weights.

    build, inputs: the model and one call, of a batch of at least two rows. rows, outputs: the dimension of each input,
    and of each output, that is the batch; 0 where nothing is said. called: the paths of the parameters that the model's
    own code reads as matrices or tables (F.linear, @, addmm): the eager form leaves these calls alone, which compute
    with a module's float weight. kept: the paths of the parts that do not trace, "" for the whole model.
    """

    name: str
    paper: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    rows: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    called: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def make(self) -> nn.Module:
        """Return the model, the same at each call."""
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", ".*nested_tensor is True.*")  # torch's, when it builds an encoder
            torch.manual_seed(0)
            return self.build().eval()


@dataclass(frozen=True)
class Measured:
    """An architecture's float model and its two quantized forms, and what each gives for the same inputs."""

    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    prepared: nn.Module
    quantized: dict[str, nn.Module]
    expected: list[torch.Tensor]
    results: dict[str, list[torch.Tensor]]
    simulated: dict[str, list[torch.Tensor]]


@functools.cache
def measure(architecture: Architecture) -> Measured:
    """Return what becomes of an architecture in both forms."""
    model = architecture.make()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad(), slow_path():
        warnings.filterwarnings("ignore", "nothing in this .* is to be quantized|.* does not trace|.* is read by")
        torch.manual_seed(1)
        inputs = architecture.inputs()
        prepared = prepare(model, *inputs, batch_invariant=True)
        quantized = {"fx": convert_fx(prepared), "eager": quantize_dynamic(model, batch_invariant=True)}
        simulated = {form: oracle.simulate(model, inputs, architecture.called, form) for form in FORMS}
        return Measured(
            model,
            inputs,
            prepared,
            quantized,
            leaves(model(*inputs)),
            {form: leaves(quantized[form](*inputs)) for form in FORMS},
            {form: leaves(simulated[form]) for form in FORMS},
        )


@contextlib.contextmanager
def slow_path() -> Iterator[None]:
    """Have torch's transformers call their children, as a graph does."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the float parameters of two or more dimensions by their paths, tied ones once."""
    return {path: p for path, p in model.named_parameters() if p.dim() > 1}


def coverable_bytes(model: nn.Module, called: Sequence[str], form: str) -> int:
    """Return the bytes of the matrices that are to become int8, told from the float model's modules alone."""
    parts = oracle.quantizable(model)
    found = {id(p): p for part in parts for p in part.parameters() if p.dim() > 1}
    if form == "fx":
        found.update((id(p), p) for p in map(model.get_parameter, called))
    return byte_sum(found.values())


def byte_sum(tensors: Any) -> int:
    """Return the bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def narrow(tensors: Sequence[torch.Tensor], dims: tuple[int, ...], row: int) -> list[torch.Tensor]:
    """Return the part of each tensor that is one row of the batch."""
    return [t.narrow(dims[i] if i < len(dims) else 0, row, 1) for i, t in enumerate(tensors)]


def power(tensors: Sequence[torch.Tensor]) -> float:
    """Return the sum of squares."""
    return math.fsum(float(t.double().square().sum()) for t in tensors)


def noise(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """Return the power of the difference between two results."""
    return power([a.double() - b.double() for a, b in zip(expected, got, strict=True)])


def sqnr(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """Return the signal-to-quantization-noise ratio of a result in dB."""
    return 10 * math.log10(power(expected) / noise(expected, got))
