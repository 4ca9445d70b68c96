"""Memory for large outputs, reused once nobody holds it.

A fresh 50 MB tensor costs 13,000 page faults when it is first written, more time than the product that fills it. So
the storages of the last large outputs are kept, up to FXQUANT_OUTPUT_POOL_MB (256; 0 keeps none), and one is used again
when the pool's reference is the only one left: no tensor, view, array or exported capsule holds it. They are
torch's own storages, so that an output can be resized, shared or pickled as any other; one that went to shared memory,
which another process may be reading, is never used again.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


class _Block(NamedTuple):
    """A storage, held by its Python object, which is the same for everybody who asks a tensor for its storage."""

    storage: torch.UntypedStorage
    n_bytes: int  # as it was made: a user may resize it

    def references(self) -> int:
        return sys.getrefcount(self.storage)

    def is_free(self) -> bool:
        """Return whether no tensor has the storage, nobody else its Python object, and no other process its memory."""
        return (
            _use_count is not None
            and _use_count(self.storage._cdata) == 1
            and self.references() == _OWN_REFERENCES
            and not self.storage.is_shared()
        )


_OWN_REFERENCES = _Block(torch.empty(0).untyped_storage(), 0).references()  # Python itself adds some, by its version


class OutputPool:
    """The last large storages, at most `limit_bytes` of them.

    advise: called with the address and size of each new block, to ask the system for huge pages.
    """

    def __init__(self, limit_bytes: int, advise: Callable[[int, int], object]) -> None:
        self.limit_bytes = limit_bytes if _use_count is not None else 0
        self._advise = advise
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return an uninitialized float32 tensor of `shape`, of some megabytes: malloc keeps smaller ones itself."""
        n_bytes = 4 * math.prod(shape)
        with self._lock:
            self._blocks = [block for block in self._blocks if block.storage.nbytes() == block.n_bytes]
            for block in self._blocks:
                if block.n_bytes == n_bytes and block.is_free():
                    return torch.empty(0, dtype=torch.float32, device="cpu").set_(block.storage, 0, shape)  # type: ignore[call-overload, no-any-return]
        out = torch.empty(shape, dtype=torch.float32, device="cpu")
        self._advise(out.data_ptr(), n_bytes)
        if n_bytes <= self.limit_bytes:
            self._keep(_Block(out.untyped_storage(), n_bytes))
        return out

    def held_bytes(self) -> int:
        """Return how much memory the pool keeps alive."""
        return sum(block.storage.nbytes() for block in self._blocks)

    def clear(self) -> None:
        """Forget every storage; those in use stay with their users."""
        with self._lock:
            self._blocks.clear()

    def _keep(self, block: _Block) -> None:
        with self._lock:
            self._blocks.append(block)
            while self.held_bytes() > self.limit_bytes:
                self._blocks.pop(0)


def limit_from_environment() -> int:
    """Return FXQUANT_OUTPUT_POOL_MB in bytes."""
    return int(float(os.environ.get("FXQUANT_OUTPUT_POOL_MB", "256")) * (1 << 20))
