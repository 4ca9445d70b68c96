"""The native library of CPU kernels (csrc/): how it is loaded, on which instruction set, and how it gets operands.

The library keeps nothing: every call passes plain tensors. So there is nothing to pack, cache or save, and calls from
several threads are independent. Its functions return None for what they cannot take as it is: tensors that are not
dense (a linear's input: in its last dimension), not of their dtypes, or that somebody watches. FXQUANT_NATIVE=0
switches it off; FXQUANT_ISA=amx, avx512_vnni, avx_vnni, avx2, neon_dot or portable forces an instruction set;
FXQUANT_OPENMP=0 keeps it from the threads of torch's OpenMP. They are read once, the first two at import.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxquant.errors import DTypeError, ModelStateError, ShapeError
from fxquant.ops import gpu
from fxquant.ops.output_pool import OutputPool, limit_from_environment

KERNELS_FILE, OPERATORS_FILE = "libfxquant_kernels.so.1", "libfxquant_ops.so.1"  # as setup.py names them
_INTERFACE = 14  # what module.c says it is: a library left from another version is not called


@dataclass(frozen=True)
class KernelInfo:
    """Which kernels run the quantized operators.

    library: the library's path, None when plain torch does the work; isa: its instruction set; threads: how many
    threads the next call may use; why: why no better library or instruction set is used, empty when there is none;
    operators: the path of the library of operators for programs without Python, None where it was not built; gpu: what
    runs them on the process's CUDA device, "" where there is none.
    """

    library: str | None
    isa: str | None
    threads: int
    why: str
    operators: str | None = None
    gpu: str = ""

    def __str__(self) -> str:
        name = f"{self.isa} kernels" if self.library else "plain torch, no native kernels"
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        on_gpu = f"; {self.gpu}" if self.gpu else ""
        return f"fxquant runs on {name}, {threads}" + (f" ({self.why})" if self.why else "") + on_gpu


def _load() -> tuple[Any, str]:
    """Return the library, or None and why; warn of a library that exists but cannot be used."""
    if os.environ.get("FXQUANT_NATIVE", "1") == "0":
        return None, "FXQUANT_NATIVE=0 switched the native library off"
    try:
        library = importlib.import_module("fxquant._native")
    except ModuleNotFoundError:
        return None, "the native library was not built: pip found no working C compiler"
    except ImportError as error:
        why = f"the native library cannot be loaded: {error}"
    else:
        if getattr(library, "interface", None) == _INTERFACE:
            return library, ""
        why = f"the native library {library.__file__} was built for another version of fxquant; install fxquant again"
    warnings.warn(f"{why}. The quantized operators run in plain torch, much slower.", RuntimeWarning, stacklevel=2)
    return None, why


def _choose_isa(library: Any) -> str:
    """Select FXQUANT_ISA where it is set and possible, and return why not a better instruction set."""
    known: dict[str, str] = dict(library.isas())
    forced = os.environ.get("FXQUANT_ISA", "")
    if forced:
        obstacle = known.get(forced, "there is no such instruction set here; there are " + ", ".join(known))
        if not obstacle and library.select_isa(list(known).index(forced)):
            return f"FXQUANT_ISA={forced}"
        warnings.warn(
            f"FXQUANT_ISA={forced}: {obstacle}. Using {library.active_isa()} instead.", RuntimeWarning, stacklevel=2
        )
    better = list(known)[: list(known).index(library.active_isa())]
    return "; ".join(f"no {name}: {known[name]}" for name in better)


def _introduce_torch(library: Any, exchange: object) -> None:
    """Give the library what it needs of torch; exchange: the capsule of DLPack's exchange interface, or None."""
    floats = {"dtype": torch.float32, "device": torch.device("cpu")}
    library.set_torch(
        (torch.Tensor, torch.nn.Parameter),
        (torch.float32, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.int16, torch.float16),
        (torch.empty, floats, torch.empty_strided, {"dtype": torch.uint8, "device": torch.device("cpu")}),
        (output_pool.empty, torch.get_num_threads, torch.is_grad_enabled),
        (
            torch._C._len_torch_dispatch_stack,
            torch._C._len_torch_function_stack,
            torch._C._are_functorch_transforms_active,
            torch._C._get_tracing_state,
        ),
        exchange,
    )


_library, _why = _load()
output_pool = OutputPool(limit_from_environment(), _library.use_huge_pages if _library is not None else lambda *_: None)
if _library is not None:
    _why = _choose_isa(_library)
    _introduce_torch(_library, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))


def function(name: str) -> Callable[..., Any] | None:
    """Return a function of the library, None where no library is loaded; ModelStateError for one that it lacks.

    An operator's function takes whether it must check first if somebody watches, then the operator's arguments, and
    returns the result, or None.
    """
    if _library is None:
        return None
    function: Callable[..., Any] | None = getattr(_library, name, None)
    if function is None:
        raise ModelStateError(f"the native library {_library.__file__} has no {name!r}; install fxquant again")
    return function


def operators_path() -> str | None:
    """Return the path of the library of operators for programs without Python; None where it was not built.

    `torch.ops.load_library` of it gives a process torch.ops.fxquant without fxquant. Packages of AOTInductor carry it.
    """
    path = Path(__file__).parents[1] / OPERATORS_FILE
    return str(path) if _library is not None and path.exists() else None


def available() -> bool:
    """Return whether the native library is loaded."""
    return _library is not None


def kernel_info() -> KernelInfo:
    """Return which library, instruction set and threads run the quantized operators, and why no better ones."""
    threads = torch.get_num_threads()
    if _library is None:
        return KernelInfo(None, None, threads, _why, None, gpu.summary())
    return KernelInfo(_library.__file__, _library.active_isa(), threads, _why, operators_path(), gpu.summary())


def bare(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy, as a plain torch.Tensor whose memory holds its numbers."""
    return tensor.as_subclass(torch.Tensor).resolve_neg()


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy, bare and dense."""
    return bare(tensor).contiguous()


def floats(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy, as dense float32."""
    return plain(tensor).to(torch.float32)


def is_unwatched(value: Any) -> bool:
    """Return whether an argument is, or holds, only plain tensors on the CPU that no gradient is wanted for."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return value.is_cpu and not (value.requires_grad and torch.is_grad_enabled())
    if isinstance(value, (list, tuple)):
        return all(map(is_unwatched, value))
    return not hasattr(type(value), "__torch_function__")  # subclasses, and what torch.fx traces with


def is_any_mode_active() -> bool:
    """Return whether torch's modes, function transforms or tracers want to see calls of operators."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    )


def in_float32(value: Any) -> Any:
    """Return dense float32 for a tensor of floats, the tensors of a list, or a floating dtype; others as they are."""
    if isinstance(value, list):
        return [in_float32(part) for part in value]
    if isinstance(value, torch.dtype):
        return torch.float32
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(torch.float32, memory_format=torch.contiguous_format) if is_float else value


def vector(name: str, values: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return a scale or bias as dense floats, or raise ShapeError: the kernels read `count` of them."""
    if values is None or values.numel() != count:
        got = "none" if values is None else tuple(values.shape)
        raise ShapeError(f"a quantized operator of {count} rows needs a {name} of shape ({count},), got {got}")
    return floats(values).reshape(count)


def check_dense(x: Any, name: str) -> None:
    """Raise DTypeError unless x is a tensor or torch.fx's proxy of one, neither sparse nor nested."""
    if not isinstance(x, torch.Tensor):
        if not hasattr(type(x), "__torch_function__"):  # as what torch.fx traces with has
            raise DTypeError(f"a quantized {name} takes a tensor, got {type(x).__name__}")
    elif x.is_nested or x.layout is not torch.strided:
        layout, cure = ("nested", "to_padded_tensor(0.0)") if x.is_nested else (str(x.layout), "to_dense()")
        raise DTypeError(f"a quantized {name} takes a dense tensor, got a {layout} one; call x.{cure} before it")
