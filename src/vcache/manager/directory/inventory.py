"""What a lender's slot headers say, judged. The bytes are not trusted: whatever is not sane is not believed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

from ...errors import ProtocolError
from ...segment.slots import ALIGNMENT, HEADER_BYTES, SegmentInfo, SlabGeometry, SlabHeader, SlabInventory, SlotHeader
from .slabs import MAX_SLOTS, geometry_of

GENERATION_LIMIT = 2**63
"""Generations are nanoseconds since 1970 and some; nothing honest comes near."""
_EMPTY = bytes(HEADER_BYTES)


class Verdict(Enum):
    """What a slot header is."""

    EMPTY = auto()
    STRANGE = auto()
    """Not believed."""
    BROKEN = auto()
    """Not believed, and it would keep every writer away: an impossible generation."""
    WRITING = auto()
    """An unfinished write; `namespace` is the writer's client id."""
    CHUNK = auto()
    """A complete shard."""


class SlabHeaders(NamedTuple):
    """The headers of one formatted slab."""

    format_generation: int
    geometry: SlabGeometry
    raw: bytes
    """All slot headers, joined."""

    def judge(self, slot: int) -> tuple[Verdict, SlotHeader | None]:
        """Judge the header of a slot; the header itself unless it is empty or makes no sense at all."""
        raw = self.raw[slot * HEADER_BYTES : (slot + 1) * HEADER_BYTES]
        if raw == _EMPTY:
            return Verdict.EMPTY, None
        header = SlotHeader.unpack(raw)
        if header is None:
            return Verdict.STRANGE, None
        if header.generation >= GENERATION_LIMIT:
            return Verdict.BROKEN, None
        if header.generation <= self.format_generation:
            return Verdict.STRANGE, header
        if header.is_writing:
            return Verdict.WRITING, header
        return (Verdict.CHUNK if is_sane(header, self.geometry) else Verdict.STRANGE), header


def check_inventory(info: SegmentInfo, inventory: Sequence[SlabInventory]) -> dict[int, SlabHeaders]:
    """Sort out the headers of formatted slabs, by slab index. Raises `ProtocolError` for an inventory that does not fit the
    segment (unknown or repeated slabs, wrong lengths). O(slabs)."""
    sizes = {slab.index: slab.nbytes for slab in info.slabs}
    seen: set[int] = set()
    found: dict[int, SlabHeaders] = {}
    for item in inventory:
        if item.slab not in sizes or item.slab in seen:
            raise ProtocolError(f"inventory: slab {item.slab} is not in the segment, or comes twice")
        if len(item.slab_header) != HEADER_BYTES or len(item.slot_headers) % HEADER_BYTES:
            raise ProtocolError(f"inventory: slab {item.slab}: headers are {HEADER_BYTES} bytes each")
        seen.add(item.slab)
        headers = _check_slab(sizes[item.slab], item)
        if headers is not None:
            found[item.slab] = headers
    return found


def _check_slab(nbytes: int, item: SlabInventory) -> SlabHeaders | None:
    """Read a slab's header; None: unformatted, or formatted by nobody we know. Raises `ProtocolError` when slot headers are
    missing."""
    header = SlabHeader.unpack(item.slab_header)
    if header is None or not 0 < header.slot_bytes <= nbytes or header.slot_bytes % ALIGNMENT:
        return None
    geometry = geometry_of(nbytes, header.slot_bytes)
    if geometry.slots != header.slots or geometry.slots > MAX_SLOTS or header.format_generation >= GENERATION_LIMIT:
        return None
    if len(item.slot_headers) != geometry.slots * HEADER_BYTES:
        given = len(item.slot_headers) // HEADER_BYTES
        raise ProtocolError(f"inventory: slab {item.slab}: {given} slot headers for {geometry.slots} slots")
    return SlabHeaders(header.format_generation, geometry, item.slot_headers)


def is_sane(header: SlotHeader, geometry: SlabGeometry) -> bool:
    """Whether a complete header describes something that fits into its slot."""
    return (
        0 < header.tokens < 2**16
        and 0 < header.payload_bytes <= geometry.stride
        and header.shard < header.num_shards
        and header.payload_bytes % header.tokens == 0
    )
