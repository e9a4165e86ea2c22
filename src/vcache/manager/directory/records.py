"""What the directory keeps: one `Record` per chunk, and who holds a slot that carries no visible chunk.

A slot's owner is `None` (free), a `Record` (used), a `Write` (used while other shards are missing, processing or
quarantined), a `Wipe` (quarantined until its header is zeroed) or `UNREAD`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...segment.slots import LOCATION_BYTES, SlotLocation

if TYPE_CHECKING:
    from .eviction import Queue
    from .slabs import Slab

FREE, USED, PROCESSING, QUARANTINED = range(4)
"""States of a slot; also indices into `Slab.counts`."""


class Space:
    """A namespace, shared by all its records so that it costs a pointer each; disappears with the last of them."""

    __slots__ = ("__weakref__", "name")

    def __init__(self, name: bytes) -> None:
        self.name = name


class Record:
    """A chunk. Visible with `packed`, being written or a ghost (kept for its children or leases) without.

    One key never has two records at a time, so counts that refer to it survive eviction and return of its bytes.
    """

    __slots__ = (
        "child",
        "children",
        "index",
        "key",
        "newer",
        "older",
        "packed",
        "parent",
        "pins",
        "queue",
        "space",
        "spilled",
        "used",
        "visited",
    )

    def __init__(self, key: bytes, space: Space | None, index: int) -> None:
        self.key = key
        self.space = space
        self.index = index
        """Chunks before it in its prompt. A child's is its parent's plus one, so links cannot form a cycle."""
        self.packed = b""
        """Joined `SlotLocation.pack` of every shard; empty unless all are complete (rule I2)."""
        self.pins = 0
        """Leases that hold it, counted once per mention."""
        self.used = 0
        """Coarse time of the last use, comparable between records."""
        self.visited = False
        self.spilled = False
        """Whether all of it is in the storage tier as well; ends with its bytes here."""
        self.older: Record | None = None
        self.newer: Record | None = None
        self.queue: Queue | None = None
        self.parent: Record | None = None
        self.child: Record | None = None
        """One of the children (the latest linked), when known: the way down to a tail."""
        self.children = 0
        """Records, visible or being written, whose parent this is: they go first."""

    def places(self) -> Iterator[SlotLocation]:
        """Location of every shard, in order."""
        return iter(SlotLocation.unpack_many(self.packed))

    def place(self, shard: int) -> bytes:
        """Packed location of one shard; empty when there is none."""
        return self.packed[LOCATION_BYTES * shard : LOCATION_BYTES * (shard + 1)]


class Write:
    """One granted write, from the ticket until its slot is published or free again.

    With a `source` it is a move: its chunk is visible all the time, elsewhere, so it is part of no `Pending`.
    """

    __slots__ = (
        "deadline",
        "generation",
        "key",
        "lease",
        "packed",
        "shard",
        "slab",
        "slot",
        "source",
        "space",
        "state",
        "ticket",
        "writer",
    )

    def __init__(
        self,
        slab: Slab,
        slot: int,
        key: bytes,
        shard: int,
        generation: int,
        *,
        space: Space | None = None,
        writer: bytes = b"",
        packed: bytes = b"",
        source: bytes = b"",
    ) -> None:
        self.slab = slab
        self.slot = slot
        self.key = key
        self.shard = shard
        self.generation = generation
        """The final, even one."""
        self.space = space
        """None: unknown, because the header does not say it while it is written."""
        self.writer = writer
        """Client id; empty for a shard that was found complete in an inventory."""
        self.packed = packed
        self.source = source
        """Packed location from which a move copies; empty for every other write."""
        self.lease = 0
        """Of a move: number of the lease that its plan took."""
        self.state = PROCESSING
        self.deadline = 0.0
        """Processing: when the ticket lapses. Used: when the chunk must be complete. Quarantined: when the slot is free, or 0
        while that depends on what we hear of the writer."""
        self.ticket: tuple[bytes, int, int] = (key, shard, generation)
        """Its name among the writer's writes."""


class Wipe:
    """Holds a slot whose header must be zeroed before anything else may be written there."""

    __slots__ = ("slab", "slot", "token")

    def __init__(self, slab: Slab, slot: int, token: int) -> None:
        self.slab = slab
        self.slot = slot
        self.token = token


class Unread:
    """Holds the slots of a mounted slab whose headers have not been read yet."""

    __slots__ = ()


UNREAD = Unread()
Owner = Record | Write | Wipe | Unread


class Pending:
    """A chunk whose shards are not all complete."""

    __slots__ = ("num_shards", "parts", "record")

    def __init__(self, record: Record, num_shards: int) -> None:
        self.record = record
        self.num_shards = num_shards
        self.parts: dict[int, Write] = {}
        """By shard: processing or used, never quarantined."""

    def is_found(self) -> bool:
        """Whether all that there is comes from inventories. A damaged header may be among it: it gives way to a writer."""
        return not any(part.writer for part in self.parts.values())

    def complete(self) -> bool:
        return len(self.parts) == self.num_shards and all(part.state == USED for part in self.parts.values())


def state_of(owner: Owner | None) -> int:
    """State of the slot that `owner` holds."""
    if owner is None:
        return FREE
    if isinstance(owner, Record):
        return USED
    return owner.state if isinstance(owner, Write) else QUARANTINED
