"""The worker threads: forks, callers at once, and no more threads than asked for."""

import multiprocessing
import os
import threading
import time

import pytest
import torch

from fxquant.ops import native
from tests.native.cases import int8, kernels, same_bits, usable


@pytest.fixture
def product():
    x, weight, scale = torch.randn(9, 200), int8(500, 200), torch.rand(500)
    return x, weight, scale


def _child(product, expected, queue):
    queue.put(all(same_bits(native.linear(*product), expected) for _ in range(20)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_child_processes_compute_the_same(product, method):
    with kernels(usable()[0], 2):
        expected = native.linear(*product)  # starts the workers, which a forked child does not have
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=_child, args=(product, expected, queue))
        child.start()
        try:
            assert queue.get(timeout=60)
        finally:
            child.join(10)
    assert child.exitcode == 0


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


def test_the_gil_is_released():
    x, weight, scale = torch.randn(512, 2048), int8(4096, 2048), torch.rand(4096)
    ticks = 0
    done = threading.Event()

    def count():
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.0005)

    counter = threading.Thread(target=count)
    with kernels("portable", 1):  # slow enough to be watched
        counter.start()
        native.linear(x[:8], weight, scale)
        done.set()
        counter.join()
    assert ticks > 3
