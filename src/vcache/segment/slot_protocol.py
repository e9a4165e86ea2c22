"""Copies whole slots, header and payload, as they are: to another slot, or into host memory. By the protocol of `slots.py`,
like a mover that knows no paged cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .mapping import PinnedSlot, SegmentMap
from .slots import HEADER_BYTES, SlotHeader, SlotLocation, formatted_since, outlived

_PIECE_BYTES = 4 * 2**20
"""Of a payload on its way to VRAM, which goes through host memory."""


class SourceSlot(NamedTuple):
    """A shard to copy, where the manager says it is."""

    slot: PinnedSlot
    """Pinned by the caller until the copy is over."""
    location: SlotLocation
    key: bytes
    shard: int


class TargetSlot(NamedTuple):
    """A slot that this process holds a ticket for."""

    slot: PinnedSlot
    """Pinned by the caller until the copy is over."""
    location: SlotLocation
    slab_header: bytes
    """Written first when the slab carries another one."""


def slot_header(segments: SegmentMap, source: SourceSlot) -> SlotHeader | None:
    """The header of a slot if it is complete and names exactly this shard in this generation; None otherwise. Blocks for one
    small copy. Raises `SegmentError`."""
    header = SlotHeader.unpack(_read_header(segments, source.slot))
    location = source.location
    if header is None or header.is_writing or header.generation != location.generation:
        return None
    if (header.key, header.shard, header.tokens) != (source.key, source.shard, location.tokens):
        return None
    return header if 0 < header.payload_bytes <= location.slot_bytes else None


def read_slot(segments: SegmentMap, source: SourceSlot, header: SlotHeader, out: memoryview) -> bool:
    """Copy header and payload into host memory `out` (at least as long as both). False, and `out` means nothing, when the
    slot does not carry `header` (from `slot_header`) any more after the copy. Blocks. Raises `SegmentError`."""
    packed = header.pack()
    out[:HEADER_BYTES] = packed
    segments.read_into(source.slot.slab, source.slot.payload_offset, out[HEADER_BYTES : HEADER_BYTES + header.payload_bytes])
    return _stands(segments, source.slot, header)


def copy_slot(segments: SegmentMap, source: SourceSlot, target: TargetSlot, writer: bytes) -> int:
    """Copy a shard; payload bytes, or 0 when it was refused: the source is not (or did not stay) what the manager says, the
    target is too small, was formatted anew, or holds a newer header than the ticket's.

    The target's header is odd and signed by `writer` (16 bytes) from before the first payload byte until the source has
    proved unchanged; after a refusal it may stay so. Blocks. Raises `SegmentError` when memory cannot be accessed.
    """
    header = slot_header(segments, source)
    if header is None or header.payload_bytes > target.location.slot_bytes:
        return 0
    slot = target.slot
    final = header._replace(generation=target.location.generation)
    odd = final.writing(writer)
    found = SlotHeader.unpack(_read_header(segments, slot))
    if not _format(segments, target) or (found is not None and found.generation > odd.generation):
        return 0
    _write_header(segments, slot, odd.announce_parts())
    _copy_payload(segments, source.slot, slot, header.payload_bytes)
    if not _stands(segments, source.slot, header) or _read_header(segments, slot) != odd.pack():
        return 0
    _write_header(segments, slot, final.publish_parts())
    return header.payload_bytes


def _copy_payload(segments: SegmentMap, source: PinnedSlot, target: PinnedSlot, nbytes: int) -> None:
    buffer = target.slab.buffer
    if buffer is not None:
        segments.read_into(source.slab, source.payload_offset, buffer[target.payload_offset : target.payload_offset + nbytes])
        return
    for done in range(0, nbytes, _PIECE_BYTES):
        piece = segments.read(source.slab, source.payload_offset + done, min(_PIECE_BYTES, nbytes - done))
        segments.write(target.slab, target.payload_offset + done, piece)


def _read_header(segments: SegmentMap, slot: PinnedSlot) -> bytes:
    return segments.read(slot.slab, slot.header_offset, HEADER_BYTES)


def _stands(segments: SegmentMap, slot: PinnedSlot, header: SlotHeader) -> bool:
    """Whether a slot, after its payload was read, still carries the header, and its slab the format that this belongs to."""
    if _read_header(segments, slot) != header.pack():
        return False
    return not outlived(segments.read(slot.slab, 0, HEADER_BYTES), header.generation)


def _format(segments: SegmentMap, target: TargetSlot) -> bool:
    """Write the slab header unless it is there; False when the slab was formatted anew since the ticket was given."""
    raw = segments.read(target.slot.slab, 0, HEADER_BYTES)
    if raw == target.slab_header:
        return True
    if formatted_since(raw, target.slab_header):
        return False
    segments.write(target.slot.slab, 0, target.slab_header)
    return True


def _write_header(segments: SegmentMap, slot: PinnedSlot, parts: Iterable[tuple[int, bytes]]) -> None:
    """Write a slot header part by part; each is complete before the next, and all before anything that follows."""
    for offset, data in parts:
        segments.write(slot.slab, slot.header_offset + offset, data)
