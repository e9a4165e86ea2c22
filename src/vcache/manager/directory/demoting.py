"""Demotion: a visible chunk's shard moves from VRAM to host memory of the same host, in two phases like a put."""

from __future__ import annotations

from typing import NamedTuple

from ...errors import ProtocolError
from ...segment.slots import SlotLocation
from ..api import Demote, Move, MovePlan
from .hosts import DRAM, VRAM, HostMemory
from .records import PROCESSING, Record, Write
from .slabs import Segment, Slab
from .state import Session, State
from .sweep import Sweep

MAX_MOVES = 4096
"""Moves in one plan at most: its answer must fit into a frame."""
EVICTION_ATTEMPTS = 8
"""Chunks evicted for one slot at most."""


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

    def plan(self, session: Session, verb: Demote) -> MovePlan:
        """Raises `ProtocolError` for a negative size."""
        if verb.nbytes < 0:
            raise ProtocolError(f"demote: {verb.nbytes} bytes")
        core, nbytes, now = self._core, verb.nbytes, self._core.now
        memory = core.allocator.hosts.get(session.host) if session.host else None
        if memory is None:
            return MovePlan()
        core.check_leases(session.client)
        way = self._way(session.host, frozenset(verb.avoid))
        excess = memory.busy[VRAM] - self._leaving(memory) - core.config.low_watermark * memory.nbytes[VRAM]
        moves: list[Move] = []
        writes: list[Write] = []
        records: dict[Record, None] = {}
        if way.sources and way.targets:
            sweep = Sweep(core.chunks.policy, session.host, way.sources, core.tick_clock(now))
            while excess > 0 and len(moves) < MAX_MOVES and (record := sweep.coldest()) is not None:
                places = [(shard, place) for shard, place in enumerate(record.places()) if place.segment in way.sources]
                if moves and sum(place.slot_bytes for _, place in places) > nbytes:
                    break
                sweep.skip(record)
                planned = len(moves)
                for shard, place in places:
                    slab = self._room(way, place.slot_bytes, record, records)
                    if slab is None:
                        break
                    source = record.place(shard)
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
                    sweep.back(record)
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
        if record is None or record.place(write.shard) != write.source or record.pins > ours:
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
                place = SlotLocation.unpack_many(write.source)[0]
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
