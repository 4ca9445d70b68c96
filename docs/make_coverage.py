"""Write docs/coverage.md from tests/architectures: python -m docs.make_coverage.

Its last section, which needs transformers, is made by docs/make_transformers_coverage.py and kept as it is.
"""

import pathlib

import torch

from fxquant import convert_fx, default_static_qconfig_mapping, prepare_fx
from fxquant.graph.edit import byte_count
from fxquant.graph.record import record_of
from fxquant.graph.why import StaysFloat
from tests.architectures.base import Architecture, byte_sum, coverable_bytes, matrices, measure, sqnr
from tests.architectures.collection import ARCHITECTURES
from tests.architectures.convolutional import CONVOLUTIONAL, make
from tests.samples import leaves

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


_STATIC = """
## Convolutional networks, quantized statically

Under `default_static_qconfig_mapping()`, calibrated on four batches, in the same way small and with random weights
(`tests/architectures/convolutional.py`; the tests hold each to 30 dB, and to the same bits from a file):

- *sites*: static, and where there are others dynamic.
- *float between integers*: what stands in float between static layers, in words of `explain`.

| architecture | sites | quantized, % | float between integers | SQNR, dB |
|---|---|---|---|---|
"""


@torch.no_grad()
def static_cells(name: str) -> list[str]:
    """Return a convolutional architecture's cells of the second table."""
    model, data = make(name)
    quantized = convert_fx(prepare_fx(model, default_static_qconfig_mapping(), data[0]), data=data)
    record = record_of(quantized)
    assert record is not None
    static = sum(site.is_static for site in record.sites)
    rest = f", {len(record.sites) - static} dynamic" if static < len(record.sites) else ""
    floats = (value.kind for value in record.values.floats if value.why.why is not StaysFloat.READS_FLOATS)
    near = min(map(sqnr, leaves(model(*data[0])), leaves(quantized(*data[0]))))
    kinds = ", ".join(f"`{kind}`" for kind in dict.fromkeys(floats))
    return [name, f"{static}{rest}", f"{100 * record.coverage.share:.0f}", kinds or "nothing", f"{near:.0f}"]


TRANSFORMERS = "## Models of transformers"


def _kept() -> str:
    """Return the section that another script makes."""
    _, heading, text = PAGE.read_text(encoding="utf8").partition(f"\n{TRANSFORMERS}")
    return heading + text


def page() -> str:
    """Return the page's text."""
    rows = "".join(f"| {' | '.join(cells(architecture))} |\n" for architecture in ARCHITECTURES)
    return (
        _HEAD + rows + _STATIC + "".join(f"| {' | '.join(static_cells(name))} |\n" for name in CONVOLUTIONAL) + _kept()
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf8")
