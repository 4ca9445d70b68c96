"""Describe what a speed measurement depends on: the machine, the versions, the load."""

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import fxquant

# The instructions that int8 kernels are written for; the rest of the list is noise.
FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")


def describe_machine() -> dict[str, object]:
    """Return the processor, its int8 instructions, the versions of what was measured, the load and the date."""
    model, flags = _read_cpuinfo()
    return {
        "cpu": model,
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "fxquant": fxquant.__version__,
        "kernel": str(fxquant.kernel_info()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read_cpuinfo() -> tuple[str, set[str]]:
    """Return the processor's name and flags. Only Linux has the file; elsewhere the flags are unknown."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf8") if path.exists() else ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = fields.get("flags") or fields.get("features") or ""
    return fields.get("model name") or platform.processor() or platform.machine(), set(flags.split())
