"""Write docs/coverage.md from tests/architectures: python -m docs.make_coverage."""

import pathlib

from fxquant.graph.edit import byte_count
from fxquant.graph.module import record_of
from tests.architectures.base import Architecture, byte_sum, coverable_bytes, matrices, measure, sqnr
from tests.architectures.collection import ARCHITECTURES

PAGE = pathlib.Path(__file__).parent / "coverage.md"

_HEAD = """# Coverage

Published architectures, written out small from their papers' descriptions, with random weights: `tests/architectures/`.
The page is made by `python -m docs.make_coverage`. The tests hold each architecture to the following, by `prepare_fx`
and `convert_fx` and by `quantize_dynamic`:

- every matrix that can be quantized is, by an account taken from the float model's modules alone; every other one has
  its reason;
- the answers are those of an independent simulation, which rounds the float model's weights and activations by the
  equations of [numerics](numerics.md): the same bits, or, where recurrent layers, attention or folded normalizations
  round in an order of their own, nearer than the simulation is to the float model;
- a row gives the same bits whatever its neighbours in the batch are; and, prepared with `batch_invariant=True`, the
  same bits alone, unless `explain` names something that torch computes in another order in another batch (small
  convolutions, say).

*traced*: what `prepare_fx` makes of the model: one graph, or a graph that calls the parts named as they are and is
quantized inside them, or none: then the model's own code runs on. *quantized*: the share of the bytes of all matrices
(parameters of two or more dimensions) that became int8; what stays float are small convolutions, and what is
only added: positions and the like. *eager*: the same of `quantize_dynamic`, which does not reach functional calls.
*kB*: parameters and buffers. *SQNR*: the power of the float model's answers over the power of the difference from
them; with random weights it tells that nothing is lost on the way, and what a trained model loses is in
[results](results.md).

| architecture | paper | traced | sites | quantized, % | eager, % | kB, float → int8 | SQNR, dB |
|---|---|---|---|---|---|---|---|
"""


def cells(architecture: Architecture) -> list[str]:
    """Return what the page says of an architecture."""
    measured = measure(architecture)
    model, record = measured.model, record_of(measured.quantized["fx"])
    assert record is not None
    kept = ", ".join(f"`{path}`" for path in record.untraced)
    whole = byte_sum(matrices(model).values())
    shares = [f"{100 * coverable_bytes(model, architecture.called, form) / whole:.0f}" for form in ("fx", "eager")]
    size = f"{byte_count(model) / 1e3:.1f} → {byte_count(measured.quantized['fx']) / 1e3:.1f}"
    near = f"{sqnr(measured.expected, measured.results['fx']):.0f}" if record.sites else "–"
    traced = "not" if "" in record.untraced else f"all but {kept}" if kept else "whole"
    return [architecture.name, architecture.paper, traced, str(len(record.sites)), *shares, size, near]


def page() -> str:
    """Return the page's text."""
    return _HEAD + "".join(f"| {' | '.join(cells(architecture))} |\n" for architecture in ARCHITECTURES)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf8")
