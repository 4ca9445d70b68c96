"""torch.ao's packed objects, as the plain state that they pickle."""

from __future__ import annotations

from typing import Any

import torch

from fxquant.errors import TorchAoError


class Packed:
    """Stands for torch.ao's packed objects while a file is read: keeps the plain state, and packs nothing."""

    state: Any

    def __setstate__(self, pickled: tuple[Any, str]) -> None:
        self.state = pickled[0]


def state_of(held: Any, key: str) -> Any:
    """Return the plain state of a packed object, anything else as it is."""
    if isinstance(held, Packed):
        return held.state
    if not isinstance(held, torch.ScriptObject):
        return held
    try:
        return held.__getstate__()[0]  # type: ignore[attr-defined]
    except Exception as error:
        raise unreadable(key, error) from error


def unreadable(key: str, error: Exception) -> TorchAoError:
    """Return the error for what this torch cannot unpack."""
    return TorchAoError(
        f"torch {torch.__version__} can no longer unpack {key!r} ({type(error).__name__}: {error}); "
        "do it once under an older torch, and write the result with fxquant.save"
    )
