"""The word language model's benchmark: its arithmetic, and a short run from end to end."""

import json
from types import SimpleNamespace

import pytest
import torch
from word_language_model import WordLanguageModel, save_checkpoint, torch_threads
from word_language_model.options import shapes

from benchmarks.onnx_runtime import FlatState, export_quantized
from benchmarks.word_language_model import (
    VARIANTS,
    faults_a_call,
    lower_bound_ms,
    main,
    median_call_ms,
    run_variant,
    time_shape,
)


@pytest.fixture(autouse=True)
def one_thread():
    with torch_threads(1):
        yield


def test_the_first_quarter_is_warm_up(monkeypatch):
    calls_ms = [900, 900, 1, 2, 3, 4, 5, 6]
    instants = iter([0.0, *(t for i, ms in enumerate(calls_ms) for t in (i, i + ms / 1e3))])
    clock = SimpleNamespace(perf_counter=lambda: next(instants, 1e9))
    monkeypatch.setattr("benchmarks.word_language_model.time", clock)
    monkeypatch.setattr("benchmarks.word_language_model.FEWEST_CALLS", len(calls_ms))
    assert median_call_ms(lambda words, hidden: None, None, None, seconds=0) == pytest.approx(3.5)


def test_sides_take_turns_and_begin_in_turn():
    calls = []
    sides = {name: lambda words, hidden, name=name: calls.append(name) for name in ("a", "b")}
    found = time_shape(sides, torch.zeros(1, 1), (), rounds=2, seconds=0.0)
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert turns == ["a", "b", "a"]
    assert {name: len(rounds) for name, rounds in found.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("training", [False, True])
def test_the_wrapper_for_export_has_the_models_mode(training):
    model = WordLanguageModel(3, 8, 8, 2).train(training)
    assert FlatState(model).training is training
    assert all(part.training is training for part in model.modules())


def test_the_export_leaves_the_float_model_as_it_was(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = WordLanguageModel(30, 8, 8, 2).eval()
    example_inputs = (torch.zeros(5, 1, dtype=torch.long), model.init_hidden(1))
    expected = model(*example_inputs)[0]
    export_quantized(model, example_inputs, tmp_path / "q.onnx")
    assert not any(part.training for part in model.modules())
    assert torch.equal(model(*example_inputs)[0], expected)


def test_shapes_are_length_by_batch():
    assert shapes("25x1,3x16") == [(25, 1), (3, 16)]


def test_a_short_run_prints_and_writes(tmp_path, capsys):
    torch.manual_seed(0)
    model = WordLanguageModel(words=3, embedding_size=16, hidden_size=16, layers=2)
    save_checkpoint(model, tmp_path / "model.safetensors")
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_text("a b\n" * 20)
    target = tmp_path / "figures.json"
    options = ["--data", str(tmp_path), "--checkpoint", str(tmp_path / "model.safetensors"), "--json", str(target)]
    main([*options, "--shapes", "5x1,2x3", "--threads", "1", "--rounds", "2", "--seconds", "0.01", "--tokens", "30"])
    shown = capsys.readouterr().out
    figures = json.loads(target.read_text())
    assert figures["machine"]["torch"] == torch.__version__
    assert {"fxquant", "float"} <= {row["side"] for row in figures["quality"]}
    assert all(row["tokens"] == 30 for row in figures["quality"])
    for timing in figures["timings"]:
        ours = next(t for t in figures["timings"] if t["side"] == "fxquant" and t["shape"] == timing["shape"])
        pairs = zip(timing["rounds_ms"], ours["rounds_ms"], strict=True)
        assert timing["ratios"] == pytest.approx([peer / own for peer, own in pairs])
        assert timing["shape"] in shown


def test_a_lower_bound_is_weights_read_and_scores_written():
    model = WordLanguageModel(words=30, embedding_size=8, hidden_size=4, layers=1)
    weights = 4 * 4 * (8 + 4 + 2) + 30 * (4 + 1)
    speeds = {"read L3, GB/s": 2e-6, "write L2, GB/s": 8e-6}
    assert lower_bound_ms(model, 5, 3, speeds) == pytest.approx(weights / 2 + 5 * 3 * 30 * 4 / 8)


def test_faults_are_those_of_fresh_memory():
    kept = torch.zeros(1 << 24)
    assert faults_a_call(lambda *_: kept.fill_(1.0), None, None) < 8
    assert faults_a_call(lambda *_: torch.zeros(1 << 24).fill_(1.0), None, None) >= 32  # 4 KiB pages or huge ones


SHORT = ("--shapes", "2x1", "--threads", "1", "--rounds", "1", "--seconds", "0")


def test_a_variant_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    save_checkpoint(WordLanguageModel(3, 8, 8, 1), tmp_path / "model.safetensors")
    target = tmp_path / "figures.json"
    checkpoint = ("--checkpoint", str(tmp_path / "model.safetensors"))
    main([*checkpoint, *SHORT, "--variants", "plain,reused", "--json", str(target)])
    timings = json.loads(target.read_text())["timings"]
    sides = {variant: {t["side"] for t in timings if t["variant"] == variant} for variant in ("plain", "reused")}
    assert {"fxquant", "float", "lower bound"} <= sides["plain"] == sides["reused"]
    assert "reused" in capsys.readouterr().out


def test_an_instruction_set_that_is_not_here_has_no_row(tmp_path, monkeypatch, capsys):
    save_checkpoint(WordLanguageModel(3, 8, 8, 1), tmp_path / "model.safetensors")
    monkeypatch.setitem(VARIANTS, "mmx", {"FXQUANT_ISA": "mmx"})
    assert run_variant("mmx", ["--checkpoint", str(tmp_path / "model.safetensors"), *SHORT], tmp_path) == []
    assert "mmx: not here" in capsys.readouterr().err


def test_an_unknown_variant_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--variants", "plain,mmx"])
    assert "invalid variants value: 'plain,mmx'" in capsys.readouterr().err


def test_a_text_too_short_for_a_shape_is_one_line(tmp_path):
    save_checkpoint(WordLanguageModel(3, 8, 8, 1), tmp_path / "model.safetensors")
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_text("a b\n")
    options = ["--data", str(tmp_path), "--checkpoint", str(tmp_path / "model.safetensors")]
    with pytest.raises(SystemExit, match="25x1 needs 25 words, the test text has 3"):
        main([*options, "--rounds", "1", "--seconds", "0"])
