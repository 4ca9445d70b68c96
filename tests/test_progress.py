"""The line that counts batches on a terminal: when it appears, what it says, and that nothing of it stays."""

import io
import re

import pytest
import torch
from torch import nn

import fxquant
from fxquant import convert_fx, default_static_qconfig_mapping, prepare_fx, progress
from fxquant.progress import count_on_terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def lines(self):
        return re.split(r"(?:\x1b\[K)?\r", self.getvalue())[1:]


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by as much as is asked for, instead of by itself."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def run(batches, stream, clock, seconds):
    """Return the batches that are yielded, each of which takes some seconds."""
    seen = []
    for batch in count_on_terminal(batches, stream):
        seen.append(batch)
        clock.now += seconds
    return seen


def test_it_counts_batches_and_says_how_long_the_others_take(clock):
    stream = Terminal()
    assert run([5, 6, 7, 8], stream, clock, 30.0) == [5, 6, 7, 8]
    assert stream.lines() == [
        "1 of 4 batches, 1:30 left",
        "2 of 4 batches, 1:00 left",
        "3 of 4 batches, 0:30 left",
        "\x1b[K",
    ]


def test_without_a_length_it_says_how_long_it_took(clock):
    stream = Terminal()
    assert run(iter("abc"), stream, clock, 65.0) == ["a", "b", "c"]
    assert stream.lines() == ["1 batch in 1:05", "2 batches in 2:10", "\x1b[K"]


def test_a_short_run_shows_nothing(clock):
    stream = Terminal()
    assert run(range(19), stream, clock, 0.1) == list(range(19))
    assert stream.getvalue() == ""


def test_it_is_not_drawn_for_every_batch_of_a_fast_run(clock):
    stream = Terminal()
    run(range(300), stream, clock, 0.01)
    assert 4 <= len(stream.lines()) <= 7  # once in 0.2 s of the last one


def test_a_file_gets_nothing(clock):
    stream = io.StringIO()
    assert run([1, 2], stream, clock, 60.0) == [1, 2]
    assert stream.getvalue() == ""


def test_a_program_without_a_console_goes_on(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert run([1, 2], None, clock, 60.0) == [1, 2]


def test_the_line_is_removed_where_a_run_fails(clock):
    stream = Terminal()
    counted = count_on_terminal([1, 2, 3], stream)
    next(counted)
    clock.now = 10.0
    next(counted)
    counted.close()
    assert stream.lines() == ["1 of 3 batches, 0:20 left", "\x1b[K"]


def _static(data, **options):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)).eval()
    return convert_fx(prepare_fx(model, default_static_qconfig_mapping(), data[0]), data=data, **options)


def test_calibration_is_counted_on_standard_error(clock, monkeypatch, capsys):
    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                clock.now += 5.0
                yield batch

    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    _static(Slow(torch.randn(3, 1, 1, 8, 8)))
    assert stream.lines() == ["0 batches in 0:05", "1 of 3 batches, 0:20 left", "2 of 3 batches, 0:07 left", "\x1b[K"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mapping", [default_static_qconfig_mapping(), {"": fxquant.int4_dynamic_qconfig}])
def test_a_progress_of_ones_own_wraps_the_data(mapping):
    seen = []

    def watched(batches):
        for batch in batches:
            seen.append(batch)
            yield batch

    data = [torch.randn(4, 32) for _ in range(3)]
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    convert_fx(prepare_fx(model, mapping, data[0]), data=data, progress=watched)
    assert list(map(id, seen)) == list(map(id, data))
