"""The table of what depends on the batch: as measured, and known to explain."""

import json

import torch

from docs import make_batch_independence as made
from fxquant.graph.convert.invariant import DEPENDENT

DATA = json.loads(made.DATA.read_text(encoding="utf8"))


def test_the_page_has_the_measurements():
    assert made.write(DATA) == made.PAGE.read_text(encoding="utf8")


def test_everything_is_measured_and_what_differs_is_known_to_explain():
    known = {row.name for row in DEPENDENT}
    for found in DATA.values():
        assert found.keys() == set(made.NAMES)
        assert {name for name, differences in found.items() if any(differences)} <= known
    assert known == {name for found in DATA.values() for name, differences in found.items() if any(differences)}


def test_a_dependent_operator_is_found_and_ours_are_none():
    sizes = (4, 9, 32, 4)
    planted = made.Probe("planted", made.rows, (lambda x: x + 1e-6 * x.shape[0],))
    assert made.worst(planted, sizes) > 1e-7
    aligned = made.Probe("placed", made.rows, (lambda x: x + 1e-6 * (x.data_ptr() % 64),))
    assert made.worst(aligned, sizes) > 1e-7
    ours = [probe for probe in made.PROBES if probe.name.startswith("fxquant.")]
    assert ours
    assert all(made.worst(probe, sizes) == 0 for probe in ours)


def test_a_machine_that_was_not_measured_is_said_to_be_so():
    name = made.NAMES[0]
    text = made.table({"some AMD": {name: [0.0, 2e-7]}})
    assert f"| {name} | the same / 2e-07 | not measured here |" in text
    assert "not measured here" not in made.table({"some Intel": {name: [0.0, 0.0]}})
    assert torch.equal(made.moved(torch.arange(5.0), 4), torch.arange(5.0))
