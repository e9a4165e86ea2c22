"""Demotion: a visible chunk's shard moves from VRAM to host memory of the same host, in two phases like a put."""

from __future__ import annotations

from typing import NamedTuple

from ...segment.slots import SlotLocation, segment_id, segment_ids
from ..api import Move, MovePlan
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


class _Way(NamedTuple):
    """Where a plan moves from and to."""

    sources: frozenset[int]
    """Numbers of segments."""
    targets: list[Segment]
    """The least loaded first."""
    allowed: frozenset[int]
    """Numbers of the targets."""


class Demoting:
    """Plans moves and ends them. What becomes of a move that does not end well is `Writing`'s affair, as of every write."""

    def __init__(self, core: State) -> None:
        self._core = core

    def plan(self, session: Session, nbytes: int, avoid: frozenset[int], now: float) -> MovePlan:
        """See `Manager.demote`. May evict chunks in host memory that are not hotter than what takes their place."""
        core = self._core
        memory = core.allocator.hosts.get(session.host) if session.host else None
        if memory is None:
            return MovePlan()
        core.check_leases(session.client)
        way = self._way(session.host, avoid)
        excess = memory.busy[VRAM] - self._leaving(memory) - core.config.low_watermark * memory.nbytes[VRAM]
        moves: list[Move] = []
        writes: list[Write] = []
        records: dict[Record, None] = {}
        if way.sources and way.targets:
            scan = ColdScan(core.chunks.policy, session.host, way.sources, core.tick_clock(now))
            while excess > 0 and len(moves) < MAX_MOVES and (record := scan.coldest()) is not None:
                places = [(shard, place) for shard, place in enumerate(record.places()) if place.segment in way.sources]
                if moves and sum(place.slot_bytes for _, place in places) > nbytes:
                    break
                scan.skip(record)
                planned = len(moves)
                for shard, place in places:
                    slab = self._room(way, place.slot_bytes, record, records)
                    if slab is None:
                        break
                    source = record.packed_at(shard)
                    write, grant = core.begin_write(
                        slab, session.client, record.key, shard, place.tokens, record.space, now, source
                    )
                    moves.append(Move(record.key, shard, place, grant))
                    writes.append(write)
                    excess -= core.allocator.slab_at(place).share
                    nbytes -= place.slot_bytes
                if len(moves) > planned:
                    records[record] = None
                if len(moves) < planned + len(places):
                    scan.back(record)
                    break
        if not moves:
            memory.demoted()
            return MovePlan()
        lease = core.leases.grant(session.client, list(records), now)
        core.counters.leases += 1
        for write in writes:
            write.lease = lease.number
        return MovePlan(lease=lease.number, moves=moves)

    def end(self, write: Write) -> bool:
        """The copy is complete: make it the chunk's place and free the old one. False when the chunk is gone, is somewhere
        else by now, or is leased by others, who may be reading the old place: then nothing has changed."""
        core, slab = self._core, write.slab
        record = core.chunks.visible.get(write.key)
        ours = int(write.lease in core.leases.leases)
        if record is None or record.packed_at(write.shard) != write.source or record.pins > ours:
            return False
        core.writes.remove(write)
        slab.owners[write.slot] = record
        core.allocator.change(slab, write.slot, PROCESSING)
        slab.confirm(write.slot)
        core.replace(record, write.shard, write.packed)
        core.counters.demotions += 1
        return True

    def _way(self, host: str, avoid: frozenset[int]) -> _Way:
        usable = [
            segment
            for number, segment in self._core.allocator.segments.items()
            if segment.info.host == host and number not in avoid
        ]
        targets = sorted((segment for segment in usable if segment.tier == DRAM), key=lambda each: (each.load(), each.number))
        sources = frozenset(segment.number for segment in usable if segment.tier == VRAM)
        return _Way(sources, targets, frozenset(segment.number for segment in targets))

    def _leaving(self, memory: HostMemory) -> int:
        """Bytes of this host's VRAM that will be free when the moves under way have ended."""
        total = 0
        for write in self._core.writes.moves:
            if write.state == PROCESSING:
                place = SlotLocation.unpack(write.source)
                slab = self._core.allocator.slabs.get(self._core.allocator.slab_key(place.segment, place.slab))
                if slab is not None and slab.segment is not None and slab.segment.memory is memory:
                    total += slab.share
        return total

    def _room(self, way: _Way, stride: int, record: Record, planned: dict[Record, None]) -> Slab | None:
        """A slab of the targets with a free slot, if need be after evicting what is not hotter than `record`."""
        core = self._core
        for _ in range(EVICTION_ATTEMPTS):
            slab = core.allocator.find_free(way.targets, stride)
            if slab is not None:
                return slab
            victim = core.chunks.policy.victim(stride, way.allowed)
            if victim is None or victim.used > record.used or victim is record or victim in planned:
                return None
            core.counters.evictions += 1
            core.forget(victim)
        return None


class ColdScan:
    """Candidates from old to new: visible, not leased, a shard in one of the segments given, and with SIEVE not used since
    the scan was here before. Most of a queue's cold end has moved before, so each queue keeps a marker at the place up to
    which there was nothing left to move. At the newest record a scan that has found nothing starts at the oldest again;
    twice if need be: the first time around, all may have been used.

    The queues may change between calls."""

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
        """Begin the next scan with this one, which was skipped just now. Not when it has become the newest since."""
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
        if not record.packed or record.pins or (record.visited and record.used > since) or record in self._skipped:
            return False
        return not self._segments.isdisjoint(segment_ids(record.packed))
