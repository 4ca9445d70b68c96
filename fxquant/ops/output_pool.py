"""Memory for large outputs, used again once nobody holds it.

A fresh 50 MB tensor costs 13,000 page faults when it is first written, more time than the product that fills it. So the
storages of the last large outputs are kept, up to FXQUANT_OUTPUT_POOL_MB (256; 0 keeps none), and one is used again when
the pool's reference is the only one left: no tensor, view, array or exported capsule has it any more. They are torch's
own storages, so that an output can be resized, shared or pickled as any other; one that went to shared memory, which
another process may be reading, is never used again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

_LEAST_BYTES = 4 << 20  # below, malloc itself keeps the memory
_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


class OutputPool:
    """The last large storages, at most `limit_bytes` of them.

    advise: called with the address and size of each new block, to ask the system for huge pages.
    """

    def __init__(self, limit_bytes: int, advise: Callable[[int, int], object]) -> None:
        self.limit_bytes = limit_bytes if _use_count is not None else 0
        self._advise = advise
        self._storages: list[tuple[torch.UntypedStorage, int]] = []  # with their sizes: a user may resize one
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], n_bytes: int) -> torch.Tensor:
        """Return an uninitialized float32 tensor of `shape`, which takes n_bytes."""
        if n_bytes < _LEAST_BYTES:
            return torch.empty(shape, dtype=torch.float32)
        with self._lock:
            self._storages = [(storage, size) for storage, size in self._storages if storage.nbytes() == size]
            for storage, size in self._storages:
                if size == n_bytes and self._is_free(storage):
                    return torch.empty(0, dtype=torch.float32).set_(storage, 0, shape)  # type: ignore[arg-type]
        out = torch.empty(shape, dtype=torch.float32)
        self._advise(out.data_ptr(), n_bytes)
        if n_bytes <= self.limit_bytes:
            self._keep(out.untyped_storage())
        return out

    def held_bytes(self) -> int:
        """Return how much memory the pool keeps alive."""
        return sum(storage.nbytes() for storage, _ in self._storages)

    def clear(self) -> None:
        """Forget every storage; those that are in use stay their users'."""
        with self._lock:
            self._storages.clear()

    @staticmethod
    def _is_free(storage: torch.UntypedStorage) -> bool:
        return _use_count is not None and _use_count(storage._cdata) == 1 and not storage.is_shared()

    def _keep(self, storage: torch.UntypedStorage) -> None:
        with self._lock:
            self._storages.append((storage, storage.nbytes()))
            while self.held_bytes() > self.limit_bytes:
                self._storages.pop(0)


def limit_from_environment() -> int:
    """Return FXQUANT_OUTPUT_POOL_MB in bytes."""
    return int(float(os.environ.get("FXQUANT_OUTPUT_POOL_MB", "256")) * (1 << 20))
