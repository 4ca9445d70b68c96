"""torch.ao's functions that choose a qconfig by a backend's name: all backends are one here."""

from __future__ import annotations

from fxquant.errors import QConfigError
from fxquant.qconfig import QConfig, default_qat_qconfig, default_static_qconfig

_BACKENDS = ("x86", "fbgemm", "onednn", "qnnpack")


def get_default_qconfig(backend: str = "x86", version: int = 0) -> QConfig:
    """Return default_static_qconfig, whatever the backend: 8 bits are exact on every instruction set here.

    Raises QConfigError for a backend or a version that torch.ao has not.
    """
    if version != 0:
        raise QConfigError(f"the default qconfigs have version 0 alone, got {version!r}")
    _check_backend(backend)
    return default_static_qconfig


def get_default_qat_qconfig(backend: str = "x86", version: int = 1) -> QConfig:
    """Return default_qat_qconfig, whatever the backend and version (0 or 1): 8 bits are exact everywhere here.

    Raises QConfigError for a backend or a version that torch.ao has not.
    """
    if version not in (0, 1):
        raise QConfigError(f"the default qconfigs for training have the versions 0 and 1, got {version!r}")
    _check_backend(backend)
    return default_qat_qconfig


def _check_backend(backend: str) -> None:
    if backend not in _BACKENDS:
        known = ", ".join(_BACKENDS)
        raise QConfigError(f"there is no backend {backend!r}; there are {known}, and all mean the same here")
