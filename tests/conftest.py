"""Every test starts from the same seed, on one thread: the suite is to be repeatable and quick on a busy machine."""

import sys

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Begin with the tests that take long, so that no worker is left with one when the others have finished."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def _repeatable():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
