"""Which chunk goes first: LRU and SIEVE behind one interface, one queue per slot size.

Both never choose a leased record, take the tail of a prefix before its head, and do bounded work per victim. Order in a
queue: oldest to newest, linked through the records themselves, so that a touch and a removal are O(1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Literal

from ...errors import IntegrityError
from ...segment.slots import slab_ids
from .records import Queue, Record

_OURS = "\0"
_SORTED, _WARM, _CURSOR = "\0sorted", "\0warm", "\0cursor"
"""Markers. Between the first two lie the chunks from inventories in the order of their eviction; on the older side of both
those that were not sorted yet."""
MAX_STEPS = 1 << 16
"""Records looked at for one victim at most; beyond it there is none this time, and the next search goes on from there."""


class EvictionPolicy(ABC):
    """Orders the visible records. Records are touched on use, removed before they are forgotten."""

    def __init__(self) -> None:
        self.queues: dict[int, Queue] = {}
        """By slot size in bytes."""
        self._sorts = 0
        self.closed: AbstractSet[bytes] = frozenset()
        """Slabs (`slots.slab_id`) in which room is of no use now."""

    def add(self, record: Record, slot_bytes: int) -> None:
        """Queue a record that became visible. Add a prompt's chunks from tail to head, so that the head is the newest."""
        queue = self.queues.get(slot_bytes)
        if queue is None:
            queue = self.queues[slot_bytes] = Queue()
        queue.insert(record, queue.end)

    def add_cold(self, record: Record, slot_bytes: int) -> None:
        """Queue a record that was found in an inventory; its use is unknown, so it is older than all others. `sort_cold` finds
        its place among its like."""
        queue = self.queues.get(slot_bytes)
        if queue is None:
            queue = self.queues[slot_bytes] = Queue()
        if _SORTED not in queue.markers:
            queue.marker(_WARM)
            queue.marker(_SORTED)
        queue.insert(record, queue.markers[_SORTED])

    def sort_cold(self, records: Iterable[Record], slot_bytes: int, slice_size: int) -> Iterator[None]:
        """Sort records into those that came cold before: higher chunk indices are older. `records`: added by `add_cold`, by
        falling index; those that were used or went meanwhile are left alone. Pauses after
        each `slice_size` steps."""
        queue = self.queues.get(slot_bytes)
        if queue is None or _SORTED not in queue.markers:
            return
        self._sorts += 1
        name, steps = f"{_CURSOR}{self._sorts}", slice_size
        queue.put_marker(queue.marker(name), queue.markers[_SORTED])
        try:
            for record in records:
                cursor, warm = queue.marker(name), queue.marker(_WARM)
                place = cursor.newer
                while place is not None and place is not warm and place is not queue.end and _goes_before(place, record):
                    place, steps = place.newer, steps - 1
                    if steps <= 0 and place is not None:
                        queue.put_marker(cursor, place)
                        yield
                        place, steps = cursor.newer, slice_size
                assert place is not None
                queue.put_marker(cursor, place)
                if record.queue is queue and not record.used:
                    queue.remove(record)
                    queue.insert(record, cursor)
                steps -= 1
                if steps <= 0:
                    yield
                    steps = slice_size
        finally:
            queue.drop_marker(name)
            for other in [other for other in queue.markers if not other.startswith(_OURS)]:
                queue.drop_marker(other)  # Of scans, which have not seen what came in behind them.

    def discard(self, record: Record) -> None:
        """Take a record out of its queue. Idempotent."""
        if record.queue is not None:
            record.queue.remove(record)
        record.visited = False

    def forget_scans(self, name: str) -> None:
        """Drop the markers of this name: nobody will scan under it any more."""
        for queue in self.queues.values():
            queue.drop_marker(name)

    @abstractmethod
    def next_victims(self, queue: Queue, steps: int) -> Iterator[Record]:
        """Go through records in about the order in which they would be evicted, all states; look at `steps` of them at most.
        The queue must not change meanwhile."""

    @abstractmethod
    def cool(self, records: Sequence[Record]) -> None:
        """Have these, in this order, looked at before all others when room is needed."""

    @abstractmethod
    def touch(self, records: Sequence[Record], clock: int) -> None:
        """Note that records, in prompt order, were used at `clock`. A tail never becomes hotter than its head."""

    @abstractmethod
    def victim(self, slot_bytes: int, allowed: frozenset[int] | None) -> Record | None:
        """Choose the record to evict next for a slot of this size, or None. It stays in its queue. Never leased, no children.
        `allowed`: numbers of segments that count (None: all)."""

    def check_integrity(self) -> None:
        """Raises `IntegrityError` when a queue is not a proper list."""
        for slot_bytes, queue in self.queues.items():
            count, before, hand = 0, queue.end, queue.hand is None or queue.hand is queue.end
            markers, record = 0, queue.oldest
            while record is not queue.end:
                if record.older is not before or (record.queue is not queue if record.key else record.queue is not None):
                    raise IntegrityError(f"eviction queue of {slot_bytes} bytes: broken link at {record.key.hex()}")
                hand = hand or record is queue.hand
                count, markers, before = count + bool(record.key), markers + (not record.key), record
                assert record.newer is not None
                record = record.newer
            if (count, markers) != (queue.size, len(queue.markers)) or queue.end.older is not before or not hand:
                raise IntegrityError(
                    f"eviction queue of {slot_bytes} bytes: size {queue.size}, {count} linked, hand found: {hand}"
                )


def _goes_before(other: Record, record: Record) -> bool:
    """Whether `other`, a marker or a chunk from an inventory, stays on the older side of this one."""
    return not other.key or other.index >= record.index


def tail_of(record: Record) -> tuple[Record, int]:
    """Find the end of the chain below `record` as far as links lead, and the number of steps. The result still has children
    when the way down is unknown."""
    steps = 0
    while record.children and record.child is not None and steps < MAX_STEPS:
        record = record.child
        steps += 1
    return record, steps


def evictable(record: Record, allowed: frozenset[int] | None, closed: AbstractSet[bytes]) -> bool:
    """Whether it may go now: visible, not leased, nothing below it, in a segment that counts, and not in slabs of which no slot
    is given to anybody now (`EvictionPolicy.closed`)."""
    if record.leased or record.children or not record.packed:
        return False
    if closed and all(slab in closed for slab in slab_ids(record.packed)):
        return False
    return allowed is None or any(place.segment in allowed for place in record.places())


class LruPolicy(EvictionPolicy):
    """Evicts the least recently used first."""

    def touch(self, records: Sequence[Record], clock: int) -> None:
        for record in reversed(records):
            queue = record.queue
            if queue is None:
                continue
            end, older, newer = queue.end, record.older, record.newer
            record.used = clock
            if newer is end or older is None or newer is None:
                continue
            older.newer, newer.older = newer, older
            newest = end.older
            assert newest is not None
            record.older, record.newer = newest, end
            newest.newer = end.older = record

    def victim(self, slot_bytes: int, allowed: frozenset[int] | None) -> Record | None:
        queue = self.queues.get(slot_bytes)
        if queue is None:
            return None
        record, steps, seen, count = queue.end.newer, 0, 0, queue.size
        while record is not None and record is not queue.end and seen < 4 * count and steps < MAX_STEPS:
            following = record.newer
            if not record.key:
                record = following
                continue
            tail, depth = tail_of(record)
            if evictable(tail, allowed, self.closed):
                if tail.used <= record.used or tail.queue is not queue:
                    return tail
                self._lift(record, tail)
                following = queue.end.newer
            elif tail.leased or tail.children or not tail.packed:
                # In use, or something below it is: as good as used now. Keeps later searches short.
                queue.remove(record)
                queue.insert(record, queue.end)
            record = following
            seen += 1
            steps += 1 + depth
        return None

    def next_victims(self, queue: Queue, steps: int) -> Iterator[Record]:
        return islice(queue, steps)

    def cool(self, records: Sequence[Record]) -> None:
        for record in reversed(records):
            queue = record.queue
            if queue is not None:
                queue.remove(record)
                queue.insert(record, queue.oldest)

    @staticmethod
    def _lift(record: Record, tail: Record) -> None:
        """Put the older ones on the way from `record` to the tail below it, which was used later, just behind that tail."""
        queue, place = tail.queue, tail
        parent = tail.parent
        assert queue is not None
        while parent is not None:
            if parent.used < tail.used and parent.queue is queue:
                queue.remove(parent)
                after = place.newer
                assert after is not None
                queue.insert(parent, after)
                place = parent
            if parent is record:
                break
            parent = parent.parent


class SievePolicy(EvictionPolicy):
    """Evicts by SIEVE (Zhang et al., NSDI 2024): a hand goes from old to new, spares what was used since it last came by."""

    def next_victims(self, queue: Queue, steps: int) -> Iterator[Record]:
        start = queue.hand if queue.hand is not None else queue.end
        for spared in (False, True):
            record = start
            for _ in range(min(steps, queue.size + len(queue.markers) + 1)):
                if record.key and record.visited is spared:
                    yield record
                assert record.newer is not None
                record = record.newer

    def cool(self, records: Sequence[Record]) -> None:
        for record in reversed(records):
            queue = record.queue
            if queue is not None:
                queue.remove(record)
                queue.insert(record, queue.hand if queue.hand is not None and queue.hand is not queue.end else queue.oldest)
                queue.hand = record

    def touch(self, records: Sequence[Record], clock: int) -> None:
        for record in records:
            record.visited = True
            record.used = clock

    def victim(self, slot_bytes: int, allowed: frozenset[int] | None) -> Record | None:
        queue = self.queues.get(slot_bytes)
        if queue is None or not queue.size:
            return None
        end = queue.end
        record, steps, spared, seen = queue.hand or end, 0, 0, 0
        # The first round may only clear marks, so two rounds see every record unmarked.
        limit = 2 * (queue.size + len(queue.markers))
        while seen < limit and steps < MAX_STEPS:
            if record is end:
                assert end.newer is not None
                record = end.newer
            if record.visited and spared < MAX_STEPS // 4:
                record.visited = False
                spared += 1
                steps += 1
            else:
                tail, depth = tail_of(record)
                steps += 1 + depth
                if evictable(tail, allowed, self.closed):
                    if not tail.visited or spared >= MAX_STEPS // 4:
                        queue.hand = record
                        return tail
                    tail.visited = False
                    spared += 1
            assert record.newer is not None
            record = record.newer
            seen += 1
        queue.hand = record
        return None


def make_policy(name: Literal["lru", "sieve"]) -> EvictionPolicy:
    """Make the policy of this name (`manager.eviction`)."""
    return LruPolicy() if name == "lru" else SievePolicy()
