"""The operators' benchmark: it covers the table, compares like with like, and keeps and draws what it found."""

import json
import sys

import pytest
import torch
from torch import nn

from benchmarks.operators import CASES, MAKERS, cases, macs, main, measure, ratios, sides, torch_ao
from fxquant import OPERATORS

IN_TORCH_AO = {"linear", "lstm", "gru", "lstm_cell", "gru_cell", "rnn_cell", "embedding", "embedding_bag"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield torch.set_num_threads(1)
    torch.set_num_threads(threads)


def test_every_row_of_the_table_has_cases():
    assert set(CASES) == {row.name for row in OPERATORS}


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_the_sides_of_a_case_compute_the_same_and_fxquants_is_quantized(name):
    torch.manual_seed(0)
    calls = sides(*MAKERS[name](3, 16))
    found = {side: call()[0] if isinstance(call(), tuple) else call() for side, call in calls.items()}
    assert set(calls) == {"fxquant", "float"} | ({"torch_ao"} if name in IN_TORCH_AO else set())
    for side in calls.keys() - {"float"}:
        error = (found[side] - found["float"]).pow(2).mean() / found["float"].pow(2).mean()
        assert 0 < error < 0.05**2, side


def test_what_torch_ao_lacks_has_no_side():
    assert torch_ao(nn.RNN(4, 4)) is None


def test_products_are_those_of_weights_with_rows():
    linear = nn.Linear(5, 7, bias=False)
    assert macs(linear, (torch.zeros(2, 3, 5),)) == 2 * 3 * 5 * 7
    assert macs(nn.Embedding(9, 4), (torch.tensor([1, 2]),)) == 0


def test_sides_take_turns():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    times = measure(calls, rounds=3, seconds=0)
    turns = [name for i, name in enumerate(called) if i == 0 or called[i - 1] != name]
    assert turns == ["a", "b"] * 4
    assert {name: len(rounds) for name, rounds in times.items()} == {"a": 3, "b": 3}


def test_ratios_are_paired_by_round():
    assert ratios({"fxquant": [1.0, 2.0], "float": [3.0, 5.0]}, "float") == [3.0, 2.5]


def test_the_encoders_shapes_are_linears():
    name, calls = next(iter(cases("encoder", [])))
    assert name == "linear 16x384x384"
    assert calls["fxquant"]().shape == (16, 384)


def test_a_run_adds_to_its_file_and_draws(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("benchmarks.operators.SIZES", (16,))
    monkeypatch.setattr("benchmarks.operators.ROWS", (1,))
    target, drawing = tmp_path / "figures.json", tmp_path / "figure.svg"
    main(["--operators", "linear", "--rounds", "2", "--json", str(target)])
    main(["--operators", "rnn", "--rounds", "1", "--json", str(target), "--plot", str(drawing)])
    rows = json.loads(target.read_text())["rows"]
    shape = {name: {side: len(rounds) for side, rounds in times.items()} for name, times in rows.items()}
    assert shape == {"linear 1x16": {"fxquant": 2, "float": 2, "torch_ao": 2}, "rnn 1x16": {"fxquant": 1, "float": 1}}
    assert "rnn 1x16" in capsys.readouterr().out
    assert drawing.read_text().count('id="axes_') == 4


def test_drawing_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="--plot needs matplotlib: pip install"):
        main(["--rounds", "0", "--plot", str(tmp_path / "figure.svg")])
