"""Write docs/coverage.md from tests/architectures: python -m docs.make_coverage."""

import pathlib

from fxquant.graph.edit import byte_count
from fxquant.graph.record import record_of
from tests.architectures.base import Architecture, byte_sum, coverable_bytes, matrices, measure, sqnr
from tests.architectures.collection import ARCHITECTURES

PAGE = pathlib.Path(__file__).parent / "coverage.md"

_HEAD = """# Coverage

The table lists published architectures, each implemented in a small size from its paper, with random weights
(`tests/architectures/`). It is made by `python -m docs.make_coverage`. The tests check each architecture, both with
`prepare_fx` and `convert_fx` and with `quantize_dynamic`:

- Every matrix that can be quantized is quantized, by a list derived from the float model's modules alone. Every other
  matrix has a reason.
- The outputs are those of an independent simulation, which rounds the float model's weights and activations by the
  equations of [numerics](numerics.md). They have the same bits. Where recurrent layers, attention or folded
  normalizations round in a different order, they are closer to the simulation than the simulation is to the float
  model.
- A sample has the same bits whatever its neighbours in the batch are. With `batch_invariant=True` it also has the same
  bits alone, unless `explain` names something that torch computes in a different order in a different batch (small
  convolutions, for example).

The columns:

- *traced*: "whole" if `prepare_fx` makes one graph of the model. "all but" names the parts that do not trace: the graph
  calls them, and they are quantized inside. "not": the model's own code keeps running, and is quantized inside.
- *sites*: the number of quantized modules and calls.
- *quantized*: the share of the bytes of all matrices (parameters of two or more dimensions) that became int8. Small
  convolutions stay float, and so do matrices that are only added, such as positions.
- *eager*: the same share with `quantize_dynamic`, which does not reach functional calls.
- *kB*: the size of parameters and buffers.
- *SQNR*: the power of the float model's outputs divided by the power of the quantization error. With random weights it
  only shows that nothing goes wrong on the way; [results](results.md) has the loss of a trained model.

| architecture | paper | traced | sites | quantized, % | eager, % | kB, float → int8 | SQNR, dB |
|---|---|---|---|---|---|---|---|
"""


def cells(architecture: Architecture) -> list[str]:
    """Return an architecture's cells of the table."""
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
