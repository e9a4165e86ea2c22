"""Two-phase puts: tickets, placement and eviction, what becomes of writes that do not end well (rules I2, I3)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Literal

from ...errors import ManagerRefusedError, ProtocolError
from ...keys import DIGEST_BYTES
from ...segment.slots import ALIGNMENT, align_up, generation_of, stride_of
from ..api import PutEnd, PutGrant, PutRequest, PutRevoke, PutStart, RoomWanted, Ticket
from .chunks import Pending, deepest_first
from .moves import end_move, refuse_move
from .records import Record
from .slabs import MAX_SLOTS, PROCESSING, QUARANTINED, USED, Segment, Slab, Write, geometry_of
from .state import Session, State, name_of

EVICTION_ATTEMPTS = 64
"""Chunks evicted for one slot at most (a chunk may free slots of other sizes only)."""
STRAGGLER_SECONDS = 2.0
"""How long a shard may wait for the others of its chunk before it goes first when room is needed."""
PARTIAL_SHARE = 0.25
"""Part of the memory that one client may hold, at the cost of what others can read, for chunks of which the other shards are
not complete."""
RECLAIM_BUDGET = 1 << 16
"""Slots looked at in search of a slab to empty, for one request."""


def check_request(request: PutRequest) -> None:
    """Raises `ProtocolError` for values that no conforming client sends."""
    if len(request.tokens) != len(request.keys):
        raise ProtocolError(f"put_start: {len(request.tokens)} token counts for {len(request.keys)} keys")
    if any(len(key) != DIGEST_BYTES for key in request.keys) or len(request.namespace) != DIGEST_BYTES:
        raise ProtocolError(f"put_start: keys and namespace are {DIGEST_BYTES} bytes each")
    if len(request.parent) not in (0, DIGEST_BYTES):
        raise ProtocolError(f"put_start: parent is empty or {DIGEST_BYTES} bytes, got {len(request.parent)}")
    if any(not 0 < count < 2**16 for count in request.tokens):
        raise ProtocolError("put_start: tokens of a chunk are in [1, 65535]")
    if not 0 <= request.first_index < 2**32 - len(request.keys):
        raise ProtocolError(f"put_start: first_index {request.first_index} is out of range")
    if not 0 <= request.shard < request.num_shards < 2**16:
        raise ProtocolError(f"put_start: shard {request.shard} of {request.num_shards}")
    if not 0 < request.slot_bytes < 2**32 * ALIGNMENT:
        raise ProtocolError(f"put_start: slot_bytes {request.slot_bytes} is out of range")


class _Placer:
    """Finds slots for one request."""

    def __init__(self, state: State, client: bytes, request: PutRequest, drop: Callable[[Write], None]) -> None:
        """`drop`: gives up a shard that waits for others."""
        self._state = state
        self._client = client
        self._request = request
        self._drop = drop
        self._avoid = frozenset(request.avoid)
        self.stride = align_up(request.slot_bytes, ALIGNMENT)
        self._order = self._candidates()
        self._exhausted = not self._order
        self._budget = RECLAIM_BUDGET
        self.refused = False
        """Whether there was no room because nobody was pushed out."""

    def again(self) -> _Placer:
        """Make a placer for what is left of the request after a pause: segments may have come and gone, but the effort is
        bounded for all of it together."""
        placer = _Placer(self._state, self._client, self._request, self._drop)
        placer._exhausted, placer._budget = self._exhausted or placer._exhausted, self._budget
        placer.refused = self.refused
        return placer

    def _candidates(self) -> list[Segment]:
        return self._state.allocator.candidates(self._request.placement, self._request.device, self._avoid)

    def place(self, key: bytes, admitted: bool) -> Slab | None:
        """Find a slab with a free slot for a shard of `key`, after making room if need be; None when there is none (then for
        the whole request). `admitted`: whether others may go to make it; if not, the rest of the request, which follows on it,
        is not let in either (`refused`)."""
        if self._exhausted:
            return None
        if self._request.placement == "spread":
            self._order = self._candidates()
        slab = self._state.allocator.find_free(self._order, self.stride)
        if slab is None:
            self._state.admission.full(len(self._state.chunks.visible))
            self.refused = not admitted
            slab = self._make_room(key) if admitted else None
        self._exhausted = slab is None
        return slab

    def _make_room(self, key: bytes) -> Slab | None:
        """Free a slot. Shards whose chunk nobody can read yet go before chunks that somebody can: those that have waited for
        the others for long, and those of a client that holds too many of them."""
        state = self._state
        stale = state.now + state.config.ticket_ttl - STRAGGLER_SECONDS
        for _ in range(EVICTION_ATTEMPTS):
            greedy = self._holds_much()
            write = state.writes.own_partial(self._client, key) if greedy else state.writes.oldest_partial(stale, key)
            if write is None:
                return None if greedy else self._evict()
            self._drop(write)
            found = state.allocator.find_free(self._order, self.stride)
            if found is not None:
                return found
        return None

    def _holds_much(self) -> bool:
        if self._request.num_shards == 1:
            return False
        room = sum(segment.nbytes for segment in self._order)
        return self._state.writes.held(self._client) * self.stride >= PARTIAL_SHARE * room

    def _evict(self) -> Slab | None:
        state, policy = self._state, self._state.chunks.policy
        allowed = frozenset(segment.number for segment in self._order) if self._avoid else None
        for _ in range(EVICTION_ATTEMPTS):
            victim = policy.victim(self.stride, allowed)
            slab = self._other_slab(victim, allowed)
            if slab is not None:
                state.counters.slab_reclaims += 1
                for owner in list(slab.owners):
                    if isinstance(owner, Record) and owner.packed:
                        state.evict(owner, "its slab holds slots of another size now")
            elif victim is not None:
                state.evict(victim, "room for a store")
            else:
                return None
            found = state.allocator.find_free(self._order, self.stride)
            if found is not None:
                return found
        return None

    def _other_slab(self, victim: Record | None, allowed: frozenset[int] | None) -> Slab | None:
        """Find a slab of another slot size to empty rather than evict `victim`: one that holds something colder, and mostly so.
        Without a victim: the coldest slab that can be emptied."""
        policy = self._state.chunks.policy
        if victim is None:
            return self._any_slab()
        for stride, queue in policy.queues.items():
            if stride == self.stride or not queue.size:
                continue
            colder = policy.victim(stride, allowed)
            if colder is None or colder.used >= victim.used:
                continue
            for place in colder.places():
                slab = self._state.allocator.slab_at(place)
                if place.slot_bytes == stride and self._usable(slab):
                    hot = self._hot_slots(slab, victim.used)
                    if hot is not None and 2 * hot <= slab.counts[USED]:
                        return slab
        return None

    def _any_slab(self) -> Slab | None:
        best: tuple[float, Slab] | None = None
        for segment in self._order:
            for slab in segment.slabs.values():
                if self._budget < 0:
                    break
                if self._usable(slab):
                    heat = self._heat(slab)
                    if heat is not None and (best is None or heat < best[0]):
                        best = heat, slab
        return best[1] if best is not None else None

    def _usable(self, slab: Slab) -> bool:
        """Whether it could hold our slots once empty, and nobody writes there."""
        return (
            slab.segment is not None
            and slab.segment.number not in self._avoid
            and not slab.closed
            and slab.counts[PROCESSING] == slab.counts[QUARANTINED] == 0
            and slab.counts[USED] > 0
            and 0 < geometry_of(slab.nbytes, self.stride).slots <= MAX_SLOTS
        )

    def _hot_slots(self, slab: Slab, used: int) -> int | None:
        """Count the slots used since `used`; None when one of them must stay. Emptying a slab of another slot size may part a
        prompt's tail from its head; of our own it would be the prompt that the request extends."""
        hot, own = 0, slab.geometry is not None and slab.geometry.stride == self.stride
        for owner in slab.owners:
            self._budget -= 1
            if isinstance(owner, Record):
                if owner.leased or (own and owner.children):
                    return None
                hot += owner.used >= used
            elif owner is not None:
                return None
        return hot

    def _heat(self, slab: Slab) -> float | None:
        """Return the mean time of last use; None when one of the slots must stay."""
        if self._hot_slots(slab, 0) is None:
            return None
        return sum(owner.used for owner in slab.owners if isinstance(owner, Record)) / slab.counts[USED]


class Writing:
    """Grants and ends writes."""

    def __init__(self, state: State) -> None:
        self._state = state

    # Verbs

    def start(self, session: Session, verb: PutStart) -> Generator[None, None, list[PutGrant]]:
        """Pauses after each slice of keys. Raises `ProtocolError` for a request that contradicts itself, and
        `ManagerRefusedError` when the session ends in a pause; what was granted is then dealt with as what every lost session
        leaves."""
        state, client, request = self._state, session.client, verb.request
        check_request(request)
        placer, chunks, keys = _Placer(state, client, request, self.drop), state.chunks, request.keys
        parent: Record | None = None
        if keys and request.parent and request.first_index:
            parent = chunks.ghost(request.parent, request.first_index - 1, chunks.namespace(request.namespace))
        previous = parent
        grants: list[PutGrant] = []
        for begin in range(0, len(keys), state.slice_size):
            if begin:
                yield
                if state.sessions.get(client) is not session:
                    raise ManagerRefusedError("put_start: the session is over")
                placer = placer.again()
                previous = chunks.any(keys[begin - 1])
            places: list[bytes | str] = []
            end = min(begin + state.slice_size, len(keys))
            admitted = self._admitted(request, begin, end)
            for offset in range(begin, end):
                grants.append(self._grant(client, request, offset, previous, placer, places, admitted[offset - begin]))
                previous = chunks.any(keys[offset])
            state.log.placed(state.now, session.name, request, begin, places)
            if parent is not None:
                chunks.settle(parent)  # Now at the latest its child refers to it, or nothing does.
        memory = state.memory_of(session) if session.role == "engine" else None
        if memory is not None:
            memory.heat.wrote(client, request.namespace, request.shard, request.device)
            if memory.wants_room(state.config.high_watermark, state.now):
                state.push(client, RoomWanted())
        return grants

    def _admitted(self, request: PutRequest, begin: int, end: int) -> list[bool]:
        """Tell for each of these keys whether others may be pushed out for it."""
        state, keys = self._state, request.keys[begin:end]
        admission = state.admission
        if not admission.follows:
            return [True] * len(keys)
        if not request.shard:
            admission.used(keys, state.tick_clock(state.now))
        before = admission.offered(keys, request.shard)
        return before if admission.selective else [True] * len(keys)

    def _grant(
        self,
        client: bytes,
        request: PutRequest,
        offset: int,
        previous: Record | None,
        placer: _Placer,
        places: list[bytes | str],
        admitted: bool,
    ) -> PutGrant:
        """Answer for one chunk of the request. `previous`: the chunk before it. `places`: for the log. `admitted`: whether
        others may be pushed out for it."""
        state, chunks = self._state, self._state.chunks
        key = request.keys[offset]
        record, pending = chunks.visible.get(key), chunks.pending.get(key)
        if record is not None:
            if previous is not None and record.parent is None and record.index:
                chunks.link(record, previous)
            state.counters.puts_exist += 1
            places.append("exists")
            return PutGrant("exists")
        if pending is not None:
            taken = self._taken(pending, request)
            if taken is not None:
                places.append(taken)
                return PutGrant(taken)
            pending = chunks.pending.get(key)
        if pending is None:
            pending = chunks.begin(key, request.first_index + offset, chunks.namespace(request.namespace), request.num_shards)
            if previous is not None:
                # Before room is made: what we append to must not go to make it.
                chunks.link(pending.record, previous)
        slab = placer.place(key, admitted or bool(pending.parts))
        if slab is None:
            if not pending.parts:
                chunks.abandon(pending)
            state.counters.puts_not_admitted += placer.refused
            state.counters.puts_no_space += not placer.refused
            places.append("not_admitted" if placer.refused else "no_space")
            return PutGrant("no_space")
        tokens = request.tokens[offset]
        write, grant = state.begin_write(slab, client, key, request.shard, tokens, pending.record.namespace, state.now)
        pending.parts[request.shard] = write
        state.counters.puts += 1
        places.append(write.packed)
        return grant

    def _taken(self, pending: Pending, request: PutRequest) -> Literal["exists", "busy"] | None:
        """Say why the request's shard of a pending chunk may not be written; None if it may. What was found in an inventory,
        with another number of shards, gives way: then the chunk is pending no more."""
        counters = self._state.counters
        if pending.num_shards != request.num_shards and pending.is_found():
            for found in list(pending.parts.values()):
                self.drop(found)
            return None
        part = pending.parts.get(request.shard)
        if part is not None and part.state == USED:
            counters.puts_exist += 1
            return "exists"
        if part is not None or pending.num_shards != request.num_shards:
            counters.puts_busy += 1
            return "busy"
        return None

    def end(self, session: Session, verb: PutEnd) -> list[bool]:
        """A ticket whose bytes are published is True again."""
        state, client, now = self._state, session.client, self._state.now
        published: list[Record] = []
        results: list[bool] = []
        for ticket in verb.tickets:
            write = state.writes.get(client, ticket.key, ticket.shard, ticket.generation)
            if write is None:
                done = self._is_published(ticket)
            elif write.state == QUARANTINED:
                write.slab.buried.clear()
                self.release(write)
                done = False
            elif write.source:
                done = end_move(state, write)
                if not done:
                    self.release(write)
            else:
                done = True
                record = self._finish(write, now)
                if record is not None:
                    published.append(record)
            if not done and write is not None and write.source:
                refuse_move(state, write, ticket.key)
            else:
                state.counters.late_ends += not done
            results.append(done)
        if published:
            state.log.happened(now, "published", [record.key for record in published])
            self.enqueue(published, now)
        return results

    def revoke(self, session: Session, verb: PutRevoke) -> None:
        for ticket in verb.tickets:
            write = self._state.writes.get(session.client, ticket.key, ticket.shard, ticket.generation)
            if write is not None:
                self._state.counters.revocations += 1
                self.release(write)

    def _is_published(self, ticket: Ticket) -> bool:
        record = self._state.chunks.visible.get(ticket.key)
        if record is not None:
            packed = record.packed_at(ticket.shard)
            return bool(packed) and generation_of(packed) == ticket.generation
        pending = self._state.chunks.pending.get(ticket.key)
        part = pending.parts.get(ticket.shard) if pending is not None else None
        return part is not None and part.state == USED and part.generation == ticket.generation

    def _finish(self, write: Write, now: float) -> Record | None:
        """Count a shard as complete whose bytes landed. The record if its chunk is now complete."""
        state, slab = self._state, write.slab
        write.state = USED
        state.allocator.change(slab, write.slot, PROCESSING)
        slab.confirm(write.slot)
        state.counters.stored += 1
        state.writes.await_others(write, now + state.config.ticket_ttl)
        return self.complete(write.key)

    # Complete chunks

    def complete(self, key: bytes) -> Record | None:
        """Publish a pending chunk if all its shards are there. The caller enqueues it for eviction."""
        state = self._state
        pending = state.chunks.pending[key]
        if not pending.complete():
            return None
        record = state.chunks.publish(pending)
        for part in pending.parts.values():
            state.writes.remove(part)
            part.slab.owners[part.slot] = record
        return record

    def enqueue(self, records: list[Record], now: float) -> None:
        """Put published records into the eviction queue of their first shard's slot size, tails first."""
        clock = self._state.tick_clock(now)
        for record in deepest_first(records) if len(records) > 1 else records:
            record.used = clock
            self._state.chunks.policy.add(record, stride_of(record.packed))

    # Writes that do not end well

    def lapse(self, write: Write, why: str) -> None:
        """Quarantine a write in PROCESSING: others may write the key now, nobody the slot."""
        state = self._state
        state.log.happened(state.now, "quarantined", (write.key,), why, write.packed)
        self._leave(write)
        write.state = QUARANTINED
        state.allocator.change(write.slab, write.slot, PROCESSING)
        state.writes.untime(write)
        state.counters.quarantines += 1

    def release(self, write: Write) -> None:
        """Free the slot of a writer that has finished with it, or is gone and the quarantine has passed."""
        if write.state != QUARANTINED:
            self._leave(write)
        self._state.writes.remove(write)
        write.slab.trace(write.slot, write.key, name_of(write.namespace))
        self._state.free(write.slab, write.slot)

    def drop(self, write: Write) -> None:
        """A complete shard goes: the others of its chunk did not come, or come in another number."""
        self._state.counters.incomplete += 1
        self._state.log.happened(self._state.now, "dropped", (write.key,), "without the other shards", write.packed)
        self.release(write)

    def _leave(self, write: Write) -> None:
        """Take a write out of its pending chunk."""
        pending = self._state.chunks.pending.get(write.key)
        if pending is not None and pending.parts.get(write.shard) is write:
            del pending.parts[write.shard]
            if not pending.parts:
                self._state.chunks.abandon(pending)

    def writer_lost(self, client: bytes) -> list[Segment]:
        """Quarantine the writes of a session that ended without goodbye. Segments in which any wait."""
        waiting: dict[Segment, None] = {}
        for write in self._state.writes.of(client):
            if write.state == PROCESSING:
                self.lapse(write, "its writer's session ended")
            if write.slab.segment is not None:
                waiting[write.slab.segment] = None
        return list(waiting)

    def writer_idle(self, client: bytes) -> None:
        """End all writes of a client that says that it has none in flight (hello or goodbye)."""
        for write in self._state.writes.of(client):
            self._state.log.happened(
                self._state.now, "given up", (write.key,), "its writer has nothing in flight", write.packed
            )
            self.release(write)

    def importer_gone(self, segment: Segment, client: bytes, now: float) -> None:
        """The process is dead, or has unmapped the segment: what it was writing there is over when the quarantine is."""
        for write in self._state.writes.of(client):
            if write.slab.segment is segment:
                if write.state == PROCESSING:
                    self.lapse(write, "its writer is gone")
                self._state.writes.rest(write, now + self._state.config.quarantine)

    def expire(self, now: float) -> None:
        """End tickets that lapsed, shards whose chunk was not completed in time, quarantines that are over."""
        state = self._state
        for write in state.writes.lapsed(now):
            if write.state == PROCESSING:
                state.counters.ticket_expiries += 1
                self.lapse(write, "its ticket lapsed")
            else:
                self.drop(write)
        for write in state.writes.rested(now):
            self.release(write)
