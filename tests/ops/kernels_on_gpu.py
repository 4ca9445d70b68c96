"""How tests run Triton's kernels: on a CUDA device where there is one, else by Triton's interpreter on the CPU.

The interpreter is chosen when Triton is imported: tests/conftest.py does, where there is no GPU.
"""

import pytest
import torch
from torch.utils import _pytree as pytree

from fxquant.ops import KERNELS, gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not gpu.is_installed(), reason="Triton is not installed: pip install 'fxquant[gpu]'")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
USES_KERNELS = [
    needs_triton,
    pytest.mark.usefixtures("triton_kernels"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # numpy's, of what floats are meant to do
]
"""The marks of tests that run Triton's kernels."""

TRUNCATES = "Triton's interpreter truncates where a GPU rounds to bfloat16"


@pytest.fixture
def triton_kernels(monkeypatch):
    """Let Triton's kernels take the tensors of DEVICE."""
    if DEVICE == "cpu":
        monkeypatch.setattr(gpu, "_interprets", True)
    else:
        assert not gpu.why_not(torch.cuda.current_device())


def on_device(arguments):
    """Return arguments with their tensors on DEVICE."""
    return pytree.tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, arguments)


def run_triton(name, *args, **kwargs):
    """Return what an operator's Triton kernels give, on the CPU; None where they do not serve the call."""
    kernel = KERNELS[name]
    a = kernel.arguments(*on_device(args), **on_device(kwargs))
    kernel.check(a)
    out = kernel.run_triton(a)
    return None if out is None else pytree.tree_map(lambda x: x.cpu(), out)


def strides(x):
    """Return a tensor's strides; a dimension of one place has none."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def assert_same_bits(got, expected):
    """Assert that tensors have the same shapes, strides, dtypes and bits; any NaN is like another."""
    for one, other in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert one is not None
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert strides(one) == strides(other)
        if one.is_floating_point():
            assert torch.equal(one.isnan(), other.isnan())
            one, other = (x.nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf) for x in (one, other))
            whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
            one, other = one.view(whole), other.view(whole)
        assert torch.equal(one, other)


def check(name, *args, **kwargs):
    """Assert that an operator's Triton kernels give the bits of the reference on the CPU; return them."""
    kernel = KERNELS[name]
    expected = kernel.reference(kernel.arguments(*args, **kwargs))
    got = run_triton(name, *args, **kwargs)
    assert got is not None, "Triton's kernels do not serve the call"
    assert_same_bits(got, expected)
    return got
