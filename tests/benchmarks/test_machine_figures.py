"""Memory, tail and threads: their arithmetic, and that what they promise of fxquant's memory holds."""

import json
import sys

import pytest
import torch

from benchmarks import memory, tail, threads


@pytest.mark.skipif(sys.platform != "linux", reason="resident sets are read from /proc")
def test_converting_takes_less_than_a_layer_and_a_loaded_model_a_tenth_beyond_its_integers(tmp_path):
    target, own = tmp_path / "figures.json", torch.ones(1 << 27)  # this process may be larger than those that measure
    memory.main(["--layers", "6", "--json", str(target)])
    del own
    figures = json.loads(target.read_text())["figures"]
    assert figures["float, MB"] == pytest.approx(6 * 2048 * 2049 * 4 / 1e6)
    assert figures["int8 and scales, MB"] == pytest.approx(6 * 2048 * (2048 + 4 + 4) / 1e6)
    assert figures["extra"] < 1
    assert 1 <= figures["held"] <= 1.1


@pytest.mark.parametrize(("percent", "expected"), [(50, 5), (90, 9), (99, 10), (100, 10)])
def test_percentiles_are_nearest_ranks(percent, expected):
    assert tail.percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], percent) == expected


def test_operators_are_called_in_turn_and_the_first_calls_dropped():
    called = []
    times = tail.time_in_turn({name: lambda name=name: called.append(name) for name in "ab"}, 10)
    assert called == ["a", "b"] * 11
    assert {name: len(found) for name, found in times.items()} == {"a": 10, "b": 10}


def test_the_tail_is_measured_alone_and_in_company(tmp_path, capsys):
    tail.main(["--threads", "1", "--calls", "5", "--json", str(tmp_path / "figures.json")])
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    company = {(row["operator"], row["with"]) for row in rows}
    assert {("softmax", "alone"), ("softmax", "fxquant"), ("softmax", "float linear"), ("fxquant", "alone")} <= company
    assert all(0 < row["p50"] <= row["p99"] for row in rows)
    assert "softmax" in capsys.readouterr().out


def test_threads_are_measured_alone_and_beside_a_busy_process(tmp_path, capsys):
    options = ["--only", "linear 1x64", "--rounds", "1", "--seconds", "0.01", "--json", str(tmp_path / "figures.json")]
    threads.main(["--threads", "1,2", *options])
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    found = [(row["beside"], row["threads"]) for row in rows]
    assert found == [(beside, count) for beside in ("nothing", "a busy process") for count in (1, 2)]
    assert all(0 < row["p50"] <= row["p99"] for row in rows)
    assert [row["ratio"] for row in rows if row["threads"] == 1] == [1, 1]
    assert "linear 1x64 to 64" in capsys.readouterr().out
