"""What is kept of chunks: one `Record` each, in one of the queues of eviction while it is visible."""

from __future__ import annotations

from collections.abc import Iterator

from ...segment.slots import LOCATION_BYTES, SlotLocation


class Namespace:
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
        "leased",
        "namespace",
        "newer",
        "older",
        "packed",
        "parent",
        "queue",
        "spilled",
        "used",
        "visited",
    )

    def __init__(self, key: bytes, namespace: Namespace | None, index: int) -> None:
        self.key = key
        self.namespace = namespace
        self.index = index
        """Chunks before it in its prompt. A child's is its parent's plus one, so links cannot form a cycle."""
        self.packed = b""
        """Joined `SlotLocation.pack` of every shard; empty unless all are complete (rule I2)."""
        self.leased = 0
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

    def places(self) -> list[SlotLocation]:
        """Unpack the location of every shard, in order."""
        return SlotLocation.unpack_many(self.packed)

    def packed_at(self, shard: int) -> bytes:
        """Return the packed location of one shard; empty when there is none."""
        return self.packed[LOCATION_BYTES * shard : LOCATION_BYTES * (shard + 1)]

    def relocate(self, shard: int, packed: bytes) -> None:
        """Point one of the shards elsewhere."""
        at = LOCATION_BYTES * shard
        self.packed = self.packed[:at] + packed + self.packed[at + LOCATION_BYTES :]


class Queue:
    """A circular list of records of one slot size around a sentinel. Not thread-safe.

    Between the records may lie markers: records without a key that stay where they are while all around them moves.
    """

    __slots__ = ("end", "hand", "markers", "size")

    def __init__(self) -> None:
        end = Record(b"", None, 0)
        end.older = end.newer = end
        self.end = end
        """Sentinel: `end.newer` is the oldest record, `end.older` the newest."""
        self.hand: Record | None = None
        """SIEVE: where the next search begins."""
        self.markers: dict[str, Record] = {}
        """By name: how far a scan has come. `index`: when it last began at the oldest record; `used`: the time before."""
        self.size = 0
        """Records, without the markers."""

    def insert(self, record: Record, before: Record) -> None:
        """Put `record` on the older side of `before` (the sentinel: make it the newest)."""
        self._link(record, before)
        record.queue = self
        self.size += 1

    def remove(self, record: Record) -> None:
        self._unlink(record)
        record.queue = None
        self.size -= 1

    def marker(self, name: str) -> Record:
        """Return the marker of this name; a new one lies before the oldest record."""
        marker = self.markers.get(name)
        if marker is None:
            marker = self.markers[name] = Record(b"", None, 0)
            self._link(marker, self.oldest)
        return marker

    def put_marker(self, marker: Record, before: Record) -> None:
        """Move a marker to the older side of `before`."""
        if marker.newer is not before and marker is not before:
            self._unlink(marker)
            self._link(marker, before)

    def drop_marker(self, name: str) -> None:
        """Remove a marker: its scan starts again at the oldest record. Idempotent."""
        marker = self.markers.pop(name, None)
        if marker is not None:
            self._unlink(marker)

    @property
    def oldest(self) -> Record:
        """The oldest record or marker; the sentinel when there is none."""
        oldest = self.end.newer
        assert oldest is not None
        return oldest

    def _link(self, record: Record, before: Record) -> None:
        older = before.older
        assert older is not None
        record.older, record.newer = older, before
        older.newer = before.older = record

    def _unlink(self, record: Record) -> None:
        older, newer = record.older, record.newer
        assert older is not None
        assert newer is not None
        if self.hand is record:
            self.hand = newer
        older.newer, newer.older = newer, older
        record.older = record.newer = None

    def __iter__(self) -> Iterator[Record]:
        """Go through the records from oldest to newest."""
        record = self.end.newer
        while record is not None and record is not self.end:
            if record.key:
                yield record
            record = record.newer
