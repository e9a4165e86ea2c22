"""What the world around a directory is made of: models with their prompts, processes, and writes in flight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from vcache.lender.orphans import Orphans
from vcache.manager.api import GateWriter, Ticket, WipeSlots
from vcache.segment.slots import HEADER_BYTES, SlabHeader, SlabInventory, SlotHeader, slab_bytes_for, slab_geometry

SLAB_BYTES = slab_bytes_for(256, 4)
TOKENS = 4
MAX_CHUNKS = 9
CONFIG = {
    "lease_ttl": 8.0,
    "ticket_ttl": 8.0,
    "quarantine": 2.0,
    "session_timeout": 10.0,
    "high_watermark": 0.5,
    "low_watermark": 0.2,
}

Places = dict[tuple[bytes, int, int], list[tuple[int, int]]]
"""(segment, slab, slot) -> its bytes in the slab, as spans."""


@dataclass(frozen=True)
class Variant:
    """A model: its namespace, shards of a chunk, and slot size."""

    name: str
    num_shards: int
    slot_bytes: int

    @property
    def namespace(self) -> bytes:
        return digest("space", self.name)

    def keys(self, prompt: int, count: int) -> list[bytes]:
        """Prompts 0 and 1 share their first two chunks."""
        return [digest(self.name, prompt if prompt > 1 or i > 1 else 0, i) for i in range(count)]


VARIANTS = (Variant("one", 1, 256), Variant("two", 2, 250), Variant("big", 1, 512))


def digest(*parts: object) -> bytes:
    return blake2b(repr(parts).encode(), digest_size=16).digest()


def payload_of(header: SlotHeader) -> bytes:
    return (blake2b(header.key + bytes([header.shard])).digest() * 8)[: header.payload_bytes]


@dataclass(frozen=True)
class Slot:
    """A place in a lender's memory and what its header must say."""

    uuid: bytes
    slab: int
    slot: int
    slot_bytes: int
    header: SlotHeader


@dataclass(eq=False)
class Flight:
    """A granted write and how far its writer has come."""

    client: bytes
    uuid: bytes
    header: SlotHeader
    slab_header: SlabHeader
    slab: int
    slot: int
    epoch: int
    phase: int = 0  # 0 nothing, 1 odd header, 2 half of the payload, 3 all of it, 4 even header: done
    source: Slot | None = None
    """Of a move: what it copies."""
    lease: int = 0
    fence: int = 0
    """Of its ticket: the gate lets nobody begin with another one than that of the last mount."""
    entered: bool = False
    """Through the gate; from then on its header may come at any time."""

    @property
    def under_way(self) -> bool:
        return self.entered and self.phase < 4

    @property
    def ticket(self) -> Ticket:
        return Ticket(self.header.key, self.header.shard, self.header.generation)

    @property
    def spans(self) -> list[tuple[int, int]]:
        geometry = slab_geometry(SLAB_BYTES, self.slab_header.slot_bytes)
        return spans_of(geometry, self.slot)


def spans_of(geometry, slot: int) -> list[tuple[int, int]]:
    """Bytes of a slab that belong to a slot."""
    header, payload = geometry.header_offset(slot), geometry.payload_offset(slot)
    return [(header, header + HEADER_BYTES), (payload, payload + geometry.slot_bytes)]


def overlap(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> bool:
    return any(x[0] < y[1] and y[0] < x[1] for x in a for y in b)


@dataclass(eq=False)
class Client:
    id: bytes
    host: str = "h"
    remote: bool = False
    alive: bool = True
    connected: bool = False
    silent: bool = False
    epoch: int = 0
    flights: list[Flight] = field(default_factory=list)
    uuid: bytes = b""
    kind: str = "host"
    endpoint: str = ""
    room: int = 0
    """How often it was asked to make room."""
    promotion: int = 0
    """How often it was asked to move up what is hot."""
    slabs: dict[int, bytearray] = field(default_factory=dict)
    fence: int = 0
    """Of a lender's write gate, as of its last mount."""
    awaited: set[GateWriter] = field(default_factory=set)
    """Who was amid a write then, as far as the manager has not heard that they have left."""
    orphans: Orphans = field(init=False)
    """As of a lender: what it undoes when they have."""
    next_slab: int = 0
    wipes: list[WipeSlots] = field(default_factory=list)
    lost: dict[bytes, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.orphans = Orphans(self)  # type: ignore[arg-type]

    # What a lender does with its memory, as `LentSlabs` does.

    def inventory(self, indices: Iterable[int]) -> list[SlabInventory]:
        found = []
        for index in indices:
            if index in self.slabs:
                memory = self.slabs[index]
                header = SlabHeader.unpack(memory[:HEADER_BYTES])
                slots = header.slots if header is not None else 0
                headers = bytes(memory[HEADER_BYTES : HEADER_BYTES * (1 + slots)])
                found.append(SlabInventory(index, bytes(memory[:HEADER_BYTES]), headers))
        return found

    def wipe(self, index: int, offset: int) -> None:
        self.slabs[index][offset : offset + HEADER_BYTES] = bytes(HEADER_BYTES)

    def put_slab_header(self, index: int, header: bytes) -> None:
        self.slabs[index][:HEADER_BYTES] = header
