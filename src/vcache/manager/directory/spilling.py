"""Spilling: which chunks an engine shall write to storage before they are evicted, and which are there already."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from ...errors import ProtocolError
from ..api import PlanSpill, Spill, Spilled, SpillPlan
from .records import Record
from .slabs import DRAM, VRAM, HostMemory
from .state import Session, State

MAX_SPILLS = 4096
"""Shards in one plan at most: its answer must fit into a frame."""
MAX_STEPS = 1 << 14
"""Records of one slot size looked at for one plan at most."""
RETRY_SECONDS = 2.0
"""How long a chunk is left alone that was planned and not written."""


class _Plan(NamedTuple):
    """A plan under way."""

    memory: HostMemory
    nbytes: int
    """Of memory that it makes cheap to free."""
    clock: int
    """When it was made, as in `Record.used`."""


class Spilling:
    """Plans what is written and remembers what was."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._plans: dict[int, _Plan] = {}
        """By the number of its lease."""
        self._failed: OrderedDict[bytes, float] = OrderedDict()
        """Key -> until when it is left alone; in that order."""

    def plan(self, session: Session, verb: PlanSpill) -> SpillPlan:
        """Raises `ProtocolError` for a negative size."""
        if verb.nbytes < 0:
            raise ProtocolError(f"spill: {verb.nbytes} bytes")
        state, nbytes, now = self._state, verb.nbytes, self._state.now
        memory = state.memory_of(session)
        if memory is None:
            return SpillPlan()
        state.check_leases(session.client)
        self._forget(now)
        under_way = sum(plan.nbytes for plan in self._plans.values() if plan.memory is memory)
        excess = memory.unspilled() - under_way - state.config.low_watermark * sum(memory.nbytes)
        spills: list[Spill] = []
        records: list[Record] = []
        total = 0
        for record in self._candidates(session.host, memory, frozenset(verb.avoid)) if excess > 0 else ():
            places = record.places()
            size = sum(place.slot_bytes for place in places)
            if total >= excess or len(spills) + len(places) > MAX_SPILLS or (spills and size > nbytes):
                break
            spills += [Spill(record.key, shard, place) for shard, place in enumerate(places)]
            records.append(record)
            total += sum(state.allocator.slab_at(place).share for place in places)
            nbytes -= size
        if not spills:
            memory.spilled_all()
            return SpillPlan()
        lease = state.leases.grant(session.client, records, now)
        state.counters.leases += 1
        self._plans[lease.number] = _Plan(memory, total, state.tick_clock(now))
        return SpillPlan(lease=lease.number, spills=spills)

    def done(self, session: Session, verb: Spilled) -> None:
        """What is in storage goes first when room is needed, unless it was used meanwhile."""
        state, client, number, now = self._state, session.client, verb.lease, self._state.now
        written = dict.fromkeys(verb.keys)
        for key in written:
            record = state.chunks.visible.get(key)
            if record is not None and not record.spilled:
                state.mark_spilled(record, True)
                state.counters.spills += 1
        if state.leases.get(number, client, now) is None or number not in self._plans:
            return
        plan = self._plans.pop(number)
        records = state.leases.drop(number, client)
        for record in records:
            if record.key not in written:
                self._failed.pop(record.key, None)
                self._failed[record.key] = now + RETRY_SECONDS
        state.unleased(records)
        state.chunks.policy.cool([record for record in records if record.spilled and record.used < plan.clock])

    def _candidates(self, host: str, memory: HostMemory, avoid: frozenset[int]) -> Iterator[Record]:
        """Go through the chunks that lie in the lowest tier of this host altogether, in about the order of their eviction."""
        state = self._state
        lowest = DRAM if memory.nbytes[DRAM] else VRAM
        allowed = {
            number
            for number, segment in state.allocator.segments.items()
            if segment.info.host == host and segment.tier == lowest and number not in avoid
        }
        policy = state.chunks.policy
        queues = [policy.next_victims(queue, MAX_STEPS) for queue in policy.queues.values()]
        for record in heapq.merge(*queues, key=lambda record: record.used):
            idle = not record.leased and not record.spilled and record.key not in self._failed
            if idle and all(place.segment in allowed for place in record.places()):
                yield record

    def _forget(self, now: float) -> None:
        """Forget plans whose lease has ended otherwise, and failures that were long ago."""
        leases = self._state.leases.leases
        self._plans = {number: plan for number, plan in self._plans.items() if number in leases}
        while self._failed and next(iter(self._failed.values())) <= now:
            self._failed.popitem(last=False)
