"""The protocol of slots, in Python: in which order the words of a write go, and what proves that bytes read are a chunk's.

    write   `announce`, payload and trailer, `publish`      once the segment's gate is passed (`gate.py`)
    read    `carries`, payload and trailer, `still_carries`

Nobody writes 64 bytes at once, and a writer may stop for ever after any word. So the odd generation is the first word of an
announcement and the even one the last of a publication, with fences between: what is torn is odd, and is never taken for a
chunk. A writer makes the header odd before it touches the payload, and generations only grow (I4): a header that is the
promised one before and after the payload was read proves that the payload is its own (I1).

`paged/kernels.py` does the same on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from .mapping import MappedSlab, PinnedSlot, SegmentMap
from .shared import Fence
from .slots import HEADER_BYTES, SlabHeader, SlotHeader, SlotLocation

ANNOUNCED = ((8, 16), (0, 8), (16, HEADER_BYTES))
"""Parts in which an odd header is written, each complete before the next: the generation first."""
PUBLISHED = ((0, 8), (16, HEADER_BYTES), (8, 16))
"""Parts in which the final header is written, each complete before the next: the generation last."""

_PIECE_BYTES = 4 * 2**20
"""Of a payload on its way to VRAM, which goes through host memory."""


class SlabMemory(Protocol):
    """The bytes of one slab, as this process gets at them."""

    def read(self, offset: int, nbytes: int) -> bytes | memoryview:
        """Bytes of the slab, as they are now. Raises `SegmentError` when they cannot be accessed."""

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes; everybody sees them before anything that follows. Raises `SegmentError`."""

    def fence(self) -> None:
        """Keep all accesses before it, by whatever way, before all that follow."""


class HostMemory:
    """A slab, or a buffer that looks like one, in host memory: accessed in place."""

    __slots__ = ("buffer", "fence")

    def __init__(self, buffer: memoryview, fence: Fence) -> None:
        self.buffer = buffer
        self.fence = fence

    def read(self, offset: int, nbytes: int) -> bytes | memoryview:
        return self.buffer[offset : offset + nbytes]

    def write(self, offset: int, data: bytes) -> None:
        self.buffer[offset : offset + len(data)] = data
        self.fence()


class PinnedMemory:
    """A pinned slab of any kind, accessed through its backing, which blocks until bytes are there."""

    __slots__ = ("_segments", "_slab")

    def __init__(self, segments: SegmentMap, slab: MappedSlab) -> None:
        self._segments = segments
        self._slab = slab

    def read(self, offset: int, nbytes: int) -> bytes:
        return self._segments.read(self._slab, offset, nbytes)

    def write(self, offset: int, data: bytes) -> None:
        self._segments.write(self._slab, offset, data)

    def fence(self) -> None:
        """Each read and write of a backing keeps its place by itself."""


# -- writing a slot ----------------------------------------------------------------------------------------------------


def announce(memory: SlabMemory, at: int, header: SlotHeader, writer: bytes, slab_header: bytes = b"") -> bytes | None:
    """Write the odd header that announces the write of `header`, signed by `writer` (16 bytes), before the first payload byte.

    `at`: offset of the slot's header. `slab_header`: written first when the slab carries another one; empty for a buffer of
    one's own. Returns the odd header, for `publish`; None when the ticket has lapsed: the slab was formatted anew, or the
    slot's header is newer. Older ones, finished or not, are taken over.
    """
    if slab_header and not _format(memory, slab_header):
        return None
    odd = header.writing(writer)
    found = memory.read(at, HEADER_BYTES)
    if _generation(found) > odd.generation and SlotHeader.unpack(found) is not None:
        return None
    raw = odd.pack()
    _write_parts(memory, at, raw, ANNOUNCED)
    return raw


def publish(memory: SlabMemory, at: int, odd: bytes, header: SlotHeader) -> bool:
    """Write the final header, after the last payload byte; False when the slot does not carry our `odd` one any more, which
    is the end of our ticket: what lies there is somebody else's."""
    memory.fence()
    if memory.read(at, HEADER_BYTES) != odd:
        return False
    _write_parts(memory, at, header.pack(), PUBLISHED)
    return True


def mend_format(memory: SlabMemory, slab_header: bytes) -> bool:
    """Rewrite a slab header of a later format than `slab_header`; whether there was one. Only for who knows, by a valid ticket
    inside the gate, that there is no later format: the header is damaged."""
    if not _formatted_since(memory.read(0, HEADER_BYTES), slab_header):
        return False
    memory.write(0, slab_header)
    return True


def _format(memory: SlabMemory, slab_header: bytes) -> bool:
    """Write the slab header unless it is there; False when the slab was formatted anew since the ticket was given."""
    found = memory.read(0, HEADER_BYTES)
    if found == slab_header:
        return True
    if _formatted_since(found, slab_header):
        return False
    memory.write(0, slab_header)
    return True


def _formatted_since(found: bytes | memoryview, ours: bytes) -> bool:
    there, mine = SlabHeader.unpack(found), SlabHeader.unpack(ours)
    return there is not None and mine is not None and there.format_generation > mine.format_generation


def _write_parts(memory: SlabMemory, at: int, raw: bytes, parts: tuple[tuple[int, int], ...]) -> None:
    """Write a slot header part by part; each is seen before the next, and all before anything that follows."""
    memory.fence()
    for begin, end in parts:
        memory.write(at + begin, raw[begin:end])


# -- reading a slot ----------------------------------------------------------------------------------------------------


def carries(memory: SlabMemory, at: int, header: bytes) -> bool:
    """Whether a slot carries exactly this complete header (packed): asked before its payload is read. `at`: its offset."""
    if memory.read(at, HEADER_BYTES) != header:
        return False
    memory.fence()
    return True


def still_carries(memory: SlabMemory, at: int, header: bytes) -> bool:
    """Whether a slot still carries the header, and its slab no later format, after its payload was read."""
    memory.fence()
    if memory.read(at, HEADER_BYTES) != header:
        return False
    # A buffer of one's own begins with the slot's header, and is of no format.
    return not at or not _outlived(memory.read(0, HEADER_BYTES), _generation(header))


def proved(before: bytes | memoryview, after: bytes | memoryview, slab_header: bytes | memoryview, header: SlotHeader) -> bool:
    """Whether copies of headers prove that a payload is that of `header`: for memory that cannot be looked at in place. Pure.

    `before`: the slot's, made in any order with the payload's, which a lease says was complete. `after`, `slab_header`: the
    slot's and its slab's, made when all of the payload had landed: no byte of it was overwritten before it was read.
    """
    if not before == after == header.pack():
        return False
    return SlabHeader.unpack(slab_header) is not None and not _outlived(slab_header, header.generation)


def complete_header(raw: bytes | memoryview) -> SlotHeader | None:
    """The slot header that these bytes are; None when they are none, or that of an unfinished write. Pure."""
    header = SlotHeader.unpack(raw)
    return None if header is None or header.is_writing else header


def _outlived(slab_header: bytes | memoryview, generation: int) -> bool:
    """Whether a slot header of this generation is older than the format of its slab, read **after** the payload: slots of
    another size lie there now, and an old header may stand while its payload is overwritten."""
    return _generation(slab_header) >= generation


def _generation(header: bytes | memoryview) -> int:
    """Of a slot's header, or the format's of a slab's."""
    return int.from_bytes(header[8:16], "little")


# -- whole slots, as they are ------------------------------------------------------------------------------------------


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
    header = complete_header(segments.read(source.slot.slab, source.slot.header_offset, HEADER_BYTES))
    location = source.location
    if header is None or header.generation != location.generation:
        return None
    if (header.key, header.shard, header.tokens) != (source.key, source.shard, location.tokens):
        return None
    return header if 0 < header.payload_bytes <= location.slot_bytes else None


def read_slot(segments: SegmentMap, source: SourceSlot, header: SlotHeader, out: memoryview) -> bool:
    """Copy header and payload into host memory `out` (at least as long as both). False, and `out` means nothing, when the
    slot does not carry `header` (from `slot_header`) any more after the copy. Blocks. Raises `SegmentError`."""
    slab, at, payload, packed = *source.slot, header.pack()
    out[:HEADER_BYTES] = packed
    segments.read_into(slab, payload, out[HEADER_BYTES : HEADER_BYTES + header.payload_bytes])
    return still_carries(PinnedMemory(segments, slab), at, packed)


def copy_slot(segments: SegmentMap, source: SourceSlot, target: TargetSlot, writer: bytes) -> int:
    """Copy a shard; payload bytes, or 0 when it was refused: the source is not (or did not stay) what the manager says, the
    target is too small, was formatted anew, or holds a newer header than the ticket's.

    The target's header is odd and signed by `writer` (16 bytes) from before the first payload byte until the source has
    proved unchanged; after a refusal it may stay so. Blocks. Raises `SegmentError` when memory cannot be accessed.
    """
    header = slot_header(segments, source)
    if header is None or header.payload_bytes > target.location.slot_bytes:
        return 0
    origin, slot = source.slot, target.slot
    final = header._replace(generation=target.location.generation)
    memory = PinnedMemory(segments, slot.slab)
    odd = announce(memory, slot.header_offset, final, writer, target.slab_header)
    if odd is None:
        return 0
    _copy_payload(segments, origin, slot, header.payload_bytes)
    if not still_carries(PinnedMemory(segments, origin.slab), origin.header_offset, header.pack()):
        return 0
    return header.payload_bytes if publish(memory, slot.header_offset, odd, final) else 0


def _copy_payload(segments: SegmentMap, source: PinnedSlot, target: PinnedSlot, nbytes: int) -> None:
    buffer = target.slab.buffer
    if buffer is not None:
        segments.read_into(source.slab, source.payload_offset, buffer[target.payload_offset : target.payload_offset + nbytes])
        return
    for done in range(0, nbytes, _PIECE_BYTES):
        piece = segments.read(source.slab, source.payload_offset + done, min(_PIECE_BYTES, nbytes - done))
        segments.write(target.slab, target.payload_offset + done, piece)
