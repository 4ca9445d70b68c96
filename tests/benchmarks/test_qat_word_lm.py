"""The word language model's tuning with 4-bit weights: where it begins, its rates, and a short run from end to end."""

import re

import pytest
import torch
from word_language_model import WordLanguageModel, save_checkpoint, torch_threads

from benchmarks.grouped_accuracy import calibration, mapping_of
from benchmarks.qat_word_lm import COLUMNS, RATES, factor, main, make_optimizer, prepare
from fxquant import convert_fx, prepare_fx
from tests.samples import sqnr


@pytest.fixture(autouse=True)
def one_thread():
    with torch_threads(1):
        yield


def little_model():
    torch.manual_seed(0)
    return WordLanguageModel(words=5, embedding_size=32, hidden_size=32, layers=2).eval()


@pytest.fixture(scope="module")
def both():
    """Return the model that GPTQ rounds, and the one that trains from there."""
    model = little_model()
    data = calibration(model, torch.arange(4000) % 5, 1)
    with torch_threads(1):
        rounded = convert_fx(prepare_fx(model, mapping_of("int4", COLUMNS, "all"), data[0]), data=data)
        return rounded, prepare(model, rounded, "all")


def test_it_begins_at_the_integers_of_gptq(both):
    rounded, prepared = both
    again = convert_fx(prepared)
    assert torch.equal(again.decoder.weight_int4, rounded.decoder.weight_int4)
    assert torch.equal(again.decoder.weight_scale, rounded.decoder.weight_scale)
    assert torch.equal(again.rnn.weight_hh_l1_int4, rounded.rnn.weight_hh_l1_int4)
    plain = convert_fx(prepare_fx(little_model(), mapping_of("int4", COLUMNS, "all"), (torch.zeros(2, 1).long(), None)))
    assert not torch.equal(plain.decoder.weight_int4, rounded.decoder.weight_int4)  # GPTQ did something
    assert sqnr(little_model().decoder.weight, prepared.decoder.weight) > 20


def test_all_but_the_table_trains(both):
    optimizer = make_optimizer(both[1])
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    still = [name for name, parameter in both[1].named_parameters() if id(parameter) not in trained]
    assert still == ["encoder.weight"]
    assert [group["lr"] for group in optimizer.param_groups] == list(RATES.values())


def test_the_rate_rises_and_falls_to_nothing():
    rates = [factor(step, 100) for step in range(101)]
    assert max(rates) == pytest.approx(rates[19], rel=0.01)
    assert rates[0] < 0.06
    assert rates[-1] == 0


def test_a_short_run_prints_and_saves(tmp_path, capsys):
    save_checkpoint(little_model(), tmp_path / "model.safetensors")
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_text("a b c d\n" * (1000 if part == "train" else 8))
    options = ["--data", str(tmp_path), "--checkpoint", str(tmp_path / "model.safetensors"), "--steps", "3"]
    main([*options, "--calibrate", "1", "--tokens", "30", "--quantized", str(tmp_path / "tuned.safetensors")])
    shown = capsys.readouterr().out
    rows = {line.split()[0]: re.findall(r"-?\d+\.\d+", line) for line in shown.splitlines() if line}
    assert {"float", "GPTQ", "tuned"} <= rows.keys()
    assert rows["tuned"][:2] == rows["GPTQ"][:2]
    assert rows["tuned"][2] != rows["GPTQ"][2]
    assert (tmp_path / "tuned.safetensors").is_file()
