"""The formats in which a weight is stored and multiplied: one `Format` each. docs/adding_a_format.md adds one.

Whatever depends on a format asks it. Nothing infers a format from a dtype, a number of bits or a scale's rank: the next
format may share them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

INT16_MAX = 32767  # the end of the range on both sides: -32768 is not used


class Activation(enum.Enum):
    """What a product multiplies weights with: each value is the dtype that such an activation's TensorSpec has."""

    UINT8 = "uint8"
    INT16 = "int16"
    FLOAT = "float32"


def _same(values: torch.Tensor) -> torch.Tensor:
    return values


def _first(values: torch.Tensor, columns: int) -> torch.Tensor:
    return values[..., :columns]


@dataclass(frozen=True, kw_only=True, eq=False)
class Format:
    """How the numbers of a weight are stored, and what a product multiplies them with.

    name: TensorSpec's dtype, and the operators' argument `format`. suffix: of the values' key in a state_dict.
    storage: the dtype of the stored values. bits: of one number. limits: the least and the greatest integer;
    None: no integers. is_whole: whether a TensorSpec must use the limits themselves.
    scale: the dtype of the scales; None: there are none. group_sizes: how many columns of a row may share a scale, as
    TensorSpec.group_size chooses; (): each index of dimension 0 has one scale.
    activation: what a product multiplies with; None: there is no product, only tables have this format. is_table:
    whether tables (embeddings) have it.
    block: how many numbers of a row are packed in how many stored values; an unfinished last block is filled up.
    pack: whole numbers (..., K) of any dtype -> what is stored, (..., stored_columns(K)). unpack: its inverse, given K.
    """

    name: str
    suffix: str
    storage: torch.dtype
    bits: int
    limits: tuple[int, int] | None = None
    is_whole: bool = False
    scale: torch.dtype | None = torch.float32
    group_sizes: tuple[int, ...] = ()
    activation: Activation | None = None
    is_table: bool = False
    block: tuple[int, int] = (1, 1)
    pack: Callable[[torch.Tensor], torch.Tensor] = _same
    unpack: Callable[[torch.Tensor, int], torch.Tensor] = _first

    @property
    def is_symmetric(self) -> bool:
        """Whether its integers stand for numbers of both signs, without a zero point."""
        return self.limits is not None and self.limits[0] < 0

    @property
    def uses_gptq(self) -> bool:
        """Whether `convert_fx(prepared, data=data)` rounds its weights by GPTQ.

        With 8 bits a weight's rounding errors are a sixteenth of those with 4, and the gain is lost in the activations'
        errors.
        """
        return self.bits < 8 and bool(self.group_sizes)

    def stored_columns(self, columns: int) -> int:
        """Return how many stored values a row of so many numbers takes."""
        numbers, stored = self.block
        return -(-columns // numbers) * stored

    def scale_shape(self, rows: int, columns: int, group_size: int) -> tuple[int, ...] | None:
        """Return the shape of the scales of a (rows, columns) weight, or None; group_size: 0 for one scale a row."""
        if self.scale is None:
            return None
        return (rows, -(-columns // group_size)) if self.group_sizes else (rows,)

    def find_group_size(self, columns: int, groups: int) -> int:
        """Return how many columns share a scale where so many columns have so many scales; 0: no size fits. If several
        sizes give one scale, the least.
        """
        return next((size for size in self.group_sizes if -(-columns // size) == groups), 0)

    def __reduce__(self) -> tuple[Callable[[str], Format], tuple[str]]:
        return format_of, (self.name,)  # a copy has the same object

    def __repr__(self) -> str:
        return f"<Format {self.name}>"


def pack_uint4(q: torch.Tensor) -> torch.Tensor:
    """Return values 0–15 packed two a byte along the last dimension, low nibble first, an odd end padded with 0.

    q: (..., D) whole numbers of any dtype -> (..., ceil(D / 2)) uint8.
    """
    q = q.to(torch.uint8)
    if q.shape[-1] % 2:
        q = F.pad(q, (0, 1))
    return q[..., 0::2] | (q[..., 1::2] << 4)


def unpack_uint4(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Return what `pack_uint4` packed: (..., P) uint8 -> (..., columns) uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :columns]


def _pack_int4(q: torch.Tensor) -> torch.Tensor:
    return pack_uint4(q + 8)


def _unpack_int4(packed: torch.Tensor, columns: int) -> torch.Tensor:
    return unpack_uint4(packed, columns).to(torch.int8) - 8


def _pack_int3(q: torch.Tensor) -> torch.Tensor:
    """Return values -4–3 packed 8 in 3 bytes along the last dimension, each plus 4, an unfinished block padded with 0.

    Two values are a pair, the first in the low half of 6 bits. Byte i has pair i + 1 in its upper 6 bits, and in the
    others the bits 2 i and 2 i + 1 of pair 0: so kernels find three pairs in place, and gather one.
    q: (..., D) whole numbers of any dtype -> (..., ceil(D / 8) * 3) uint8.
    """
    q = F.pad((q + 4).to(torch.uint8), (0, -q.shape[-1] % 8))
    q = q.reshape(*q.shape[:-1], q.shape[-1] // 8, 8)
    pairs = q[..., 0::2] | (q[..., 1::2] << 3)
    pieces = torch.stack([pairs[..., 0] >> 2 * i & 3 for i in range(3)], dim=-1)
    return (pairs[..., 1:] << 2 | pieces).flatten(-2)


def _unpack_int3(packed: torch.Tensor, columns: int) -> torch.Tensor:
    stored = packed.reshape(*packed.shape[:-1], packed.shape[-1] // 3, 3)
    pieces = stored & 3
    first = pieces[..., :1] | (pieces[..., 1:2] << 2) | (pieces[..., 2:] << 4)
    pairs = torch.cat((first, stored >> 2), dim=-1)
    return torch.stack((pairs & 7, pairs >> 3), dim=-1).flatten(-3)[..., :columns].to(torch.int8) - 4


INT8 = Format(
    name="int8",
    suffix="_int8",
    storage=torch.int8,
    bits=8,
    limits=(-128, 127),
    activation=Activation.UINT8,
    is_table=True,
)
INT4 = Format(
    name="int4",
    suffix="_int4",
    storage=torch.uint8,
    bits=4,
    limits=(-8, 7),
    scale=torch.bfloat16,  # half the bytes, the whole range of float32; 2**-9 of a scale matters little to 4 bits
    group_sizes=(32, 64, 128),
    activation=Activation.UINT8,
    block=(2, 1),
    pack=_pack_int4,
    unpack=_unpack_int4,
)
INT3 = Format(
    name="int3",
    suffix="_int3",
    storage=torch.uint8,
    bits=3,
    limits=(-4, 3),
    scale=torch.bfloat16,
    group_sizes=(32, 64, 128),
    activation=Activation.UINT8,
    block=(8, 3),
    pack=_pack_int3,
    unpack=_unpack_int3,
)
INT16 = Format(
    name="int16",
    suffix="_int16",
    storage=torch.int16,
    bits=16,
    limits=(-INT16_MAX, INT16_MAX),
    is_whole=True,
    activation=Activation.INT16,
)
UINT8 = Format(name="uint8", suffix="_uint8", storage=torch.uint8, bits=8, limits=(0, 255), is_table=True)
UINT4 = Format(
    name="uint4",
    suffix="_uint4",
    storage=torch.uint8,
    bits=4,
    limits=(0, 15),
    is_table=True,
    block=(2, 1),
    pack=pack_uint4,
    unpack=unpack_uint4,
)
FLOAT16 = Format(
    name="float16",
    suffix="_float16",
    storage=torch.float16,
    bits=16,
    scale=None,
    activation=Activation.FLOAT,
    is_table=True,
)
FLOAT32 = Format(
    name="float32",
    suffix="",
    storage=torch.float32,
    bits=32,
    scale=None,
    activation=Activation.FLOAT,
)
"""A weight that stays as it is beside an operator's quantized ones: no TensorSpec names this format."""

FORMATS = (INT8, INT4, INT3, INT16, UINT8, UINT4, FLOAT16, FLOAT32)
"""All formats."""

_BY_NAME = {known.name: known for known in FORMATS}


def format_of(name: str) -> Format:
    """Return the format of a name; KeyError if there is none."""
    return _BY_NAME[name]
