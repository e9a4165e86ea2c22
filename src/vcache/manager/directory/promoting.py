"""Promotion: what is read again in host memory moves up into free VRAM of the same host, in two phases like a put."""

from __future__ import annotations

from ...errors import ProtocolError
from ...segment.slots import SlotLocation, segment_id
from ..api import MovePlan, Promote, PromotionWanted
from .moves import MAX_MOVES, Draft, segments_of
from .records import Record
from .slabs import ASK_AGAIN, DRAM, VRAM, HostMemory, Segment, Slab
from .state import Session, State, name_of

MAX_STEPS = 1 << 10
"""Chunks looked at for one plan at most."""


class Promoting:
    """Notes what is read again, asks an engine to move it up, and plans how.

    Nothing goes to make room for it: VRAM is filled up to the low watermark at most, and demotion begins above the high one,
    so neither causes the other."""

    def __init__(self, state: State) -> None:
        self._state = state

    def leased(self, memory: HostMemory, records: list[Record]) -> None:
        """A session on the host of `memory`, whose VRAM has room, took a lease on these, in prompt order."""
        if memory.busy[DRAM]:
            segments = self._state.allocator.segments.values()
            below = [each.number for each in segments if each.memory is memory and each.tier == DRAM]
            memory.heat.leased(records, frozenset(map(segment_id, below)))

    def ask(self, session: Session, memory: HostMemory) -> None:
        """Tell an engine on this host that something should move up, if there is room: the one that stored last, or when it
        does not answer, this session's. Not twice within `ASK_AGAIN` seconds. A lease of the session's has just ended: as long
        as one is held its chunks stay where they are."""
        state, heat = self._state, memory.heat
        if state.now < heat.quiet_until or self._room(memory) <= 0:
            return
        mover = state.sessions.get(heat.mover) if heat.mover_next else None
        if mover is None or state.memory_of(mover) is not memory:
            mover = session
        if mover.role == "engine" and state.memory_of(mover) is memory:
            heat.mover_next = not heat.mover_next
            heat.quiet_until = state.now + ASK_AGAIN
            state.push(mover.client, PromotionWanted())

    def plan(self, session: Session, verb: Promote) -> MovePlan:
        """Raises `ProtocolError` for a negative size."""
        if verb.nbytes < 0:
            raise ProtocolError(f"promote: {verb.nbytes} bytes")
        state, avoid = self._state, frozenset(verb.avoid)
        memory = state.memory_of(session)
        if memory is None:
            return MovePlan()
        state.check_leases(session.client)
        memory.heat.mover, memory.heat.mover_next = session.client, True
        sources = frozenset(segment.number for segment in segments_of(state, session.host, DRAM, avoid))
        targets = segments_of(state, session.host, VRAM, avoid)
        draft = Draft(state, session.client)
        if sources and targets and self._room(memory) > 0:
            self._draw_up(draft, memory, sources, targets, verb.nbytes)
        return draft.plan() if draft.moves else MovePlan()

    def _room(self, memory: HostMemory) -> float:
        """Count the bytes of this host's VRAM below the low watermark that nobody has, or is writing."""
        return self._state.config.low_watermark * memory.nbytes[VRAM] - memory.busy[VRAM]

    def _draw_up(self, draft: Draft, memory: HostMemory, sources: frozenset[int], targets: list[Segment], nbytes: int) -> None:
        """Move what was read last until `nbytes` are moved or VRAM has no more room."""
        full: set[int] = set()
        for key, packed in memory.heat.hottest(MAX_STEPS):
            record = self._state.chunks.visible.get(key)
            if record is None or record.packed != packed:
                memory.heat.cool(key)
                continue
            shards = [(shard, place) for shard, place in enumerate(record.places()) if place.segment in sources]
            if record.leased or not shards or any(place.slot_bytes in full for _, place in shards):
                continue
            size = sum(place.slot_bytes for _, place in shards)
            if len(draft.moves) >= MAX_MOVES or (draft.moves and size > nbytes):
                return
            moved = self._move(draft, record, shards, memory, targets)
            nbytes -= size
            if moved:
                memory.heat.cool(key)
            if moved < len(shards):
                full.add(shards[moved][1].slot_bytes)

    def _move(
        self, draft: Draft, record: Record, shards: list[tuple[int, SlotLocation]], memory: HostMemory, targets: list[Segment]
    ) -> int:
        """Begin to move a chunk's shards, each to the device that it was last stored from if it can be; how many."""
        allocator, namespace = self._state.allocator, name_of(record.namespace)

        def room(shard: int, place: SlotLocation) -> Slab | None:
            device = memory.heat.device(namespace, shard)
            order = sorted(targets, key=lambda segment: segment.info.device != device)
            slab = allocator.find_free(order, place.slot_bytes)
            return slab if slab is not None and slab.share <= self._room(memory) else None

        return len(draft.move(record, shards, room))
