"""A checkpoint's file: safetensors, with a digest of the whole file, this entry zeroed, in its metadata.

Read into memory of its own by default: a mapped file that is cut short or rewritten in place, as `cp` does, crashes the
process that uses it or changes its weights.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import pathlib
import struct
import sys
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import load_file

from fxquant.errors import CheckpointError

BLANK = "0" * 64
"""What stands in the place of the digest until the file is signed."""

_CHUNK_BYTES = 1 << 20
_CURE = "write it anew with fxquant.save"
_DTYPES = {
    **{f"F{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"F8_{kind.upper().removesuffix('FN')}": getattr(torch, f"float8_{kind}") for kind in ("e4m3fn", "e5m2")},
    **{f"F8_{kind.upper()}": getattr(torch, f"float8_{kind}") for kind in ("e4m3fnuz", "e5m2fnuz")},
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""How safetensors names the dtypes."""


class _Place(NamedTuple):
    """Where one tensor lies in the file's data: bytes from begin to before end."""

    begin: int
    end: int
    name: str
    dtype: torch.dtype
    shape: list[int]


def sign(path: pathlib.Path) -> None:
    """Write a file's digest into its header, in the place kept for it, and flush the file to the disk."""
    with open(path, "r+b") as file:
        header, digest = _start(file)
        _skip(file, digest)
        place = header.index(f'"{BLANK}"'.encode())
        file.seek(8 + place + 1)
        file.write(digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: str | os.PathLike[str], mmap: bool = False) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Return a file's metadata and its tensors, once its digest is verified: what was read is what was signed.

    mmap: leave the tensors in the file, mapped, for the operating system to read at their first use.
    Raises CheckpointError for a file that is damaged, altered or foreign, OSError where it cannot be read.
    """
    with open(path, "rb") as file:
        header, digest = _start(file)
        metadata = json.loads(header).get("__metadata__", {})
        if "fxquant" not in metadata:
            raise CheckpointError("is a safetensors file, but not one that fxquant.save wrote")
        places = _places(json.loads(header), os.fstat(file.fileno()).st_size - file.tell())
        is_read = not mmap and sys.byteorder == "little" and places is not None
        tensors = {place.name: _read_tensor(file, place, digest) for place in places or ()} if is_read else {}
        _skip(file, digest)
    if metadata.get("sha256") != digest.hexdigest():
        raise CheckpointError("is damaged or was altered: its content does not match its digest")
    if not is_read:  # where its header makes no sense to us, safetensors says why
        tensors = {name: tensor if mmap else tensor.clone() for name, tensor in load_file(path).items()}
    return metadata, tensors


def _start(file: BinaryIO) -> tuple[bytes, Any]:
    """Return a file's header as it stands, and the digest of it with the digest in it zeroed; the data comes next."""
    file.seek(0)
    start = file.read(8)
    if len(start) < 8:
        raise CheckpointError(f"is empty or cut short; {_CURE}")
    (length,) = struct.unpack("<Q", start)
    header = file.read(length) if 8 + length <= os.fstat(file.fileno()).st_size else b""
    if not header.startswith(b"{"):
        raise CheckpointError(f"is cut short, or not a safetensors file; {_CURE}")
    try:
        claimed = json.loads(header).get("__metadata__", {}).get("sha256", "").encode()
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"has a damaged header ({error}); {_CURE}") from error
    return header, hashlib.sha256(start + (header.replace(claimed, BLANK.encode(), 1) if claimed else header))


def _skip(file: BinaryIO, digest: Any) -> None:
    """Take the rest of a file into the digest."""
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)


def _places(header: dict[str, Any], size: int) -> list[_Place] | None:
    """Return where the tensors lie, in the data's order; None unless they fill it without gaps, as safetensors asks."""
    places, end = [], 0
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                begin, stop = entry["data_offsets"]
                places.append(_Place(begin, stop, name, _DTYPES[entry["dtype"]], entry["shape"]))
        for place in sorted(places):
            nbytes = torch.empty(place.shape, dtype=place.dtype, device="meta").nbytes
            if place.begin != end or place.end != end + nbytes:
                return None
            end = place.end
    except (LookupError, TypeError, ValueError, RuntimeError):
        return None
    return sorted(places) if end == size else None


def _read_tensor(file: BinaryIO, place: _Place, digest: Any) -> torch.Tensor:
    """Return the tensor that comes next in a file, and take its bytes into the digest."""
    tensor = torch.empty(place.shape, dtype=place.dtype)
    if tensor.nbytes:
        memory = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
        for start in range(0, tensor.nbytes, _CHUNK_BYTES):  # hashed while it is in the cache
            chunk = memory[start : start + _CHUNK_BYTES]
            if file.readinto(chunk) != len(chunk):  # type: ignore[attr-defined]
                raise CheckpointError(f"was cut short while it was read; {_CURE}")
            digest.update(chunk)
    return tensor
