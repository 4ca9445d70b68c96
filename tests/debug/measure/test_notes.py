"""Measured values in a file: interrupted runs go on, and other runs are refused."""

import json
from contextlib import nullcontext

import pytest
import torch

from fxquant import (
    ArgumentError,
    CheckpointError,
    QConfigMapping,
    int4_dynamic_qconfig,
    sensitivity,
)
from tests.debug.measure.test_sensitivity import EVERYTHING, Branching, Model, data, model, relative_rms

__all__ = ["data", "model"]  # fixtures


def test_an_interrupted_run_goes_on_where_it_stopped(model, data, tmp_path):
    calls, limit = [], 4

    def metric(candidate):
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(relative_rms(model, candidate, data))
        return calls[-1]

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, EVERYTHING, data, metric, resume=tmp_path / "notes.json")
    limit = 100
    found = sensitivity(model, EVERYTHING, data, metric, resume=tmp_path / "notes.json")
    assert len(calls) == 2 + 2 * 3 + 2  # float and quantized once more, to know the run again
    assert found == sensitivity(model, EVERYTHING, data, metric)


@pytest.mark.parametrize(
    "text", ["", "{", "[]\n", '{"values": 3}\n', '{"sites": [], "batches": 4, "ends": []}\n["float"]\n']
)
def test_a_damaged_file_is_an_error(model, data, tmp_path, text):
    (tmp_path / "notes.json").write_text(text)
    with pytest.raises(CheckpointError, match="remove it to start afresh"):
        sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json")


def test_a_file_of_another_run_is_an_error(model, data, tmp_path):
    (tmp_path / "notes.json").write_text(json.dumps({"sites": ["other"], "batches": 4, "ends": [0.0]}) + "\n")
    with pytest.raises(CheckpointError, match="another model, mapping or data"):
        sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json")


def test_a_file_of_another_mapping_for_the_same_sites_is_an_error(model, data, tmp_path):
    sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json")
    coarser = QConfigMapping().set_global(int4_dynamic_qconfig)
    with pytest.raises(CheckpointError, match="another model, mapping or data"):
        sensitivity(model, coarser, data, resume=tmp_path / "notes.json")


@pytest.mark.parametrize("is_traced", [True, False])
def test_a_file_of_other_data_is_an_error(data, tmp_path, is_traced):
    torch.manual_seed(0)
    model = Model().eval() if is_traced else Branching().eval()
    others = [*data[:-1], (data[-1][0] * 1.01,)]
    with nullcontext() if is_traced else pytest.warns(UserWarning, match="the model's own code runs on"):
        whole = sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json")
        with pytest.raises(CheckpointError, match="another metric, data or weights: Σ y² of each batch's float output"):
            sensitivity(model, EVERYTHING, others, resume=tmp_path / "notes.json")
        assert sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json") == whole


def test_a_file_of_other_weights_is_an_error(model, data, tmp_path):
    sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json")
    with torch.no_grad():
        model.second.weight.mul_(1.01)
    with pytest.raises(CheckpointError, match=r"another metric, data or weights: .*; remove it to start afresh"):
        sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json")


def test_a_file_of_another_metric_is_an_error(model, data, tmp_path):
    resume = tmp_path / "notes.json"
    sensitivity(model, EVERYTHING, data, lambda candidate: relative_rms(model, candidate, data), resume=resume)
    with pytest.raises(
        CheckpointError, match=r"another metric.* float and quantized, was 0, 0\.\d+, now it is 1, 1\.0"
    ):
        sensitivity(model, EVERYTHING, data, lambda m: 1 + relative_rms(model, m, data), resume=resume)
    with pytest.raises(CheckpointError, match=r"another metric.*, now it is 0, "):  # 0 of the float model as well
        sensitivity(model, EVERYTHING, data, lambda m: relative_rms(model, m, data[:1]), resume=resume)
    with pytest.raises(CheckpointError, match="another metric"):
        sensitivity(model, EVERYTHING, data, resume=resume)


def test_the_number_of_threads_makes_no_other_run(model, data, tmp_path):
    values = iter([1.0, 2.0, 0, 0, 0, 0, 0, 0, 1.0 + 1e-7, 2.0 - 1e-7])
    for _ in range(2):
        found = sensitivity(model, EVERYTHING, data, lambda m: next(values), resume=tmp_path / "notes.json")
        assert (found.float_metric, found.quantized_metric) == pytest.approx((1.0, 2.0), rel=1e-6)


@pytest.mark.parametrize("torn", ["", '["without 2, bat'])
def test_an_interrupted_run_of_partial_passes_goes_on_too(model, data, tmp_path, torn):
    path, whole = tmp_path / "notes.json", sensitivity(model, EVERYTHING, data)

    def interrupt(work):
        for number, item in enumerate(work):
            if number == 13:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, EVERYTHING, data, resume=path, progress=interrupt)
    kept = path.read_text()
    assert len(kept.splitlines()) == 1 + 13
    path.write_text(kept + torn)
    assert sensitivity(model, EVERYTHING, data, resume=path) == whole
    assert path.read_text().startswith(kept)
    assert len(path.read_text().splitlines()) == 1 + 4 * (2 + 2 * 3)


def test_notes_that_cannot_be_kept_are_an_error_at_once(model, data, tmp_path):
    with pytest.raises(
        ArgumentError, match=r"^resume=.*notes.json' cannot be written: .*; give a file in a folder that exists$"
    ):
        sensitivity(model, EVERYTHING, data, resume=tmp_path / "nowhere" / "notes.json")
