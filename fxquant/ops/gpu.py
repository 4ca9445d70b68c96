"""Triton's kernels of the operators: where they run, and what to say where they cannot.

`register` asks `run` for a call that the native library of CPU kernels does not take. An operator's `OnGpu` names its
function, in a module `triton_*` that is imported at the first such call, and the calls that it serves. All tensors of a
call must be on one CUDA device, but for those that `OnGpu.host` names. Triton compiles a kernel when it first runs,
and keeps it on the disk; the kernels give the references' bits. FXQUANT_TRITON=0, read at the first call, switches them
off.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from fxquant.errors import warn

_LEAST_CAPABILITY = (8, 0)  # Triton's own limit
_interprets = False  # tests set it: CPU tensors are taken too, by Triton's interpreter (TRITON_INTERPRET=1)


class OnGpu(NamedTuple):
    """An operator's Triton function.

    module, function: where it is found, in fxquant.ops; it takes the operator's arguments and returns its result.
    serves: (arguments), returns whether it can; the reference runs where not. host: the names of arguments that may be
    on another device, as the sizes of packed sequences are on the CPU.
    """

    module: str
    function: str
    serves: Callable[[Any], bool] = lambda _: True
    host: tuple[str, ...] = ()

    def load(self) -> Callable[[Any], Any]:
        """Return the function; importing it imports Triton."""
        return _load(self.module, self.function)


@functools.cache
def _load(module: str, function: str) -> Callable[[Any], Any]:
    found: Callable[[Any], Any] = getattr(importlib.import_module(f"fxquant.ops.{module}"), function)
    return found


def interprets() -> bool:
    """Return whether Triton's kernels take CPU tensors, by its interpreter: in tests."""
    return _interprets


def is_off() -> bool:
    """Return whether FXQUANT_TRITON=0 switched Triton off."""
    return os.environ.get("FXQUANT_TRITON", "1") == "0"


def is_installed() -> bool:
    """Return whether Triton is."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def why_not(index: int) -> str:
    """Return why Triton's kernels cannot run on a CUDA device, "" where they can; asked once, by running one."""
    if is_off():
        return "FXQUANT_TRITON=0 switched it off"
    if not is_installed():
        return "Triton is not installed; run: pip install 'fxquant[gpu]'"
    if torch.version.hip is not None:
        return "the kernels were made for NVIDIA devices, and tried on no other"
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_CAPABILITY:
        return "Triton needs a device of capability {}.{} or better, this is {}.{}".format(
            *_LEAST_CAPABILITY, *capability
        )
    if torch.cuda.is_current_stream_capturing():
        return ""  # nothing can be tried while a graph is captured
    try:
        _load("triton_values", "probe")(torch.device("cuda", index))
    except Exception as error:  # whatever an installation lacks: a C compiler, ptxas, a driver's symbol
        text = next(iter(str(error).strip().splitlines()), "")
        return f"Triton cannot compile here: {type(error).__name__}: {text}"
    return ""


def version() -> str:
    """Return Triton's version."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # installed under another name, as with torch's nightly builds
        return str(importlib.import_module("triton").__version__)


def state(index: int) -> str:
    """Return what runs the operators on a CUDA device, for people: Triton and its version, or plain torch and why."""
    why = why_not(index)
    return f"plain torch ({why})" if why else f"Triton {version()}"


def summary() -> str:
    """Return what runs the operators on the process's CUDA device, "" without one; no device is begun to find out."""
    if not torch.cuda.is_available():
        return ""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device()
        return f"on {torch.cuda.get_device_name(index)}: {state(index)}"
    if is_off() or not is_installed():
        return f"on CUDA: plain torch ({why_not(0)})"
    return f"on CUDA: Triton {version()}, not tried yet"


@functools.cache
def _is_usable(index: int) -> bool:
    why = why_not(index)
    if why and not is_off():
        warn(
            f"quantized operators run on cuda:{index} in plain torch, 5 to 75 times slower than the float model: {why}",
            category=RuntimeWarning,
        )
    return not why


def find_device(tensors: Iterable[torch.Tensor]) -> torch.device | None:
    """Return the device on which Triton can compute with tensors: theirs, if it is one for all; else None."""
    device: torch.device | None = None
    for tensor in tensors:
        if device is None:
            device = tensor.device
            if not (device.type == "cuda" and _is_usable(device.index)) and not (_interprets and tensor.is_cpu):
                return None
        elif tensor.device != device:
            return None
        if tensor.layout is not torch.strided:
            return None
    return device


def device_for(on_gpu: OnGpu | None, a: Any, tensors: Iterable[torch.Tensor]) -> torch.device | None:
    """Return the device on which Triton's kernels serve a call, None where they do not.

    tensors: those among the arguments, the first operand first.
    """
    device = None if on_gpu is None else find_device(tensors)
    return device if on_gpu is not None and device is not None and on_gpu.serves(a) else None


def run(on_gpu: OnGpu | None, a: Any, tensors: Iterable[torch.Tensor]) -> Any:
    """Return what an operator's Triton kernels give of its arguments, or None where the reference is to run."""
    device = device_for(on_gpu, a, tensors)
    if on_gpu is None or device is None:
        return None
    function = on_gpu.load()
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return function(a)
    with torch.cuda.device(device):
        return function(a)


def is_watched(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether a call must pass torch's dispatcher: for a gradient, mode, transform, trace or subclass."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return True
    records = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
            return True
        if (records and tensor.requires_grad) or tensor.is_neg():
            return True
    return False


def is_dense(x: torch.Tensor) -> bool:
    """Return whether a tensor's numbers fill its memory, in whatever order: torch.empty_like of it lies as it does."""
    return torch.ops.aten.is_non_overlapping_and_dense(x)  # type: ignore[no-any-return]


def has_usual_qparams(a: Any) -> bool:
    """Return whether all scales of a call are single float32 numbers, as models have them."""
    scales = [value for name, value in a._asdict().items() if name.endswith("scale") and value is not None]
    return all(scale.dtype == torch.float32 and scale.numel() == 1 for scale in scales)


def lies_alike(a: Any) -> bool:
    """Return whether two values have one shape and lie in one way, without gaps."""
    return a.a.shape == a.b.shape and a.a.stride() == a.b.stride() and is_dense(a.a) and has_usual_qparams(a)
