"""The search for cold chunks to move: one sweep through all eviction queues that goes on where the last one stopped."""

from __future__ import annotations

from ...segment.slots import LOCATION_BYTES
from .eviction import EvictionPolicy, Queue
from .records import Record

MAX_STEPS = 1 << 14
"""Records looked at in one sweep at most; the next goes on from there."""
_SEGMENT_BYTES = 4
_ROUNDS = 2


class Sweep:
    """Candidates from old to new: visible, not leased, a shard in one of the segments given, and with SIEVE not used since
    the sweep was here before. Most of a queue's cold end has moved before, so each queue keeps a marker at the place up to
    which there was nothing left to move. At the newest record a sweep that has found nothing starts at the oldest again;
    twice if need be: the first time around, all may have been used.

    The queues may change between calls."""

    def __init__(self, policy: EvictionPolicy, name: str, segments: frozenset[int], clock: int) -> None:
        """`name`: of the marker; sweeps that look for other segments must not share it. `clock`: now, as in `Record.used`."""
        self._name = name
        self._segments = frozenset(number.to_bytes(_SEGMENT_BYTES, "little") for number in segments)
        self._clock = clock
        self._steps = MAX_STEPS
        self._skipped: set[Record] = set()
        self._queues = {queue: 0 for queue in policy.queues.values() if queue.size}
        """How often it has begun at the oldest again."""

    def coldest(self) -> Record | None:
        """The least recently used of all queues' first candidates, which stays the first until `skip`."""
        best: Record | None = None
        for queue in list(self._queues):
            record = self._first(queue)
            if record is None:
                del self._queues[queue]
            elif best is None or record.used < best.used:
                best = record
        return best

    def skip(self, record: Record) -> None:
        """Go on behind this candidate."""
        self._skipped.add(record)
        queue = record.queue
        if queue is not None and record.newer is not None:
            queue.put_marker(queue.marker(self._name), record.newer)

    def back(self, record: Record) -> None:
        """Begin the next sweep with this one, which was skipped just now. Not when it has become the newest since."""
        queue = record.queue
        if queue is not None and record.newer is not queue.end:
            queue.put_marker(queue.marker(self._name), record)

    def _first(self, queue: Queue) -> Record | None:
        """The next candidate of a queue, with the marker just before it."""
        marker = queue.marker(self._name)
        record, found = marker.newer, None
        while record is not None and found is None and self._steps:
            if record is queue.end:
                if self._queues[queue] == _ROUNDS or self._skipped:
                    break
                self._queues[queue] += 1
                marker.used, marker.index = marker.index, self._clock
                record = queue.oldest
            elif self._fits(record, marker.used):
                found = record
            else:
                self._steps -= 1
                record = record.newer
        assert record is not None
        queue.put_marker(marker, record)
        return found

    def _fits(self, record: Record, since: int) -> bool:
        packed = record.packed
        if not packed or record.pins or (record.visited and record.used > since) or record in self._skipped:
            return False
        return any(packed[at : at + _SEGMENT_BYTES] in self._segments for at in range(0, len(packed), LOCATION_BYTES))
