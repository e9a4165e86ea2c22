"""Moves of a visible chunk's shards within a host, down or up: how a plan is drawn up, and how a move ends."""

from __future__ import annotations

from collections.abc import Callable

from ...segment.slots import SlotLocation
from ..api import Move, MovePlan
from .records import Record
from .slabs import PROCESSING, VRAM, Segment, Slab, Write
from .state import State

MAX_MOVES = 4096
"""Moves in one plan at most: its answer must fit into a frame."""


class Draft:
    """A plan while it is drawn up: moves, each begun as a write."""

    def __init__(self, state: State, client: bytes) -> None:
        self._state = state
        self._client = client
        self._writes: list[Write] = []
        self.records: dict[Record, None] = {}
        """Those that move."""
        self.moves: list[Move] = []

    def move(
        self, record: Record, shards: list[tuple[int, SlotLocation]], room: Callable[[int, SlotLocation], Slab | None]
    ) -> list[SlotLocation]:
        """Begin to move these shards of a chunk, as many as there is `room` for; the places that they leave."""
        state, moved = self._state, list[SlotLocation]()
        for shard, place in shards:
            slab = room(shard, place)
            if slab is None:
                break
            write, grant = state.begin_write(
                slab, self._client, record.key, shard, place.tokens, record.namespace, state.now, record.packed_at(shard)
            )
            self._writes.append(write)
            self.moves.append(Move(record.key, shard, place, grant))
            moved.append(place)
        if moved:
            self.records[record] = None
        return moved

    def plan(self) -> MovePlan:
        """Complete the plan with a lease on its chunks; there is at least one."""
        lease = self._state.leases.grant(self._client, list(self.records), self._state.now)
        self._state.counters.leases += 1
        for write in self._writes:
            write.lease = lease.number
        return MovePlan(lease=lease.number, moves=self.moves)


def goes_up(write: Write) -> bool:
    """Whether a move goes to VRAM."""
    segment = write.slab.segment
    return segment is not None and segment.tier == VRAM


def end_move(state: State, write: Write) -> bool:
    """Make a complete copy the chunk's place and free the old one. False when the chunk is gone, is somewhere else by now, or
    is leased by others, who may be reading the old place: then nothing has changed. A move that does not end well is a write
    that does not: see `Writing`."""
    slab, counters, up = write.slab, state.counters, goes_up(write)
    record = state.chunks.visible.get(write.key)
    ours = int(write.lease in state.leases.leases)
    if record is None or record.packed_at(write.shard) != write.source or record.leased > ours:
        return False
    state.writes.remove(write)
    slab.owners[write.slot] = record
    state.allocator.change(slab, write.slot, PROCESSING)
    slab.confirm(write.slot)
    state.replace(record, write.shard, write.packed)
    if up:
        counters.promotions += 1
    else:
        counters.demotions += 1
    state.log.happened(state.now, "promoted" if up else "demoted", (write.key,), f"shard {write.shard}", write.packed)
    return True


def refuse_move(state: State, write: Write, key: bytes) -> None:
    """Count a copy that was not taken."""
    up = goes_up(write)
    if up:
        state.counters.promotions_refused += 1
    else:
        state.counters.demotions_refused += 1
    what = "promotion refused" if up else "demotion refused"
    state.log.happened(state.now, what, (key,), "the chunk is leased, or is not where it was")


def segments_of(state: State, host: str, tier: int, avoid: frozenset[int]) -> list[Segment]:
    """List this host's segments of one kind of memory, the least loaded first, without those to avoid."""
    found = [
        segment
        for number, segment in state.allocator.segments.items()
        if segment.info.host == host and segment.tier == tier and number not in avoid
    ]
    return sorted(found, key=lambda segment: (segment.load(), segment.number))
