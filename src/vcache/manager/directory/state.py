"""What the parts of the directory share: tables, counters, the outbox, and how a chunk leaves its slots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ...config import ManagerConfig
from ...errors import ManagerRefusedError
from ...segment.slots import SlabGeometry, SlotLocation
from ..api import Push, PutGrant, Role, WipeSlots
from .allocator import Allocator
from .chunks import ChunkTable
from .eviction import make_policy
from .jobs import SLICE, Jobs
from .leases import LeaseTable
from .records import Record, Space
from .slabs import FREE, Slab, Wipe, Write, state_of
from .write_table import WriteTable

WIPE_BATCH = 1024
"""Slots in one `WipeSlots` at most."""


class Instruction(NamedTuple):
    """Something for the caller of the directory to do."""

    target: bytes | None
    """Client id, or None for every client that has a session."""
    push: Push | None
    """To send. None: the session of `target` was ended by the directory; close its connection."""


@dataclass(slots=True)
class Counters:
    """Since the manager started. Per key, unless the name says otherwise; lookups = hits + misses + errors (I10)."""

    lookups: int = 0
    hits: int = 0
    misses: int = 0
    errors: int = 0
    leases: int = 0
    leases_refused: int = 0
    """Because the session held too many."""
    lease_expiries: int = 0
    puts: int = 0
    """Tickets granted."""
    puts_exist: int = 0
    puts_busy: int = 0
    puts_no_space: int = 0
    stored: int = 0
    """Shards written and published or waiting for the other shards."""
    late_ends: int = 0
    """`put_end` for a ticket that had lapsed."""
    revocations: int = 0
    ticket_expiries: int = 0
    incomplete: int = 0
    """Complete shards dropped because the others never came."""
    evictions: int = 0
    """Chunks that went for lack of room, because their slab was returned, or with their segment."""
    demotions: int = 0
    """Shards that moved from VRAM to host memory."""
    demotions_refused: int = 0
    """Copied shards that stayed where they were: leased by others, gone, or moved before."""
    spills: int = 0
    """Chunks that an engine wrote to storage before their eviction."""
    slab_reclaims: int = 0
    """Slabs emptied to hold another slot size."""
    removed: int = 0
    recovered: int = 0
    """Shards found in inventories."""
    inventory_ignored: int = 0
    """Slot headers in inventories that were not believed."""
    quarantines: int = 0
    """Slots that went into quarantine."""
    wipes: int = 0
    """Slot headers that a lender was told to zero."""
    sessions: int = 0
    session_timeouts: int = 0


class Session:
    """One client's session."""

    __slots__ = ("client", "host", "name", "opened", "remote", "role", "seen", "unreadable", "version")

    def __init__(self, client: bytes, name: str, role: Role, now: float, host: str = "", remote: bool = False) -> None:
        self.client = client
        self.name = name
        self.role: Role = role
        self.host = host
        """Empty: it did not say; it is shown everything, and asked for nothing."""
        self.remote = remote
        """Whether it reads memory of other hosts."""
        self.opened = now
        self.seen = now
        self.unreadable: frozenset[bytes] = frozenset()
        """Slabs that it cannot read; as of `version` of the allocator."""
        self.version = -1


class State:
    """Shared state. Not thread-safe; no I/O; time is passed in."""

    def __init__(self, config: ManagerConfig, epoch: int, first_segment: int = 1, slice_size: int = SLICE) -> None:
        """`slice_size`: slots or keys that a job works on between two pauses."""
        self.config = config
        self.epoch = epoch
        self.sessions: dict[bytes, Session] = {}
        self.chunks = ChunkTable(make_policy(config.eviction))
        self.allocator = Allocator(epoch, first_segment)
        self.chunks.policy.closed = self.allocator.closed
        self.leases = LeaseTable(config.lease_ttl)
        self.writes = WriteTable()
        self.counters = Counters()
        self.outbox: list[Instruction] = []
        self.jobs = Jobs()
        self.slice_size = slice_size
        self.now = 0.0
        """The time of the latest call."""
        self.wiping: dict[int, dict[Wipe, None]] = {}
        """Outstanding wipes, by token; in order, because the same events must always have the same effects."""
        self._deferred: dict[int, list[Slab]] = {}
        """Removals whose headers cannot be zeroed yet because somebody writes in these slabs, by token."""
        # From the epoch on: a lender's late word on a wipe of an earlier manager is not taken for one of this manager's.
        self._last_token = epoch
        self.clock = 1
        """Coarse time of use: eighths of a second."""
        self._clock_until = 0.0

    def tick_clock(self, now: float) -> int:
        """The same int object for everything in an eighth of a second: it costs the records nothing."""
        if now >= self._clock_until:
            self.clock = max(self.clock, int(now * 8) + 1)
            self._clock_until = self.clock / 8
        return self.clock

    def session(self, client: bytes, now: float) -> Session:
        """The client's session, which this proves alive. Raises `ManagerRefusedError` without one."""
        session = self.sessions.get(client)
        if session is None:
            raise ManagerRefusedError("no session: say hello first")
        session.seen = self.now = now
        return session

    def unreadable(self, session: Session) -> frozenset[bytes]:
        """Slabs that the session cannot read (`Allocator.unreadable`)."""
        if session.version != self.allocator.version:
            session.version = self.allocator.version
            session.unreadable = self.allocator.unreadable(session.host, session.remote)
        return session.unreadable

    def push(self, target: bytes | None, push: Push) -> None:
        self.outbox.append(Instruction(target, push))

    # Chunks and slots

    def begin_write(
        self,
        slab: Slab,
        client: bytes,
        key: bytes,
        shard: int,
        tokens: int,
        space: Space | None,
        now: float,
        source: bytes = b"",
    ) -> tuple[Write, PutGrant]:
        """A ticket for a free slot of this slab."""
        slot = self.allocator.take(slab)
        generation = slab.next_generation()
        while self.writes.get(client, key, shard, generation) is not None:
            generation = slab.next_generation()
        location = slab.location(slot, tokens, generation)
        write = Write(slab, slot, key, shard, generation, space=space, writer=client, packed=location.pack(), source=source)
        self.allocator.hold(slab, slot, write)
        self.writes.add(write)
        self.writes.time(write, now + self.config.ticket_ttl)
        assert slab.segment is not None
        return write, PutGrant("granted", location, slab.format_generation, slab.slots, slab.segment.fence)

    def replace(self, record: Record, shard: int, packed: bytes) -> None:
        """Another copy takes the place of a visible chunk's shard: trace and free the old slot. The new slot is the caller's
        affair."""
        old = SlotLocation.unpack(record.packed_at(shard))
        spilled = record.spilled
        self.mark_spilled(record, False)
        record.relocate(shard, packed)
        self.mark_spilled(record, spilled)
        slab = self.allocator.slab_at(old)
        slab.trace(old.slot, record.key, name_of(record.space))
        self.free(slab, old.slot)

    def mark_spilled(self, record: Record, spilled: bool) -> None:
        """A visible chunk is in the storage tier as well, or we no longer say so."""
        if record.spilled is spilled:
            return
        record.spilled = spilled
        for place in record.places():
            slab = self.allocator.slab_at(place)
            assert slab.segment is not None
            slab.segment.memory.spilled += slab.share if spilled else -slab.share

    def hide(self, record: Record) -> None:
        """A visible chunk is gone. Its slots are the caller's affair."""
        self.mark_spilled(record, False)
        self.chunks.hide(record)

    def forget(self, record: Record) -> None:
        """A visible chunk goes; all its slots are free. Their headers stay until somebody overwrites them."""
        places = record.places()
        name = name_of(record.space)
        self.hide(record)
        for place in places:
            slab = self.allocator.slab_at(place)
            slab.trace(place.slot, record.key, name)
            self.free(slab, place.slot)

    def free(self, slab: Slab, slot: int) -> None:
        """The holder of a slot lets go. Zeroes headers first where a removed chunk's may still be there."""
        if slab.segment is not None and slab.stale.get(slot, ()) is None:
            self.wipe([(slab, slot)])
            return
        self.allocator.release(slab, slot)
        if slab.buried and slab.segment is not None and not slab.busy:
            self.wipe_slab(slab, [old for old, traces in slab.buried.items() if traces is None])

    def check_leases(self, client: bytes) -> None:
        """Raises `ManagerRefusedError` when the client holds as many leases as a session may."""
        if not self.leases.has_room(client):
            self.counters.leases_refused += 1
            raise ManagerRefusedError(
                f"this session holds too many leases ({self.leases.count(client)}, or too many chunks in them); release some"
            )

    def unpinned(self, records: Iterable[Record]) -> None:
        """Leases let go of these records: ghosts among them may disappear."""
        if self.chunks.ghosts:
            for record in records:
                self.chunks.settle(record)

    # Wiping

    def wipe(self, slots: Iterable[tuple[Slab, int]]) -> list[int]:
        """Hold these slots (free or not) until their lenders zeroed the headers; tokens to wait for."""
        by_segment: dict[int, list[tuple[Slab, int]]] = {}
        for slab, slot in slots:
            assert slab.segment is not None
            by_segment.setdefault(slab.segment.number, []).append((slab, slot))
        tokens: list[int] = []
        for places in by_segment.values():
            for start in range(0, len(places), WIPE_BATCH):
                batch = places[start : start + WIPE_BATCH]
                tokens.append(self._hold_for_wipe(batch, batch))
        return tokens

    def wipe_slab(self, slab: Slab, headers: list[int]) -> list[int]:
        """Zero headers that an earlier format left in an empty slab. All of the slab is held meanwhile, because those places
        may be payload now."""
        if not headers:
            return []
        holds = [(slab, slot) for slot in range(slab.slots)]
        return [self._hold_for_wipe(holds, [(slab, slot) for slot in headers])]

    def _hold_for_wipe(self, holds: list[tuple[Slab, int]], headers: list[tuple[Slab, int]]) -> int:
        """Both in slabs of one segment."""
        self._last_token = token = self._last_token + 1
        holders = self.wiping[token] = {}
        segment = holds[0][0].segment
        assert segment is not None
        for slab, slot in holds:
            before = state_of(slab.owners[slot])
            wipe = Wipe(slab, slot, token)
            holders[wipe] = None
            if before == FREE:
                self.allocator.hold(slab, slot, wipe)
            else:
                slab.owners[slot] = wipe
                self.allocator.change(slab, slot, before)
        for slab, slot in headers:
            slab.stale.pop(slot, None)
            slab.buried.pop(slot, None)
        self.counters.wipes += len(headers)
        offsets = [(slab.index, SlabGeometry.header_offset(slot)) for slab, slot in headers]
        self.push(segment.info.owner, WipeSlots(token=token, segment=segment.info.uuid, slots=offsets))
        return token

    def defer_wipe(self, slabs: list[Slab]) -> list[int]:
        """Headers of removed chunks in these slabs (traces of None) must be zeroed, or voided by the writes that are under way
        there; a token to wait for that."""
        if not slabs:
            return []
        self._last_token = token = self._last_token + 1
        self._deferred[token] = slabs
        return [token]

    def outstanding(self, token: int) -> bool:
        """Whether headers of removed chunks are still in the memory of a mounted segment. O(slots) for deferred wipes."""
        slabs = self._deferred.get(token)
        if slabs is None:
            return token in self.wiping
        while slabs:
            if slabs[-1].segment is not None and slabs[-1].is_doomed():
                return True
            slabs.pop()
        del self._deferred[token]
        return False

    def count_outstanding(self) -> int:
        """Tokens that are outstanding."""
        return len(self.wiping) + sum(self.outstanding(token) for token in list(self._deferred))

    def end_wipe(self, wipe: Wipe) -> None:
        """One slot is clean, or its memory is gone."""
        self.release_token(wipe)
        if wipe.slab.owners[wipe.slot] is wipe:
            self.allocator.release(wipe.slab, wipe.slot)

    def release_token(self, wipe: Wipe) -> None:
        """Nobody needs to wait for this slot any more."""
        holders = self.wiping.get(wipe.token)
        if holders is not None:
            holders.pop(wipe, None)
            if not holders:
                del self.wiping[wipe.token]


def name_of(space: Space | None) -> bytes:
    """The namespace; empty if it is not known."""
    return space.name if space is not None else b""
