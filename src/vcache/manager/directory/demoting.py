"""Demotion: a visible chunk's shard moves from VRAM to host memory of the same host, in two phases like a put."""

from __future__ import annotations

from typing import NamedTuple

from ...errors import ProtocolError
from ...segment.slots import SlotLocation, segment_id, segment_ids
from ..api import Demote, Move, MovePlan
from .eviction import EvictionPolicy
from .records import Queue, Record
from .slabs import DRAM, PROCESSING, VRAM, HostMemory, Segment, Slab, Write
from .state import Session, State

MAX_MOVES = 4096
"""Moves in one plan at most: its answer must fit into a frame."""
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


class _Draft:
    """A plan while it is drawn up: moves, each begun as a write."""

    def __init__(self, state: State, client: bytes, route: _Route, now: float) -> None:
        self._state = state
        self._client = client
        self._route = route
        self._now = now
        self._writes: list[Write] = []
        self._records: dict[Record, None] = {}
        self.moves: list[Move] = []

    def move(self, record: Record, shards: list[tuple[int, SlotLocation]]) -> list[SlotLocation]:
        """Begin to move these shards of a chunk, as many as there is room for; the places that they leave."""
        moved: list[SlotLocation] = []
        for shard, place in shards:
            slab = self._room(place.slot_bytes, record)
            if slab is None:
                break
            write, grant = self._state.begin_write(
                slab, self._client, record.key, shard, place.tokens, record.namespace, self._now, record.packed_at(shard)
            )
            self._writes.append(write)
            self.moves.append(Move(record.key, shard, place, grant))
            moved.append(place)
        if moved:
            self._records[record] = None
        return moved

    def _room(self, stride: int, record: Record) -> Slab | None:
        """Find a slab of the targets with a free slot, if need be after evicting what is not hotter than `record`."""
        state = self._state
        for _ in range(EVICTION_ATTEMPTS):
            slab = state.allocator.find_free(self._route.targets, stride)
            if slab is not None:
                return slab
            victim = state.chunks.policy.victim(stride, self._route.allowed)
            if victim is None or victim.used > record.used or victim is record or victim in self._records:
                return None
            state.evict(victim, "room for a demotion")
        return None

    def plan(self) -> MovePlan:
        """Complete the plan with a lease on its chunks."""
        lease = self._state.leases.grant(self._client, list(self._records), self._now)
        self._state.counters.leases += 1
        for write in self._writes:
            write.lease = lease.number
        return MovePlan(lease=lease.number, moves=self.moves)


class Demoting:
    """Plans moves and ends them. A move that does not end well is a write that does not: see `Writing`."""

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
        draft = _Draft(state, session.client, route, state.now)
        if route.sources and route.targets:
            scan = ColdScan(state.chunks.policy, session.host, route.sources, state.tick_clock(state.now))
            self._draw_up(draft, scan, route, excess, verb.nbytes)
        if not draft.moves:
            memory.demoted()
            return MovePlan()
        return draft.plan()

    def _route(self, host: str, avoid: frozenset[int]) -> _Route:
        usable = [
            segment
            for number, segment in self._state.allocator.segments.items()
            if segment.info.host == host and number not in avoid
        ]
        targets = sorted((segment for segment in usable if segment.tier == DRAM), key=lambda each: (each.load(), each.number))
        sources = frozenset(segment.number for segment in usable if segment.tier == VRAM)
        return _Route(sources, targets, frozenset(segment.number for segment in targets))

    def _excess(self, memory: HostMemory) -> float:
        """Count the bytes of this host's VRAM above the low watermark when the moves under way have ended."""
        state, leaving = self._state, 0
        for write in state.writes.moves:
            if write.state == PROCESSING:
                place = SlotLocation.unpack(write.source)
                slab = state.allocator.slabs.get(state.allocator.slab_key(place.segment, place.slab))
                if slab is not None and slab.segment is not None and slab.segment.memory is memory:
                    leaving += slab.share
        return memory.busy[VRAM] - leaving - state.config.low_watermark * memory.nbytes[VRAM]

    def _draw_up(self, draft: _Draft, scan: ColdScan, route: _Route, excess: float, nbytes: int) -> None:
        """Move what is coldest until `excess` bytes of VRAM are free, `nbytes` are moved, or the targets have no room."""
        while excess > 0 and len(draft.moves) < MAX_MOVES and (record := scan.coldest()) is not None:
            shards = [(shard, place) for shard, place in enumerate(record.places()) if place.segment in route.sources]
            if draft.moves and sum(place.slot_bytes for _, place in shards) > nbytes:
                break
            scan.skip(record)
            moved = draft.move(record, shards)
            nbytes -= sum(place.slot_bytes for place in moved)
            excess -= sum(self._state.allocator.slab_at(place).share for place in moved)
            if len(moved) < len(shards):
                scan.back(record)
                break

    def end(self, write: Write) -> bool:
        """Make a complete copy the chunk's place and free the old one. False when the chunk is gone, is somewhere else by now,
        or is leased by others, who may be reading the old place: then nothing has changed."""
        state, slab = self._state, write.slab
        record = state.chunks.visible.get(write.key)
        ours = int(write.lease in state.leases.leases)
        if record is None or record.packed_at(write.shard) != write.source or record.leased > ours:
            return False
        state.writes.remove(write)
        slab.owners[write.slot] = record
        state.allocator.change(slab, write.slot, PROCESSING)
        slab.confirm(write.slot)
        state.replace(record, write.shard, write.packed)
        state.counters.demotions += 1
        state.log.happened(state.now, "demoted", (write.key,), f"shard {write.shard}", write.packed)
        return True


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
