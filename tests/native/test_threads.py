"""The threads that share a call's work: the same bits however they come, no waiting for absent ones, few wake-ups."""

import contextlib
import faulthandler
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from fxquant.ops import library
from tests.native import native
from tests.native.cases import LIBRARY, int8, kernels, same_bits, usable


@pytest.fixture(autouse=True)
def _no_endless_wait(capfd):
    """End the process, with a traceback, where a test waits for ever: for a piece that nobody does, say."""
    with capfd.disabled():
        real_stderr = os.dup(2)
    faulthandler.dump_traceback_later(400, exit=True, file=real_stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(real_stderr)


@pytest.fixture
def product():
    x, weight, scale = torch.randn(9, 200), int8(500, 200), torch.rand(500)
    return x, weight, scale


@pytest.fixture(params=["waking", "openmp"])
def way(request):
    if request.param == "openmp" and not (library.available() and LIBRARY.use_way("openmp")):
        pytest.skip("torch has no OpenMP library that could be used here")
    if library.available():
        LIBRARY.use_way(None)
    return request.param


@pytest.fixture
def stack():
    """Return an LSTM's operands: two layers of 40 units, 20 steps, 3 rows."""
    weights = [int8(160, 30), int8(160, 40), int8(160, 40), int8(160, 40)]
    scales, biases = [torch.rand(160) / 1000 for _ in weights], [torch.randn(160) for _ in range(2)]
    return torch.randn(20, 3, 30), None, torch.randn(2, 3, 40), torch.randn(2, 3, 40), weights, scales, biases


@contextlib.contextmanager
def held():
    """Let helpers come, but join nothing."""
    LIBRARY.hold_helpers(True)
    try:
        yield
    finally:
        LIBRARY.hold_helpers(False)


def counted(call):
    """Return what the pool's counts grew by."""
    before = LIBRARY.pool_counts()
    call()
    return {name: count - before[name] for name, count in LIBRARY.pool_counts().items()}


def test_nobody_waits_for_a_helper_that_does_not_join(product, stack, isa, way):
    with kernels(isa, 1):
        expected = native.linear(*product), *native.lstm(*stack)
    with kernels(isa, 4, way), held():
        found = []
        counts = counted(lambda: found.extend((native.linear(*product), *native.lstm(*stack))))
    assert counts[way] == 2
    assert counts["joined"] == 0
    assert all(map(same_bits, found, expected))


@pytest.mark.parametrize("threads", [2, 3, 32])
def test_helpers_give_the_same_bits_whenever_they_come(product, stack, isa, way, threads):
    with kernels(isa, 1):
        expected = native.linear(*product), *native.lstm(*stack)
    with kernels(isa, threads, way):
        for _ in range(5):
            assert all(map(same_bits, (native.linear(*product), *native.lstm(*stack)), expected))


OLD_POOL = """
import faulthandler
import torch
from tests.native import native
from tests.native.cases import LIBRARY, int8, kernels, same_bits, usable
product = torch.randn(9, 200), int8(500, 200), torch.rand(500)
with kernels(usable()[0], 1):
    expected = native.linear(*product)
faulthandler.dump_traceback_later(60, exit=True)  # a share that seems to be of a later round is waited for for ever
for threads, jobs in ((4, 1), (2, 1), (2, 1), (2, 40), (4, 1)):  # the rounds of two threads touch two shares
    with kernels(usable()[0], threads):
        assert same_bits(native.linear(*product), expected)
        LIBRARY.skip_rounds((1 << 30) - 10)
        for _ in range(jobs):  # in one of the 40 the number of the round begins again at 0
            assert same_bits(native.linear(*product), expected)
"""


def test_a_pool_that_grew_old_finds_shares_that_no_job_touched_for_long():
    subprocess.run([sys.executable, "-W", "ignore", "-c", OLD_POOL], check=True, timeout=100)


def test_helpers_do_join(product, way):
    with kernels(usable()[0], 2, way):
        joined = (counted(lambda: native.linear(*product))["joined"] for _ in range(2000))
        assert next(filter(None, joined), 0) == 1


def test_small_calls_wake_nobody_and_are_offered_to_nobody(product):
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        counts = counted(lambda: [native.linear(x, *product[1:]) for x in product[0].split(1) for _ in range(50)])
    finally:
        torch.set_num_threads(threads)
    assert not any(counts.values()), counts


def test_calls_that_follow_each_other_wake_a_helper_once_in_a_while(product):
    """However each job gets help: a wake-up a call would cost more than it brings."""
    x, weight, scale = torch.randn(64, 512), int8(1024, 512), torch.rand(1024)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        counts = counted(lambda: [native.linear(x, weight, scale) for _ in range(200)])
    finally:
        torch.set_num_threads(threads)
    assert sum(counts[name] for name in ("ready", "waking", "openmp", "alone")) == 200
    assert counts["wakes"] <= counts["waking"] <= 200


def _child(product, expected, queue):
    queue.put(all(same_bits(native.linear(*product), expected) for _ in range(20)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_child_processes_compute_the_same(product, method, way):
    with kernels(usable()[0], 2, way):
        expected = native.linear(*product)  # starts the helpers, which a forked child does not have
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=_child, args=(product, expected, queue))
        child.start()
        try:
            assert queue.get(timeout=60)
        finally:
            child.join(10)
    assert child.exitcode == 0


FORK_AMID_A_JOB = """
import os, signal, threading, torch
from tests.native import native
from tests.native.cases import int8, kernels, same_bits, usable
x, weight, scale = torch.randn(16, 200), int8(500, 200), torch.rand(500)
with kernels(usable()[0], 1):
    expected = native.linear(x, weight, scale)
done = threading.Event()

def work():
    while not done.is_set():
        native.linear(x, weight, scale)

with kernels(usable()[0], 2):
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    for _ in range(30):
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(not all(same_bits(native.linear(x, weight, scale), expected) for _ in range(3)))
        assert os.waitpid(child, 0)[1] == 0
    done.set()
    worker.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_that_was_forked_amid_a_job_begins_anew():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK_AMID_A_JOB], check=True, timeout=100)


JOIN_IN_A_CHILD = """
import faulthandler, os, torch
from tests.native import native
from tests.native.cases import LIBRARY, int8, kernels, usable
x, weight, scale = torch.randn(9, 200), int8(500, 200), torch.rand(500)

def joined():
    before = LIBRARY.pool_counts()["joined"]
    for _ in range(2000):
        native.linear(x, weight, scale)
        if LIBRARY.pool_counts()["joined"] > before:
            return True
    return False

with kernels(usable()[0], 2, "waking"):
    assert joined()
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(60, exit=True)
        os._exit(not joined())
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_starts_helpers_of_its_own():
    subprocess.run([sys.executable, "-W", "ignore", "-c", JOIN_IN_A_CHILD], check=True, timeout=100)


FORK_AFTER_TORCH = """
import os, torch
from tests.native import native
torch.set_num_threads(2)
x, weight, scale = torch.randn(64, 2048), torch.ones(2048, 2048, dtype=torch.int8), torch.ones(2048)
torch.randn(2000, 2000).exp()  # torch's own threads come to be, and no job of ours has run yet
child = os.fork()
native.linear(x, weight, scale)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_does_not_wait_for_the_threads_of_torch_that_its_parent_had():
    command = [sys.executable, "-W", "ignore", "-c", FORK_AFTER_TORCH]
    subprocess.run(command, check=True, timeout=100)


def test_callers_at_once_get_the_same_bits(product, isa):
    expected, wrong = {}, []
    inputs = [product[0] * (i + 1) for i in range(4)]

    def call(i):
        for _ in range(50):
            if not same_bits(native.linear(inputs[i], *product[1:]), expected[i]):
                wrong.append(i)

    with kernels(isa, 2):
        expected = {i: native.linear(x, *product[1:]) for i, x in enumerate(inputs)}
        threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_more_threads_than_cores_and_than_work(product, isa):
    with kernels(isa, 1):
        expected = native.linear(*product)
    for threads in (3, 7, 32):
        with kernels(isa, threads):
            assert same_bits(native.linear(*product), expected), threads


def test_nothing_spins_while_idle(product):
    with kernels(usable()[0], 2):
        native.linear(*product)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.05


@pytest.fixture
def no_time_slices():
    """Let a Python thread run on until it gives the interpreter lock away itself."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


def test_the_gil_is_released(no_time_slices):
    x, weight, scale = torch.randn(64, 2048), int8(4096, 2048), torch.rand(4096)
    ticks, done = 0, threading.Event()

    def count():
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.0005)

    def ticks_in_a_call():
        before = ticks
        native.linear(x, weight, scale)
        return ticks - before

    counter = threading.Thread(target=count)
    counter.start()
    try:
        with kernels("portable", 1):  # slow enough to be watched: 30 ms
            # torch gives the lock away for an instant where it makes a tensor: a few ticks at most. Where other work
            # has the cores, the counter may miss a call, not all of them.
            assert any(ticks_in_a_call() > 10 for _ in range(20))
    finally:
        done.set()
        counter.join()
