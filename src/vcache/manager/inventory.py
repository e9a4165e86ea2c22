"""What a lender's slot headers say, judged. The bytes are not trusted: whatever is not sane is not believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import ProtocolError
from ..segment.slots import (
    ALIGNMENT,
    HEADER_BYTES,
    SegmentInfo,
    SlabGeometry,
    SlabHeader,
    SlabInventory,
    SlotHeader,
)
from .allocator import geometry_of

GENERATION_LIMIT = 2**63
"""Generations are nanoseconds since 1970 and some; nothing honest comes near."""
_EMPTY = bytes(HEADER_BYTES)


@dataclass(slots=True)
class SlabFindings:
    """What one slab's headers tell."""

    format_generation: int = 0
    geometry: SlabGeometry | None = None
    """None: unformatted, or formatted by nobody we know."""
    top: int = 0
    """Highest sane generation seen, slab header included."""
    chunks: list[tuple[int, SlotHeader]] = field(default_factory=list)
    """Slots with a complete chunk."""
    writing: list[tuple[int, SlotHeader]] = field(default_factory=list)
    """Slots with an unfinished write; `namespace` is the writer's client id."""
    broken: list[int] = field(default_factory=list)
    """Slots whose header would keep every writer away: an impossible generation."""
    ignored: int = 0
    """Slots with a header that is not believed."""


def judge_inventory(info: SegmentInfo, inventory: Sequence[SlabInventory]) -> dict[int, SlabFindings]:
    """Findings by slab index. Raises `ProtocolError` for an inventory that does not fit the segment (unknown or repeated
    slabs, wrong lengths); headers with strange content are ignored slot by slot."""
    sizes = {slab.index: slab.nbytes for slab in info.slabs}
    findings: dict[int, SlabFindings] = {}
    for item in inventory:
        if item.slab not in sizes or item.slab in findings:
            raise ProtocolError(f"inventory: slab {item.slab} is not in the segment, or comes twice")
        if len(item.slab_header) != HEADER_BYTES or len(item.slot_headers) % HEADER_BYTES:
            raise ProtocolError(f"inventory: slab {item.slab}: headers are {HEADER_BYTES} bytes each")
        findings[item.slab] = judge_slab(sizes[item.slab], item)
    return findings


def judge_slab(nbytes: int, item: SlabInventory) -> SlabFindings:
    """Findings for one slab of `nbytes`. Raises `ProtocolError` when it is formatted and slot headers are missing."""
    header = SlabHeader.unpack(item.slab_header)
    if header is None or not 0 < header.slot_bytes <= nbytes or header.slot_bytes % ALIGNMENT:
        return SlabFindings()
    geometry = geometry_of(nbytes, header.slot_bytes)
    if geometry.slots != header.slots or header.format_generation >= GENERATION_LIMIT:
        return SlabFindings()
    if len(item.slot_headers) != geometry.slots * HEADER_BYTES:
        given = len(item.slot_headers) // HEADER_BYTES
        raise ProtocolError(f"inventory: slab {item.slab}: {given} slot headers for {geometry.slots} slots")
    found = SlabFindings(header.format_generation, geometry, header.format_generation)
    view = memoryview(item.slot_headers)
    for slot in range(geometry.slots):
        raw = view[slot * HEADER_BYTES : (slot + 1) * HEADER_BYTES]
        if raw != _EMPTY:
            _judge_slot(found, slot, SlotHeader.unpack(raw))
    return found


def _judge_slot(found: SlabFindings, slot: int, header: SlotHeader | None) -> None:
    assert found.geometry is not None
    if header is None:
        found.ignored += 1
    elif header.generation >= GENERATION_LIMIT:
        found.broken.append(slot)
        found.ignored += 1
    else:
        found.top = max(found.top, header.generation)
        if header.generation <= found.format_generation:
            found.ignored += 1
        elif header.is_writing:
            found.writing.append((slot, header))
        elif is_sane(header, found.geometry):
            found.chunks.append((slot, header))
        else:
            found.ignored += 1


def is_sane(header: SlotHeader, geometry: SlabGeometry) -> bool:
    """Whether a complete header describes something that fits into its slot."""
    return (
        0 < header.tokens < 2**16
        and 0 < header.payload_bytes <= geometry.stride
        and header.shard < header.num_shards
        and header.payload_bytes % header.tokens == 0
    )
