"""The machine's limits and what reaches them: the loops do what they say, and the arithmetic and tables are right."""

import itertools
import json
import shutil

import pytest
import torch

from benchmarks import limits, roofline, thresholds
from benchmarks.roofline import Operator, Share, render, shares
from benchmarks.thresholds import CHOSEN, Crossings, crossing, crossings, greatest_loss, methods, render_sharing
from fxquant.ops import library

compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="limits are measured with a C compiler")


@pytest.fixture
def fresh():
    """Compile anew, and forget it."""
    limits.compiled.cache_clear()
    yield
    limits.compiled.cache_clear()


@pytest.mark.parametrize(("name", "why"), [("no-such-compiler", "No such file"), ("false", "")])
def test_without_a_compiler_one_error_says_what_to_do(monkeypatch, fresh, name, why):
    monkeypatch.setenv("CC", name)
    with pytest.raises(SystemExit, match=f"{name!r} failed; install one, or name another in .* CC: .*{why}"):
        limits.compiled()


@compiler
def test_every_level_is_read_and_written_by_every_thread(monkeypatch):
    monkeypatch.setattr(limits, "LEVELS", {"L1": 1 << 12, "L3": 1 << 14})
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = limits.rates(seconds=0)
    finally:
        torch.set_num_threads(threads)
    assert list(found) == [f"{verb} {level}, GB/s" for level in ("L1", "L3") for verb in ("read", "write")]
    assert min(found.values()) > 0


@compiler
@pytest.mark.parametrize("isa", limits.PEAKS)
def test_a_peak_counts_what_its_loop_multiplies(isa):
    for name in limits.PEAKS[isa]:
        if isa in limits.usable_isas():
            loop = limits._function(f"fxq_peak_{name}", 1)
            assert 0 < loop(1) * 7 == loop(7)
            assert limits.peak(name, threads=2, seconds=0) > 0


def test_a_shared_cache_is_divided_among_threads_a_private_one_is_not():
    assert limits.level_bytes("L2", 4) == limits.LEVELS["L2"]
    assert limits.level_bytes("L3", 4) == limits.LEVELS["L3"] // 4
    assert limits.level_bytes("L3", 3) % 4096 == 0


def test_a_rate_is_the_sum_of_what_threads_do_a_second(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))  # a second between any two looks
    assert limits.rate([lambda times: 3_000_000_000], seconds=0) == 3


def test_a_share_is_a_median_of_rounds_each_with_its_own_limit():
    assert Share("avx2", 1, "x", [], [5.0, 6.0, 9.0], [10.0, 10.0, 10.0]).percent == 60
    assert Share("avx2", 1, "x", [], [5.0, 10.0], [10.0, 20.0]).percent == 50


def test_an_operators_rate_is_its_units_over_its_time(monkeypatch):
    made = [Operator("product", None, 4_000_000), Operator("row", None, 2_000_000, is_bound_by_reading=True)]
    monkeypatch.setattr(roofline, "operators", lambda: made)
    monkeypatch.setattr(roofline, "measure", lambda calls, *_: {name: [100.0] for name in calls})
    monkeypatch.setattr(roofline, "peak", lambda name, *_: {"maddubs": 80.0}[name])
    monkeypatch.setattr(roofline, "reading", lambda *_: 50.0)
    found = shares("avx2", 1, rounds=2, seconds=0)
    assert [share.reached for share in found] == [[40.0, 40.0], [20.0, 20.0]]
    assert [share.percent for share in found] == [50, 40]


def test_the_operators_count_their_products(monkeypatch):
    monkeypatch.setattr(roofline, "_quantized", lambda *_: None)
    units = {operator.name: operator.units for operator in roofline.operators()}
    assert units["linear 25×256 → 33278"] == 25 * 256 * 33278
    assert units["lstm 512 → 256, 5 layers, 25×16"] == 400 * 1024 * (512 + 256 + 4 * (256 + 256))
    assert units[roofline.ROW] == (256 + 4 + 4) * 33278


def test_the_roofline_renders_a_column_for_each_instruction_set_and_number_of_threads():
    found = [Share(isa, threads, "x", [], [threads], [4]) for isa in ("avx2", "amx") for threads in (1, 2)]
    text = render(found, {1: {"read L1, GB/s": 123.4}, 2: {"read L1, GB/s": 200}})
    assert "| read L1, GB/s | 123 " in text
    assert "avx2, 1" in text
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]] == ["x", "25 %", "50 %", "25 %", "50 %"]


TIMES = {
    1: {"gemv": 1.0, "tiled": 3.0, "packed": 5.0, CHOSEN: 1.0},
    8: {"gemv": 4.0, "tiled": 3.5, "packed": 5.5, CHOSEN: 4.0},
    16: {"gemv": 8.0, "tiled": 4.0, "packed": 3.0, CHOSEN: 6.0},
    32: {"gemv": 16.0, "tiled": 8.0, "packed": 6.0, CHOSEN: 6.0},
}


def test_forms_cross_where_one_is_faster_from_there_on():
    assert crossing(TIMES, "tiled", ["gemv"]) == 8
    assert crossing(TIMES, "packed", ["gemv", "tiled"]) == 16
    assert crossing(TIMES, "gemv", ["tiled"]) is None
    assert crossing({1: {"a": 1, "b": 2}, 2: {"a": 2, "b": 1}, 4: {"a": 1, "b": 2}}, "a", ["b"]) == 4


def test_what_a_choice_loses_is_told_where_it_is_most():
    assert greatest_loss(TIMES) == (2.0, 16)
    assert crossings("amx", (64, 32), TIMES) == Crossings("amx", (64, 32), 8, 16, 2.0, 16)


def test_a_form_that_never_pays_is_not_timed_and_256_bits_have_no_tiles():
    assert methods("amx", (6, 0, 0, 1)) == ["gemv", "tiled"]
    assert methods("amx", (2, 256, 48, 1)) == ["gemv", "tiled", "packed"]
    assert methods("avx2", (7, 8, 8, 1)) == ["gemv", "packed"]


def test_the_tables_have_the_measured_points_beside_the_kernels_own():
    text = thresholds.render([crossings("amx", (64, 32), TIMES)], {"amx": (2, 256, 48, 1 << 17)})
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    assert cells == ["amx", "64×32", "8", "16", "3", "256", "48", "100 % at 16"]
    states = {"awake": {1024: {"1": 2.0, "2": 1.0}}, "asleep": {1024: {"1": 2.0, "2": 3.0}}}
    text = render_sharing({"amx": states}, {"amx": (2, 256, 48, 512)})
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]] == ["amx", "1,024", "never", "1,024"]


@pytest.mark.skipif(not library.available(), reason="thresholds are the native library's")
def test_thresholds_are_found_on_the_kernels_here(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(thresholds, "WEIGHTS", ((64, 32),))
    monkeypatch.setattr(thresholds, "TOKENS", (1, 16))
    monkeypatch.setattr(thresholds, "SHARED_OUTPUTS", (16,))
    monkeypatch.setattr(thresholds, "SLEEP_SECONDS", 1e-4)
    before, isas = library.kernel_info(), [isa for isa in limits.usable_isas() if isa in thresholds.METHODS]
    thresholds.main(["--rounds", "1", "--seconds", "0", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["isa"] for one in found["crossings"]] == isas
    assert all(set(times["64x32"]) == {"1", "16"} for times in found["us"].values())
    assert all(set(times) == {"awake", "asleep"} for times in found["sharing"].values())
    assert library.kernel_info() == before
    assert "table: 2 × least_share" in capsys.readouterr().out


def test_without_the_library_there_are_no_thresholds(monkeypatch):
    monkeypatch.setattr(library, "_library", None)
    assert limits.usable_isas() == []
    with pytest.raises(SystemExit, match="thresholds are the native library's"):
        thresholds._call("thresholds")
