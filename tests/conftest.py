"""Every test starts from the same seed, on one thread: the suite is to be repeatable and quick on a busy machine."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():  # Triton, where it is installed, is then imported as an interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


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
