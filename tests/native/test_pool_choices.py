"""Whether jobs are shared: the pool's own code with a clock and helpers that are made up (pool_choices.c)."""

import subprocess
from pathlib import Path

import pytest

from tests.native.build import build

JOBS, ALONE_US = 2000, 400  # as in pool_choices.c; shared, a job takes 220 us, and 40 more where somebody is woken


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """Return a function of a scene's name that gives the jobs by the way they went, and the us that all took."""
    program = build(
        tmp_path_factory.mktemp("pool") / "pool_choices", "gcc", [Path(__file__).with_name("pool_choices.c")]
    )

    def run(scene):
        printed = subprocess.run([program, scene], capture_output=True, text=True, check=True, timeout=60).stdout
        return dict(zip(("ready", "waking", "alone", "took"), map(int, printed.split()), strict=True))

    return run


@pytest.mark.parametrize(
    ("scene", "shared", "times_alone"),
    [
        ("quiet", 0.99, 0.56),
        ("sleepy", 0.98, 0.66),  # each job must wake its helper, and is still faster
        ("cold", 0.97, 0.57),  # the first two shared jobs take five times as long as alone
        ("disturbed", 0.97, 0.76),  # twice in a hundred jobs, a helper loses its core for 4 ms
    ],
)
def test_jobs_that_gain_from_helpers_are_shared(play, scene, shared, times_alone):
    counts = play(scene)
    assert counts["ready"] + counts["waking"] >= shared * JOBS, counts
    assert counts["took"] <= times_alone * JOBS * ALONE_US, counts


@pytest.mark.parametrize(
    "scene", ["busy", "useless"]
)  # three of four shared jobs wait 4 ms; all take half as long again
def test_jobs_that_lose_are_seldom_shared(play, scene):
    counts = play(scene)
    assert counts["alone"] >= 0.99 * JOBS, counts
    assert counts["took"] <= 1.05 * JOBS * ALONE_US, counts


def test_cores_that_slow_each_other_down_are_found_out(play):
    # After 200 jobs, a shared one takes 1.25 times as long as alone; for 20 ms after it, one alone takes 1.3 times.
    counts = play("siblings")
    assert counts["alone"] >= 0.8 * JOBS, counts
    assert counts["took"] <= 1.05 * JOBS * ALONE_US, counts
