"""All cases of one process: what it computes, with the native kernels or without, as hashes."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import fxquant
from fxquant.errors import FxQuantError
from tests.architectures.base import Architecture
from tests.architectures.collection import ARCHITECTURES
from tests.golden import digest, operators
from tests.golden.schemes import FIRST_SCHEMES, LINEAR, WAYS, by_graph, everything, is_worth_it, quiet
from tests.native import cases as native
from tests.old_files import by_format

THREADS = (1, 2)
REPORTED = ("DLRM", "GRU4Rec", "Voice activity detector")
"""The architectures that the reports are made of."""

Case = tuple[str, str, str, str]
"""(subject, scheme, what, hash)."""


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def kernels() -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
    """Yield (name, what switches to it) for each instruction set, or the reference, on one thread and on two."""
    for count in THREADS:
        for isa in native.usable():  # two threads share even the smallest work there
            yield f"{isa} on {count}", native.kernels(isa, count)
        if not native.usable():
            yield f"reference on {count}", threads(count)


def results(model: nn.Module, inputs: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """Yield (what, hash) of a model's outputs by each of this process's kernels."""
    for name, switch in kernels():
        with switch, torch.no_grad():
            yield f"outputs, {name}", digest.outputs(model(*inputs))


def _outcome(make: Callable[[], Iterator[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    """Yield what there is to hash, or which error of ours there was instead."""
    try:
        yield from make()
    except FxQuantError as error:
        yield "error", type(error).__name__


def of_model(quantized: nn.Module, inputs: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """Yield (what, hash) of a quantized model."""
    yield "state", digest.state(quantized)
    yield "figures", digest.figures(quantized)
    yield from results(quantized, inputs)


def of_architecture(architecture: Architecture) -> Iterator[Case]:
    """Yield an architecture's cases, for every scheme."""
    model = architecture.make()
    torch.manual_seed(1)
    inputs = architecture.inputs()
    for name, way in WAYS.items():
        if is_worth_it(name, model):
            # a loop's variables, bound here: the function is called before the next turn
            for what, value in _outcome(lambda way=way: of_model(way(model, inputs), inputs)):  # type: ignore[misc]
                yield architecture.name, name, what, value


def of_operators() -> Iterator[Case]:
    """Yield the cases of single operators."""
    for subject, scheme, make in operators.cases():
        for what, value in _outcome(lambda make=make: results(*make())):  # type: ignore[misc]
            yield subject, scheme, what, value


def of_checkpoints(folder: pathlib.Path) -> Iterator[Case]:
    """Yield the cases of the files that `make` wrote."""
    for name in by_format.MODELS:
        loaded = by_format.load(name, folder)
        for what, value in of_model(loaded, by_format.inputs(name)):
            yield f"checkpoint {name}", "loaded", what, value


@quiet
def _reports(architecture: Architecture) -> list[tuple[str, str]]:
    model = architecture.make()
    torch.manual_seed(1)
    inputs = architecture.inputs()
    quantized = by_graph(model, inputs, LINEAR["int8"])
    found = fxquant.suggest_mapping(model, [inputs], budget=0.02, schemes=FIRST_SCHEMES)
    return [
        ("compare", digest.comparison(fxquant.compare(model, quantized, [inputs]))),
        ("sensitivity", digest.sensitivity(fxquant.sensitivity(model, everything(LINEAR["int8"]), [inputs]))),
        ("suggested state", digest.state(found.model)),
        ("suggested figures", digest.digest(found.metric, found.bytes, found.float_metric, found.float_bytes)),
    ]


def of_reports() -> Iterator[Case]:
    """Yield the cases of compare, sensitivity and suggest_mapping."""
    for architecture in ARCHITECTURES:
        if architecture.name in REPORTED:
            for what, value in _reports(architecture):
                yield architecture.name, "reports", what, value


def everything_of(folder: pathlib.Path) -> dict[str, str]:
    """Return all hashes of this process by "subject|scheme|what"."""
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    parts = [of_architecture(architecture) for architecture in ARCHITECTURES]
    for part in (*parts, of_operators(), of_checkpoints(folder), of_reports()):
        found.update((f"{subject}|{scheme}|{what}", value) for subject, scheme, what, value in part)
    return found
