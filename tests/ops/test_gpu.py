"""Where a call runs: Triton's kernels or the reference, and what is said of it."""

import importlib
import warnings

import pytest
import torch

from fxquant import ops
from fxquant.numerics import quantize_value
from fxquant.ops import KERNELS, gpu
from fxquant.ops.register import Kernel
from tests.ops.kernels_on_gpu import DEVICE, needs_triton, triton_kernels  # noqa: F401

X = torch.randn(3, 8)
SCALE, ZERO_POINT = torch.tensor(0.05), torch.tensor(120, dtype=torch.int32)


@pytest.fixture
def forgets():
    """Let each question be asked again, before and after a test."""
    cached = (gpu.why_not, gpu._is_usable)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def seen(monkeypatch):
    """Let calls of quantize reach Triton's function, which is a list's append here."""
    calls = []
    monkeypatch.setattr(gpu, "_interprets", True)
    monkeypatch.setattr(gpu, "_load", lambda *_: lambda a: calls.append(a) or KERNELS["quantize"].reference(a))
    monkeypatch.setattr(Kernel, "run_native", lambda *_: None)
    return calls


def run(kernel, *args):
    """Call an operator as an eager call does that the native library refuses."""
    return KERNELS[kernel].dispatch(args)


def test_an_operators_row_names_a_function_that_exists():
    rows = [kernel.on_gpu for kernel in KERNELS.values() if kernel.on_gpu is not None]
    assert rows
    if not gpu.is_installed():
        pytest.skip("Triton is not installed: pip install 'fxquant[gpu]'")
    for row in rows:
        assert callable(getattr(importlib.import_module(f"fxquant.ops.{row.module}"), row.function))


def test_a_plain_call_goes_to_triton_without_the_dispatcher(seen, monkeypatch):
    monkeypatch.setitem(ops.OVERLOADS, "quantize", None)
    q = run("quantize", X, SCALE, ZERO_POINT, 255)
    assert torch.equal(q, quantize_value(X, SCALE, ZERO_POINT))
    assert len(seen) == 1


def test_a_watched_call_goes_to_triton_through_the_dispatcher(seen, monkeypatch):
    overload, passed = ops.OVERLOADS["quantize"], []
    monkeypatch.setitem(ops.OVERLOADS, "quantize", lambda *args: passed.append(args) or overload(*args))
    run("quantize", X.clone().requires_grad_(), SCALE, ZERO_POINT, 255)
    with torch.no_grad():
        run("quantize", X.clone().requires_grad_(), SCALE, ZERO_POINT, 255)
    assert len(seen) == 2
    assert len(passed) == 1


def test_a_mode_sees_the_call(seen):
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._opname)
            return func(*args, **(kwargs or {}))

    names = []
    with Watch():
        run("quantize", X, SCALE, ZERO_POINT, 255)
    assert names == ["quantize"]


def test_a_call_that_is_not_served_runs_the_reference(seen):
    q = run("quantize", X, SCALE.double(), ZERO_POINT, 255)
    assert not seen
    assert torch.equal(q, quantize_value(X, SCALE, ZERO_POINT))


def test_tensors_elsewhere_are_no_business_of_triton(monkeypatch):
    assert gpu.find_device([X]) is None
    monkeypatch.setattr(gpu, "_interprets", True)
    assert gpu.find_device([X, SCALE]) == torch.device("cpu")
    assert gpu.find_device([X, SCALE.to("meta")]) is None
    assert gpu.find_device([X.to_sparse()]) is None
    assert gpu.find_device([]) is None


def test_the_switch_turns_triton_off_without_a_warning(monkeypatch, forgets):
    monkeypatch.setenv("FXQUANT_TRITON", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gpu._is_usable(0)
    assert gpu.state(0) == "plain torch (FXQUANT_TRITON=0 switched it off)"


def test_a_gpu_without_triton_warns_once_how_slow_it_is(monkeypatch, forgets):
    monkeypatch.setattr(gpu, "is_installed", lambda: False)
    with pytest.warns(RuntimeWarning, match=r"cuda:0 in plain torch, 5 to 75 times.*pip install 'fxquant\[gpu\]'"):
        assert not gpu._is_usable(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gpu._is_usable(0)


@pytest.mark.parametrize(("capability", "why"), [((7, 5), "capability 8.0 or better, this is 7.5"), ((8, 0), "cannot")])
def test_a_device_that_triton_does_not_take(monkeypatch, forgets, capability, why):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler.\nset CC")

    monkeypatch.setattr(gpu, "is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gpu, "_load", lambda *_: fail)
    assert why in gpu.why_not(0)
    if capability == (8, 0):
        assert gpu.why_not(0) == "Triton cannot compile here: RuntimeError: Failed to find C compiler."


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch, forgets):
    monkeypatch.setattr(gpu, "is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(gpu, "_load", lambda *_: pytest.fail("tried"))
    assert gpu.why_not(0) == ""


def test_what_runs_on_a_gpu_is_said_without_beginning_one(monkeypatch, forgets):
    assert gpu.summary() == "" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(gpu, "version", lambda: "3.9.0")
    monkeypatch.setattr(gpu, "is_installed", lambda: True)
    assert gpu.summary() == "on CUDA: Triton 3.9.0, not tried yet"
    assert str(ops.kernel_info()).endswith("; on CUDA: Triton 3.9.0, not tried yet")
    monkeypatch.setenv("FXQUANT_TRITON", "0")
    assert gpu.summary() == "on CUDA: plain torch (FXQUANT_TRITON=0 switched it off)"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    assert gpu.summary() == "on card 1: plain torch (FXQUANT_TRITON=0 switched it off)"


@needs_triton
def test_the_probe_tells_a_wrong_result(triton_kernels, monkeypatch):  # noqa: F811
    values = importlib.import_module("fxquant.ops.triton_values")
    values.probe(torch.device(DEVICE))
    monkeypatch.setattr(values, "_run", lambda _, out, *args: out.zero_())
    with pytest.raises(RuntimeError, match="wrong result"):
        values.probe(torch.device(DEVICE))
