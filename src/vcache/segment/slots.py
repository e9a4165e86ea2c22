"""Slabs, slots and their headers: where things lie in lent memory, and the bytes that make it self-describing.

A slab that holds slots of `slot_bytes` is laid out as

    [0, 64)                      slab header
    [64 * (1 + i), + 64)         header of slot i
    [payload_base + i * stride)  payload of slot i        payload_base, stride: multiples of 256

Generations come from one counter per slab and only grow (rule I4). A slot's is odd while it is written: in which order that
goes, and what proves bytes to be a chunk's, is `slot_protocol.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, overload

import msgspec

from ..errors import SegmentError

HEADER_BYTES = 64
ALIGNMENT = 256
SLAB_MAGIC = int.from_bytes(b"VCSLAB01", "little")
SLOT_MAGIC = int.from_bytes(b"VCS1", "little")

_SLAB = struct.Struct("<QQQI36x")
_SLOT = struct.Struct("<IHHQ16s16sQII")
_LOCATION = struct.Struct("<IHHIIQ")
LOCATION_BYTES = _LOCATION.size

SegmentKind = Literal["cuda", "host"]
Tier = Literal["vram", "dram", "storage"]


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


class SlabGeometry(NamedTuple):
    """Layout of one slab for one slot size. All values in bytes, except `slots`."""

    slot_bytes: int
    slots: int
    payload_base: int
    stride: int

    @staticmethod
    def header_offset(slot: int) -> int:
        """The same for every slot size."""
        return HEADER_BYTES * (1 + slot)

    def payload_offset(self, slot: int) -> int:
        return self.payload_base + slot * self.stride


def slab_geometry(slab_bytes: int, slot_bytes: int) -> SlabGeometry:
    """The layout of a slab of `slab_bytes`. Pure; `slots` may be 0 when not even one fits."""
    if slot_bytes < 1 or slot_bytes >= 2**32 * ALIGNMENT:
        raise SegmentError(f"slot_bytes: must be in [1, {2**32 * ALIGNMENT}), got {slot_bytes}")
    stride = align_up(slot_bytes, ALIGNMENT)
    slots = max(0, (slab_bytes - HEADER_BYTES) // (stride + HEADER_BYTES))
    while slots and align_up(HEADER_BYTES * (1 + slots), ALIGNMENT) + slots * stride > slab_bytes:
        slots -= 1
    return SlabGeometry(slot_bytes, slots, align_up(HEADER_BYTES * (1 + slots), ALIGNMENT), stride)


def slab_bytes_for(slot_bytes: int, slots: int) -> int:
    """Smallest slab that holds `slots` slots of `slot_bytes`, in bytes."""
    return align_up(HEADER_BYTES * (1 + slots), ALIGNMENT) + slots * align_up(slot_bytes, ALIGNMENT)


class SlabHeader(NamedTuple):
    """First 64 bytes of a slab. Slot headers count only when their generation is above `format_generation`: what an earlier
    slot size left behind can then never be taken for a chunk."""

    format_generation: int
    slot_bytes: int
    slots: int

    def pack(self) -> bytes:
        return _SLAB.pack(SLAB_MAGIC, self.format_generation, self.slot_bytes, self.slots)

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> SlabHeader | None:
        """None for a slab that was never formatted (or whose first bytes are not a header)."""
        magic, generation, slot_bytes, slots = _SLAB.unpack(raw)
        return cls(generation, slot_bytes, slots) if magic == SLAB_MAGIC and slot_bytes and slots else None


class SlotHeader(NamedTuple):
    """64 bytes beside a payload.

    While a slot is written its generation is odd and `namespace` holds the **writer's client id** instead, so that a
    restarted manager knows whose unfinished write it must wait for.
    """

    shard: int
    num_shards: int
    generation: int
    key: bytes
    namespace: bytes
    payload_bytes: int
    tokens: int
    chunk_index: int
    """Position of the chunk in its prompt (chunks before it): lets eviction order survive a manager restart."""

    def pack(self) -> bytes:
        return _SLOT.pack(SLOT_MAGIC, *self)

    def writing(self, writer: bytes) -> SlotHeader:
        """The header that announces the write of this one: odd generation, one lower, signed by `writer` (16 bytes)."""
        return self._replace(generation=self.generation - 1, namespace=writer)

    @property
    def is_writing(self) -> bool:
        return bool(self.generation & 1)

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> SlotHeader | None:
        """None when the bytes are not a slot header."""
        magic, *fields = _SLOT.unpack(raw)
        return cls(*fields) if magic == SLOT_MAGIC else None


class SlotLocation(NamedTuple):
    """Address of one shard's bytes. Honoured only while the slot header carries exactly `generation` (rule I4).

    On the wire 24 bytes (`LOCATION_BYTES`), see `pack`.
    """

    segment: int
    """Number that the manager gave the segment, unique within its epoch."""
    slab: int
    tokens: int
    slot: int
    slot_bytes: int
    generation: int

    def pack(self) -> bytes:
        units = -(-self.slot_bytes // ALIGNMENT)
        return _LOCATION.pack(self.segment, self.slab, self.tokens, self.slot, units, self.generation)

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> SlotLocation:
        """Inverse of `pack`; `slot_bytes` comes back rounded up to `ALIGNMENT`."""
        segment, slab, tokens, slot, units, generation = _LOCATION.unpack(raw)
        return cls(segment, slab, tokens, slot, units * ALIGNMENT, generation)

    @classmethod
    def unpack_many(cls, raw: bytes | memoryview) -> list[SlotLocation]:
        """Inverse of joined `pack`s."""
        return [cls(s, b, t, i, units * ALIGNMENT, g) for s, b, t, i, units, g in _LOCATION.iter_unpack(raw)]


class Locations(Sequence[SlotLocation]):
    """Locations as they came, packed and joined: taken apart one by one, by whoever asks for one. Immutable."""

    __slots__ = ("packed",)

    def __init__(self, packed: bytes = b"") -> None:
        """`packed`: joined `SlotLocation.pack`s."""
        self.packed = packed

    @classmethod
    def of(cls, locations: Sequence[SlotLocation]) -> Locations:
        """Any locations, packed: these themselves when they are."""
        return locations if isinstance(locations, Locations) else cls(b"".join(each.pack() for each in locations))

    def __len__(self) -> int:
        return len(self.packed) // LOCATION_BYTES

    @overload
    def __getitem__(self, index: int) -> SlotLocation: ...

    @overload
    def __getitem__(self, index: slice) -> Locations: ...

    def __getitem__(self, index: int | slice) -> SlotLocation | Locations:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return Locations.of(list(self)[index])
            return Locations(self.packed[start * LOCATION_BYTES : max(start, stop) * LOCATION_BYTES])
        at = (index + len(self) if index < 0 else index) * LOCATION_BYTES
        if not 0 <= at < len(self.packed):
            raise IndexError(f"location {index} of {len(self)}")
        return SlotLocation.unpack(self.packed[at : at + LOCATION_BYTES])

    def __iter__(self) -> Iterator[SlotLocation]:
        return iter(SlotLocation.unpack_many(self.packed))

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Locations({list(self)})"


# Packed locations, read without unpacking them: the directory does so for every chunk that it looks at. `_LOCATION` says where
# what lies.


def segment_id(number: int) -> bytes:
    """Name a segment as the packed locations in it do."""
    return number.to_bytes(4, "little")


def slab_id(segment: int, slab: int) -> bytes:
    """Name a slab, within its epoch, as the packed locations in it do."""
    return segment.to_bytes(4, "little") + slab.to_bytes(2, "little")


def segment_ids(packed: bytes) -> list[bytes]:
    """Name the segment of every location of these, joined."""
    return [packed[at : at + 4] for at in range(0, len(packed), LOCATION_BYTES)]


def slab_ids(packed: bytes) -> list[bytes]:
    """Name the slab of every location of these, joined."""
    return [packed[at : at + 6] for at in range(0, len(packed), LOCATION_BYTES)]


def stride_of(packed: bytes) -> int:
    """Read the slot size, rounded up to `ALIGNMENT`, of a packed location, or of the first of joined ones."""
    return int.from_bytes(packed[12:16], "little") * ALIGNMENT


def generation_of(packed: bytes) -> int:
    """Read the generation of a packed location, or of the first of joined ones."""
    return int.from_bytes(packed[16:24], "little")


class SlabInfo(msgspec.Struct, frozen=True, array_like=True):
    """One physical allocation of a segment. `index` is never reused within a segment, even after the slab is gone."""

    index: int
    nbytes: int
    address: int = 0
    """Where the lender's transfer engine has it registered; 0: cannot be read from other hosts."""


class SegmentInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What one lender gives, as everyone sees it."""

    uuid: bytes
    """16 random bytes, kept by the lender for the segment's life, across manager restarts."""
    kind: SegmentKind
    host: str
    """Host identity (boot id): segments of another host cannot be mapped."""
    device: str
    """`"host"`, or the GPU's UUID as `GPU-xxxxxxxx-...`."""
    broker: str
    """Unix socket path where the lender hands out file descriptors."""
    owner: bytes
    """Client id (16 bytes) of the lending process."""
    slabs: tuple[SlabInfo, ...]
    number: int = 0
    """Set by the manager at mount; 0 before."""
    endpoint: str = ""
    """Address of the lender's transfer engine (`host:port`), by which other hosts read; empty: they cannot."""

    @property
    def tier(self) -> Tier:
        return "vram" if self.kind == "cuda" else "dram"

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs)


class SlabInventory(msgspec.Struct, frozen=True, array_like=True):
    """What a lender read from one slab's headers when it mounts: raw bytes, judged by the manager."""

    slab: int
    slab_header: bytes
    """`HEADER_BYTES` bytes."""
    slot_headers: bytes
    """`slots * HEADER_BYTES` bytes; empty for an unformatted slab."""
