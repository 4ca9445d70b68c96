"""Every test starts from the same seed, on one thread: the suite is to be repeatable and quick on a busy machine."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
