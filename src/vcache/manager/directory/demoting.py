"""Demotion: a visible chunk's shard moves from VRAM to host memory of the same host, in two phases like a put."""

from __future__ import annotations

from typing import NamedTuple

from ...errors import ProtocolError
from ...segment.slots import SlotLocation, segment_id, segment_ids
from ..api import Demote, MovePlan
from .eviction import EvictionPolicy
from .moves import MAX_MOVES, Draft, segments_of
from .records import Queue, Record
from .slabs import DRAM, PROCESSING, VRAM, HostMemory, Segment, Slab
from .state import Session, State

EVICTION_ATTEMPTS = 8
"""Chunks evicted for one slot at most."""
MAX_STEPS = 1 << 14
"""Records looked at in one scan at most; the next goes on from there."""
_ROUNDS = 2


class _Route(NamedTuple):
    """Where a plan moves from and to."""

    sources: frozenset[int]
    """Numbers of segments."""
    targets: list[Segment]
    """The least loaded first."""
    allowed: frozenset[int]
    """Numbers of the targets."""


class Demoting:
    """Plans moves of what is cold."""

    def __init__(self, state: State) -> None:
        self._state = state

    def plan(self, session: Session, verb: Demote) -> MovePlan:
        """Raises `ProtocolError` for a negative size."""
        if verb.nbytes < 0:
            raise ProtocolError(f"demote: {verb.nbytes} bytes")
        state = self._state
        memory = state.memory_of(session)
        if memory is None:
            return MovePlan()
        state.check_leases(session.client)
        route, excess = self._route(session.host, frozenset(verb.avoid)), self._excess(memory)
        draft = Draft(state, session.client)
        if route.sources and route.targets:
            scan = ColdScan(state.chunks.policy, session.host, route.sources, state.tick_clock(state.now))
            self._draw_up(draft, scan, route, excess, verb.nbytes)
        if not draft.moves:
            memory.demoted()
            return MovePlan()
        return draft.plan()

    def _route(self, host: str, avoid: frozenset[int]) -> _Route:
        sources, targets = (segments_of(self._state, host, tier, avoid) for tier in (VRAM, DRAM))
        numbers = (frozenset(segment.number for segment in segments) for segments in (sources, targets))
        return _Route(next(numbers), targets, next(numbers))

    def _move(self, draft: Draft, route: _Route, record: Record, shards: list[tuple[int, SlotLocation]]) -> list[SlotLocation]:
        """Begin to move a chunk's shards, if need be after evicting what is not hotter; the places that they leave."""
        state, policy = self._state, self._state.chunks.policy

        def room(shard: int, place: SlotLocation) -> Slab | None:
            for _ in range(EVICTION_ATTEMPTS):
                slab = state.allocator.find_free(route.targets, place.slot_bytes)
                if slab is not None:
                    return slab
                victim = policy.victim(place.slot_bytes, route.allowed)
                if victim is None or victim.used > record.used or victim is record or victim in draft.records:
                    return None
                state.evict(victim, "room for a demotion")
            return None

        return draft.move(record, shards, room)

    def _excess(self, memory: HostMemory) -> float:
        """Count the bytes of this host's VRAM above the low watermark when the moves under way have ended."""
        state, leaving = self._state, 0
        for write in state.writes.moves:
            if write.state == PROCESSING:
                place = SlotLocation.unpack(write.source)
                slab = state.allocator.slabs.get(state.allocator.slab_key(place.segment, place.slab))
                segment = slab.segment if slab is not None else None
                if slab is not None and segment is not None and segment.memory is memory and segment.tier == VRAM:
                    leaving += slab.share
        return memory.busy[VRAM] - leaving - state.config.low_watermark * memory.nbytes[VRAM]

    def _draw_up(self, draft: Draft, scan: ColdScan, route: _Route, excess: float, nbytes: int) -> None:
        """Move what is coldest until `excess` bytes of VRAM are free, `nbytes` are moved, or the targets have no room."""
        while excess > 0 and len(draft.moves) < MAX_MOVES and (record := scan.coldest()) is not None:
            shards = [(shard, place) for shard, place in enumerate(record.places()) if place.segment in route.sources]
            if draft.moves and sum(place.slot_bytes for _, place in shards) > nbytes:
                break
            scan.skip(record)
            moved = self._move(draft, route, record, shards)
            nbytes -= sum(place.slot_bytes for place in moved)
            excess -= sum(self._state.allocator.slab_at(place).share for place in moved)
            if len(moved) < len(shards):
                scan.back(record)
                break


class ColdScan:
    """Finds candidates from old to new: visible, not leased, a shard in one of the segments given, and with SIEVE not used
    since the scan was here before. Most of a queue's cold end has moved before, so each queue keeps a marker at the place up to
    which there was nothing left to move. At the newest record a scan that has found nothing starts at the oldest again; twice
    if need be: the first time around, all may have been used.  The queues may change between calls."""

    def __init__(self, policy: EvictionPolicy, name: str, segments: frozenset[int], clock: int) -> None:
        """`name`: of the marker; scans that look for other segments must not share it. `clock`: now, as in `Record.used`."""
        self._name = name
        self._segments = frozenset(map(segment_id, segments))
        self._clock = clock
        self._steps = MAX_STEPS
        self._skipped: set[Record] = set()
        self._queues = {queue: 0 for queue in policy.queues.values() if queue.size}
        """How often it has begun at the oldest again."""

    def coldest(self) -> Record | None:
        """Find the least recently used of all queues' first candidates; it stays the first until `skip`."""
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
        """Begin the next scan with this one, which was skipped just now. Not when it has become the newest since."""
        queue = record.queue
        if queue is not None and record.newer is not queue.end:
            queue.put_marker(queue.marker(self._name), record)

    def _first(self, queue: Queue) -> Record | None:
        """Find the next candidate of a queue, and put the marker just before it."""
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
        if not record.packed or record.leased or (record.visited and record.used > since) or record in self._skipped:
            return False
        return not self._segments.isdisjoint(segment_ids(record.packed))
